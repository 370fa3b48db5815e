"What holds of maps whatever the data, and what a map does with what does not fit it."

import json
import math
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.linear_model import Ridge

from concept_transfer.arms import readouts_of, written
from concept_transfer.artefacts import load_artefact
from concept_transfer.concepts import extract_concept
from concept_transfer.data import EMOTION_PROMPT, Corpus, leak, load_pairs
from concept_transfer.export import export
from concept_transfer.maps import (
    MAP_METHODS,
    AffineMap,
    LayerGrid,
    MapMethod,
    SourceLayer,
    contrans,
    control,
    cv_error,
    downstream,
    fit_maps,
    random_map,
    ridge,
    solve,
)
from concept_transfer.models import ModelInfo, tiny_model, twin
from concept_transfer.moments import Moments, Rows, collect, robust_weight
from concept_transfer.pairing import last_token
from concept_transfer.plots import plot_grid
from concept_transfer.steering import place
from concept_transfer.tasks import load_task
from concept_transfer.toys import random_rotation
from concept_transfer.uselog import used
from concept_transfer.views import layer_scores, moved_items

SCENES = Corpus("scenes", [t for e in ("happiness", "anger") for t in load_pairs(f"emotions/{e}").texts])
SOLVED = [k for k, entry in MAP_METHODS.items() if entry.solve]


@pytest.fixture(scope="module")
def pair():
    return tiny_model("llama"), tiny_model("gpt2")


@pytest.fixture(scope="module")
def joy(pair):
    return extract_concept(pair[0], load_pairs("emotions/happiness"))


def rows(n, d1=12, d2=9, seed=0, noise=0.1):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 2, d1, generator=g, dtype=torch.float64) * torch.logspace(-1, 1, d1) + 3
    Y = torch.einsum("rlc,lcd->rld", X, torch.randn(2, d1, d2, generator=g).double())
    return X, Y + noise * torch.randn(n, 2, d2, generator=g) + 5


def summed(X, Y, folds=4, weight=None):
    m = Moments.zeros(folds, *X.shape[1:], *Y.shape[1:])
    m.add(X, Y, torch.arange(len(X)) % folds, weight)
    return m


def solved(m, s=0, **options):
    return ridge(SourceLayer(m, s, **options))


def close(a, b, tol):
    assert (a - b).abs().max() <= tol * b.abs().max(), float((a - b).abs().max() / b.abs().max())


def planted(W, n, noise, offset=5.0, seed=3):
    "Moments of rows of a known affine map, the last tenth held out."
    g, (d1, d2), k = torch.Generator().manual_seed(seed), W.shape, n - n // 10
    X = torch.randn(n, 1, d1, generator=g).double() + 2
    Y = X @ W + noise * torch.randn(n, 1, d2, generator=g) + offset
    m = Moments.zeros(4, 1, d1, 1, d2, source_layers=(0,), target_layers=(0,))
    m.add(X[:k], Y[:k], torch.arange(k) % 4)
    m.held_x, m.held_y, m.held_of = X[k:].float(), Y[k:].float(), torch.arange(n - k)
    return m


def test_order_of_rows_and_size_of_batches_do_not_matter():
    X, Y = rows(300)
    fold, order = torch.arange(300) % 4, torch.randperm(300, generator=torch.Generator().manual_seed(1))
    other = Moments.zeros(4, 2, 12, 2, 9)
    for i in order.split(37):
        other.add(X[i], Y[i], fold[i])
    close(solved(other, 1), solved(summed(X, Y), 1), 1e-9)


def test_units_of_either_space_do_not_matter():
    X, Y = rows(200)
    a, c = torch.logspace(-2, 3, 12).double(), torch.logspace(2, -3, 9).double()
    scaled = solved(summed(X * a - 7, Y * c + 100))
    close(scaled * a[:, None] / c, solved(summed(X, Y)), 1e-5)


def test_a_planted_map_is_found_in_noise():
    g = torch.Generator().manual_seed(3)
    X, W = torch.randn(4000, 1, 20, generator=g).double(), torch.randn(20, 15, generator=g).double()
    Y = (X[:, 0] @ W + 0.5 * torch.randn(4000, 15, generator=g) + 2)[:, None]
    got = solved(summed(X, Y))[0]
    assert (got - W).norm() / W.norm() < 0.02


@pytest.mark.parametrize("n", [30, 400])
def test_the_solution_is_that_of_scikit_learn(n):
    X, Y = rows(n, d1=40)
    u = SourceLayer(summed(X, Y), 0)
    sx, sy = X[:, 0].std(0, correction=0), Y[:, 1].std(0, correction=0)
    fit = Ridge(alpha=float(u.lam[1]) * n, solver="svd").fit((X[:, 0] / sx).numpy(), (Y[:, 1] / sy).numpy())
    close(ridge(u)[1], torch.tensor(fit.coef_.T) / sx[:, None] * sy, 1e-6)


@pytest.mark.parametrize("uneven", [False, True])
def test_cross_validation_is_that_of_refitting(uneven):
    X, Y = rows(90, d1=20, noise=5.0)
    fold = torch.arange(90) % 3 if not uneven else torch.tensor([0] * 50 + [1] * 40)  # the third one is empty
    m = Moments.zeros(3, 2, 20, 2, 9)
    m.add(X, Y, fold)
    lambdas = (1e-3, 0.1, 3.0)
    Z, T = X[:, 1] / X[:, 1].std(0, correction=0), Y[:, 0] / Y[:, 0].std(0, correction=0)
    lost, there = np.zeros(3), 0.0
    for k in fold.unique():
        fit, held = fold != k, fold == k
        there += float((T[held] - T[fit].mean(0)).square().sum())
        for i, lam in enumerate(lambdas):
            P = Ridge(alpha=lam * int(fit.sum())).fit(Z[fit], T[fit]).predict(Z[held])
            lost[i] += ((T[held].numpy() - P) ** 2).sum()
    np.testing.assert_allclose(cv_error(SourceLayer(m, 1, lambdas))[:, 0], lost / there, rtol=1e-4)


def test_one_penalty_is_taken_as_it_is_and_several_need_folds():
    X, Y = rows(50)
    assert SourceLayer(summed(X, Y, 1), 0, [0.3]).lam.tolist() == [0.3, 0.3]
    with pytest.raises(ValueError, match="use more folds, or give one lambda"):
        solved(summed(X, Y, 1))


def test_weights_are_repetitions():
    X, Y = rows(60)
    w = torch.arange(60) % 3
    repeated = summed(X.repeat_interleave(w, 0), Y.repeat_interleave(w, 0))
    close(solved(summed(X, Y, weight=w.double()), lambdas=[0.1]), solved(repeated, lambdas=[0.1]), 1e-9)


@pytest.mark.parametrize("method", SOLVED)
def test_duplicate_rows_and_constant_dimensions_are_harmless(method):
    X, Y = rows(50)
    X[:, :, 3], Y[:, :, 2] = 7.0, -1.0
    u = SourceLayer(summed(torch.cat([X, X]), torch.cat([Y, Y])), 0)
    W = torch.stack([*u.maps(MAP_METHODS[method].solve, u.products)])
    assert torch.isfinite(W).all() and not W[:, 3].any() and not W[:, :, 2].any()


def test_no_collapse_where_least_squares_collapses():
    X, Y = rows(400, d1=40, d2=20, noise=20.0)
    x, y, held = X[:, 0], Y[:, 0], slice(40, None)
    W = solved(summed(X[:40], Y[:40]))[0]

    def r2(P):
        return float(1 - (y[held] - P).square().sum() / (y[held] - y[:40].mean(0)).square().sum())

    with pytest.warns(UserWarning, match="n = d"):
        raw = r2(x[held] @ contrans(x[:40], y[:40]))
    assert r2((x[held] - x[:40].mean(0)) @ W + y[:40].mean(0)) > max(raw, -0.05) and raw < -1


def test_the_control_is_as_large_as_chance_makes_a_map():
    g = torch.Generator().manual_seed(0)
    X, Y = torch.randn(20000, 1, 10, generator=g).double(), torch.randn(20000, 1, 60, generator=g).double()
    u = SourceLayer(summed(X, Y), 0, [0.01])
    assert 0.8 < float(control(u).norm() / ridge(u).norm()) < 1.25


def test_contrans_warns_near_its_collapse():
    with pytest.warns(UserWarning, match="n = d"):
        contrans(torch.randn(50, 48), torch.randn(50, 8))


@pytest.mark.slow
def test_a_map_says_how_its_texts_were_read(tmp_path, pair):
    options = {"folds": 3, "held_out": 0.2, "thin": last_token, "weight": robust_weight}
    maps = fit_maps(*pair, SCENES, [1], [2], **options)
    maps.save(tmp_path / "m")
    said = {"thin": "last_token", "weight": "robust_weight", "folds": 3, "held_out": 0.2}
    said |= {"precision": ["float32", "float32"], "most_rows": 2048}
    assert maps.settings == LayerGrid.load(tmp_path / "m").settings == said
    assert load_artefact(tmp_path / "m")[1]["settings"] == said
    published = fit_maps(*pair, SCENES, [1], [2], method="contrans")
    assert published.settings["thin"] == "last token of sentences cut short"


@pytest.mark.slow
def test_the_published_method_reads_inside_the_template_and_refuses_what_it_does_not_know(pair):
    plain, inside = (
        fit_maps(*pair, SCENES, [1], [2], method="contrans", template=t) for t in ("{}", "Story: {} The end")
    )
    assert inside.template == "Story: {} The end" and (inside.W - plain.W).norm() > 0.1 * plain.W.norm()
    for option in ({"thin": last_token}, {"weight": robust_weight}, {"path": "m"}, {"folds": 3}):
        with pytest.raises(ValueError, match=f"knows no {next(iter(option))}; .*method='ridge'"):
            fit_maps(*pair, SCENES, [1], [2], method="contrans", **option)


@pytest.mark.parametrize("method", ["ridge", "contrans"])
def test_too_little_text_is_said(method, pair):
    with pytest.raises(ValueError, match="too few"):
        fit_maps(*pair, SCENES.take(3), method=method)


@pytest.mark.slow
def test_every_method_finds_the_twin_and_the_controls_do_not(pair, joy):
    m = pair[0]
    t, Q = twin(m, widen=8)
    sums = collect(m, t, SCENES, [2], [2], template=joy.template)
    for method in SOLVED:
        maps = solve(sums, method)
        cosine = torch.cosine_similarity(maps[2, 2].direction(joy), joy[2] @ Q, 0)
        assert maps.method == method and cosine > (0.95 if method == "procrustes" else 0.99), (method, cosine)
    assert maps.p_value < 0.01 and maps.inside(joy)[0] > 0.99 and maps.rank.item() > 10
    guess = torch.cosine_similarity(joy[2] @ random_map(maps[2, 2].W), joy[2] @ Q, 0)
    assert abs(guess) < 0.6 and maps.r2_shuffled.item() < 0.05
    area, cosine = downstream(maps, joy, t, load_pairs("emotions/happiness"))
    assert cosine.item() > 0.99 and area.item() > 0.6


@pytest.mark.slow
def test_a_method_of_ones_own_stands_wherever_a_name_does(tmp_path, pair):
    def least_squares(R, C, lam):
        return torch.linalg.pinv(R) @ C

    def half(u, t, C):
        return u.inverse(u.lam[t].item()) @ C / 2

    sums = collect(*pair, SCENES, [1], [2])
    close(solve(sums, least_squares).W, fit_maps(*pair, SCENES, [1], [2], method=least_squares).W, 1e-6)
    full, entry = solve(sums), solve(sums, MapMethod("half", "half as long", half))
    close(entry.W * 2, full.W, 1e-6)
    entry.save(tmp_path / "m")
    assert LayerGrid.load(tmp_path / "m")[1, 2].notes["method"] == "half"
    assert solve(sums, least_squares).method == "least_squares" and "least_squares" in repr(
        solve(sums, least_squares)
    )
    read = MapMethod("fixed", fit=lambda source, target, corpus, l1, l2, **options: (l1, l2, options))
    assert fit_maps(*pair, SCENES, [1], [2], method=read, held_out=0.5) == ([1], [2], {"held_out": 0.5})


def test_a_method_that_is_not_there_is_said(pair):
    with pytest.raises(
        ValueError, match="method 'magic': use one of ridge, contrans, procrustes, lowrank, whitened"
    ):
        fit_maps(*pair, SCENES, method="magic")
    with pytest.raises(
        ValueError, match="'contrans' is not solved from moments: use ridge, procrustes, lowrank"
    ):
        solve(planted(torch.eye(8).double(), 100, 1.0), "contrans")
    no_products = summed(*rows(50))
    no_products.yy, no_products.held_x = no_products.squares, torch.zeros(2, 2, 12)
    with pytest.raises(ValueError, match="products=True"):
        solve(no_products, "whitened")


@pytest.mark.slow
def test_maps_compose(pair, joy):
    m = pair[0]
    t, _ = twin(m)
    u, _ = twin(t, seed=5)
    there, on, direct = (
        fit_maps(a, b, SCENES, [2], [2], template=joy.template)[2, 2] for a, b in ((m, t), (t, u), (m, u))
    )
    assert torch.cosine_similarity(there.then(on).direction(joy), direct.direction(joy), 0) > 0.99
    X = torch.randn(5, 48)
    close(there.then(on)(X), on(there(X)), 1e-5)
    with pytest.raises(ValueError, match="belongs to"):
        there.then(there)


@pytest.mark.slow
def test_a_map_survives_its_file(tmp_path, pair, joy):
    m = fit_maps(*pair, SCENES, [1], [2], template=joy.template)[1, 2]
    for made in (m, m.inverse(), m.then(m.inverse())):
        made.save(tmp_path / "m")
        again = AffineMap.load(tmp_path / "m")
        for k in ("W", "b", "shuffled"):
            one, other = getattr(again, k), getattr(made, k)
            assert torch.equal(one, other) and one.dtype == other.dtype
        for k in ("layers", "source", "target", "notes"):
            assert getattr(again, k) == getattr(made, k)
        assert again.r2 == made.r2 or math.isnan(again.r2) and math.isnan(made.r2)
        assert made.source.name in again._repr_html_()
    assert m.notes["settings"]["folds"] == 5
    assert place(joy, pair[1], map=m).notes["lam"] == m.notes["lam"] > 0
    with pytest.raises(ValueError, match="kind 'affine', where 'map'"):
        LayerGrid.load(tmp_path / "m")
    joy.save(tmp_path / "c")
    with pytest.raises(ValueError, match="kind 'concept', where 'affine'"):
        AffineMap.load(tmp_path / "c")


@pytest.mark.slow
def test_a_grid_of_the_first_format_is_read(tmp_path, pair):
    maps = fit_maps(*pair, SCENES, [1, 2], [2])
    maps.save(tmp_path / "new")
    old = {"shuffled": "null", "r2_shuffled": "r2_null", "texts_hash": "data"}
    with safe_open(tmp_path / "new", "pt") as f:
        tensors = {old.get(k, k): f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (it is no dict)
        head = json.loads(f.metadata()["concept_transfer"])
    head = {old.get(k, k): v for k, v in head.items() if k != "digest"} | {"format": 1}
    save_file(tensors, tmp_path / "old", {"concept_transfer": json.dumps(head)})
    with pytest.warns(UserWarning, match="older format 1"):
        again = LayerGrid.load(tmp_path / "old")
    assert torch.equal(again.shuffled, maps.shuffled) and torch.equal(again.r2_shuffled, maps.r2_shuffled)
    assert again.texts_hash == maps.texts_hash and repr(again) == repr(maps)


@pytest.mark.slow
def test_a_forgotten_template_is_said(pair, joy):
    assert joy.template == EMOTION_PROMPT
    bare, inside = (fit_maps(*pair, SCENES, [1, 2], [2], template=t) for t in ("{}", joy.template))
    for use in (
        bare[1, 2].direction,
        bare.inside,
        lambda c: downstream(bare, c, pair[1], load_pairs("honesty")),
    ):
        with pytest.warns(UserWarning, match="Fit it with template='{} The main emotion in this story is'"):
            use(joy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inside[1, 2].direction(joy)
        inside.inside(joy)


def test_a_planted_affine_map_comes_with_its_offset():
    W = torch.randn(20, 15, generator=torch.Generator().manual_seed(0)).double()
    maps = solve(planted(W, 4000, 0.1))
    close(maps.W[0, 0], W.float(), 0.01)
    assert (maps.b[0, 0] - 5).abs().max() < 0.05 and maps.r2.item() > 0.99


def test_a_planted_rank_is_found():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(40, 8, generator=g).double() @ torch.randn(8, 30, generator=g).double()
    low, full = (solve(planted(W, 2000, 8.0), method).W[0, 0] for method in ("lowrank", "ridge"))
    assert [int(torch.linalg.matrix_rank(A, rtol=1e-4)) for A in (low, full)] == [8, 30]
    assert (low - W).norm() < 0.8 * (full - W).norm()


def test_pure_noise_is_not_significant():
    g, p = torch.Generator().manual_seed(0), []
    for _ in range(20):
        m = Moments.zeros(3, 2, 10, 2, 8, source_layers=(0, 1), target_layers=(0, 1))
        X, Y = torch.randn(400, 2, 10, generator=g), torch.randn(400, 2, 8, generator=g)
        m.add(X[:300], Y[:300], torch.arange(300) % 3)
        m.held_x, m.held_y, m.held_of = X[300:], Y[300:], torch.arange(100)
        p.append(solve(m).p_value)
    assert sum(x <= 0.05 for x in p) <= 4 and np.mean(p) > 0.25


def test_several_rows_of_a_text_count_once():
    m = planted(torch.eye(8).double(), 400, 20.0)
    p = solve(m).p_value
    m.held_x, m.held_y, m.held_of = (A.repeat_interleave(9, 0) for A in (m.held_x, m.held_y, m.held_of))
    assert solve(m).p_value == p


def test_fewer_rows_than_dimensions(pair):
    few = Corpus("few", [t for e in ("sadness", "fear") for t in load_pairs(f"emotions/{e}").texts]).take(5)
    maps = fit_maps(tiny_model("llama", hidden_size=192), pair[1], few, [1], [1], folds=2, held_out=0.3)
    assert maps.rows < 192 and torch.isfinite(maps.W).all() and maps.r2[0, 0] > -1


def few_rows(weight=None):
    "Fewer rows than dimensions, one of which does not move, and as many more to judge."
    X, Y = rows(120, d1=80, noise=30.0)
    X[:, :, 3] = 7.0
    m = Rows.zeros(4, 2, 80, 2, 9, source_layers=(0, 1), target_layers=(0, 1))
    m.add(X[:60], Y[:60], torch.arange(60) % 4, weight)
    m.held_x, m.held_y, m.held_of = X[60:].float(), Y[60:].float(), torch.arange(60)
    return X[:60].float().double(), Y[:60].float().double(), m


def test_fewer_rows_than_dimensions_are_solved_in_their_span_as_scikit_learn_does():
    X, Y, m = few_rows()
    u = SourceLayer(m, 1)
    sx, sy = (A[:, k].std(0, correction=0) for A, k in ((X, 1), (Y, 0)))
    sx[3] = 1.0
    fit = Ridge(alpha=float(u.lam[0]) * 60, solver="svd").fit((X[:, 1] / sx).numpy(), (Y[:, 0] / sy).numpy())
    assert u.R.shape == (60, 60)
    Z, T, fold, lost = X[:, 1] / sx, Y[:, 0] / sy, torch.arange(60) % 4, []
    for lam in (1e-5, 1e-2, 3.0):
        parts = [(Z[fold != k], T[fold != k], Z[fold == k], T[fold == k]) for k in range(4)]
        P = [Ridge(alpha=lam * 45, solver="svd").fit(a, b).predict(c) for a, b, c, _ in parts]
        there = sum((d - b.mean(0)).square().sum() for _, b, _, d in parts)
        lost.append(
            sum((d - torch.tensor(p)).square().sum() for p, (*_, d) in zip(P, parts, strict=True)) / there
        )
    found = cv_error(SourceLayer(m, 1, (1e-5, 1e-2, 3.0)))[:, 0]
    np.testing.assert_allclose(found, torch.stack(lost), rtol=1e-4)
    close(ridge(u)[0], torch.tensor(fit.coef_.T) / sx[:, None] * sy, 1e-5)


@pytest.mark.parametrize("method", SOLVED)
@pytest.mark.filterwarnings("ignore:no map predicts")
def test_rows_and_their_sums_give_the_same_grid(method):
    for weight in (None, torch.linspace(0.1, 1, 60).double()):
        _, _, m = few_rows(weight)
        one, other = solve(m, method), solve(m.summed(), method)
        close(one.lam, other.lam, 1e-6)
        for k in ("W", "b", "r2", "rank", "span", "cosine"):
            close(getattr(one, k), getattr(other, k), 1e-3)
        close(one.shuffled.float(), other.shuffled.float(), 1e-2)  # bfloat16
        assert one.rows == other.rows and one.p_value == other.p_value


@pytest.mark.parametrize("d1, d2", [(48, 48), (48, 96), (96, 48)])
@pytest.mark.slow
def test_equal_wider_and_narrower_targets(d1, d2):
    a, b = tiny_model("llama", hidden_size=d1), tiny_model("mistral", hidden_size=d2)
    maps = fit_maps(a, b, SCENES.take(40), [1], [2])
    assert maps.W.shape == (1, 1, d1, d2)
    honesty = extract_concept(a, load_pairs("honesty"), [1])
    assert maps[1, 2].direction(honesty).shape == place(honesty, b, map=maps[1, 2]).vector().shape == (d2,)


def test_the_wrong_models_and_layers_are_refused(pair):
    maps = fit_maps(*pair, SCENES.take(30), [1], [1])
    with pytest.raises(ValueError, match="belongs to tiny-llama-0"):
        maps[1, 1].direction(extract_concept(tiny_model("opt"), load_pairs("honesty")))
    with pytest.raises(
        ValueError, match=r"no map for layers 1:2; source layers are \[1\], target layers \[1\]"
    ):
        maps[1, 2]


# what users give


def test_105_a_template_without_a_place_is_refused(pair):
    for method in ("ridge", "contrans"):
        with pytest.raises(ValueError, match="template"):
            fit_maps(*pair, SCENES, [1], [2], method=method, template="no place")


WRONG = [
    {"source_layers": []},
    {"source_layers": "12"},
    {"target_layers": [1.5]},
    {"target_layers": ["1"]},
    {"source_layers": 1},
    {"source_layers": [9]},
    {"folds": 0},
    {"folds": -1},
    {"folds": 2.5},
    {"folds": "5"},
    {"folds": 1},
    {"held_out": 0.0},
    {"held_out": 1.0},
    {"held_out": float("nan")},
    {"most_rows": 0},
    {"template": 5},
    {"thin": "last_token"},
    {"weight": 2},
    {"magic": 1},
    {"method": 5},
    {"method": "magic"},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_107_what_cannot_be_is_refused_before_anything_is_read(pair, wrong, monkeypatch):
    monkeypatch.setattr("concept_transfer.moments.paired_tokens", None)  # reading would fail otherwise
    with pytest.raises((ValueError, TypeError) if "magic" in wrong else ValueError):
        fit_maps(*pair, SCENES, **{"source_layers": [1], "target_layers": [2]} | wrong)


def test_arguments_that_are_swapped_or_names_are_told(pair, joy):
    source, target = pair
    for given, name in (
        (("smollm2-135m-instruct", target, SCENES), "source"),
        ((source, SCENES, target), "target"),
        ((source, target, load_pairs("honesty")), "corpus"),
        ((source, target, "scenes"), "corpus"),
    ):
        for method in ("ridge", "contrans"):
            with pytest.raises(ValueError, match=f"'{name}'"):
                fit_maps(*given, method=method)
    with pytest.raises(ValueError, match="'m'"):
        solve(joy)
    with pytest.raises(ValueError, match="too few"):
        fit_maps(source, target, Corpus("one", ["The cat sat on the mat."]), [1], [2])


def test_layers_may_come_from_numpy(pair):
    maps = fit_maps(*pair, SCENES.take(60), np.arange(1, 3), range(2, 3))
    one = maps[np.int64(1), np.int64(2)]
    assert (maps.source_layers, one.layers, type(one.layers[0])) == ((1, 2), (1, 2), int)
    for layers in (5, None, (1,), (1, 2, 2), ("a", 2), "1:2", (1, 9)):
        with pytest.raises(ValueError, match="no map for layers"):
            maps[layers]


def judged(noise, seed=3):
    "Maps of a planted truth under noise."
    m = planted(
        torch.randn(8, 12, generator=torch.Generator().manual_seed(seed)).double(), 300, noise, seed=seed
    )
    m.source, m.target = (ModelInfo(k, "toy", 1, d, "0", "0") for k, d in (("a", 8), ("b", 12)))
    return solve(m)


def test_a_map_no_better_than_its_control_warns(pair):
    for seed in range(5):
        with pytest.warns(UserWarning, match="no map predicts held-out states better"):
            judged(1e4, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judged(1.0)
        fit_maps(*pair, SCENES, [1], [2])


@pytest.mark.slow
def test_what_is_judged_downstream_belongs_to_the_maps(pair, joy):
    maps = fit_maps(*pair, SCENES, [1], [2], template=joy.template)
    other = tiny_model("gpt2", seed=5)
    with pytest.raises(ValueError, match="target side"):
        downstream(maps, joy, other, load_pairs("honesty"))
    with pytest.raises(ValueError, match="source side"):
        downstream(maps, extract_concept(other, load_pairs("honesty"), [1]), pair[1], load_pairs("honesty"))


# functions of yours, and arguments in the wrong place


def first_and_last(pairs, *sizes):
    "Pairs that cross would be paired otherwise without a word."
    return [(pairs[0][0], pairs[-1][1]), (pairs[-1][0], pairs[0][1])] if len(pairs) > 1 else pairs


@pytest.mark.parametrize(
    "given, says",
    [
        ({"thin": first_and_last}, "ascend on both sides"),
        ({"thin": lambda pairs, n, m: pairs[:1] * 2}, "ascend on both sides"),
        ({"thin": lambda pairs, n, m: [(-1, -1)]}, "ascend on both sides"),
        ({"thin": lambda pairs, n, m: [(n, m)]}, "ascend on both sides"),
        ({"thin": lambda pairs, n, m: [(0.5, 0.5)]}, "ascend on both sides"),
        ({"thin": lambda pairs, n, m: None}, "too few"),
        ({"weight": lambda X, Y: None}, "weight= gives None"),
        ({"weight": lambda X, Y: 1.0}, "one for each row"),
        ({"method": lambda R, C, lam: None}, "method= gives None"),
        ({"method": lambda R, C, lam: C[:3]}, "method= gives"),
    ],
)
def test_what_a_function_of_yours_gives_is_looked_at(pair, given, says):
    with pytest.raises(ValueError, match=says):
        fit_maps(*pair, Corpus("x", load_pairs("emotions/fear").texts[:40]), [1], [2], **given)


def test_weights_and_maps_of_numpy_are_taken(pair):
    texts = Corpus("x", load_pairs("emotions/fear").texts[:40])
    plain, C = collect(*pair, texts, [1], [2]), []
    other = collect(*pair, texts, [1], [2], weight=lambda X, Y: np.ones(len(X)))
    assert torch.equal(plain.x, other.x)
    grid = solve(plain, lambda R, c, lam: C.append(c) or c.numpy())
    assert torch.equal(grid.W, solve(plain, lambda R, c, lam: c).W) and C


def test_what_cannot_be_solved_or_drawn_is_refused():
    with pytest.raises(ValueError, match="too few rows to fit or to judge by"):
        solve(Moments.zeros(2, 1, 3, 1, 3))
    m = Moments.zeros(2, 1, 3, 1, 3)
    m.add(torch.randn(9, 1, 3), torch.randn(9, 1, 3), torch.arange(9) % 2)
    with pytest.raises(ValueError, match="too few rows to fit or to judge by"):
        solve(m)
    with pytest.raises(ValueError, match="random_map 'W': .*Tensor"):
        random_map(np.ones((2, 3)))
    for wrong in ((3, 4, 0, True), (4, 3), (0, 3)):
        with pytest.raises(ValueError, match="is not from 1 to width="):
            random_rotation(*wrong)


def test_arguments_in_the_wrong_place_are_named(pair, joy):
    source, target = pair
    pairs = load_pairs("emotions/happiness")
    grid = fit_maps(source, target, Corpus("x", pairs.texts[:40]), [1], [2])
    for call in (
        lambda: grid[1, 2].direction(source),
        lambda: grid[1, 2].direction(joy[1]),
        lambda: grid.inside(grid),
        lambda: downstream(joy, grid, target, pairs),
        lambda: downstream(grid, joy, target, grid),
        lambda: place(joy, target, map=grid[1, 2]).carriers(joy),
        lambda: plot_grid(joy),
        lambda: layer_scores(joy, grid),
        lambda: written(source, joy, ["It rained"]),
        lambda: readouts_of(joy),
        lambda: used(joy),
        lambda: export(joy, "x"),
        lambda: moved_items(joy, joy),
        lambda: leak(joy, load_task("emotions/fear")),
    ):
        with pytest.raises(ValueError, match="Input should be|map"):
            call()
