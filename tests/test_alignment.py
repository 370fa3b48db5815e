"""Properties of moments and maps that hold whatever the data."""

import copy, itertools, math, unicodedata
import numpy as np, pytest, torch
from sklearn.linear_model import Ridge
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from concept_transfer import moments as mo
from concept_transfer.alignment import (
    AffineMap,
    LayerGrid,
    contrans,
    downstream,
    fit_maps,
    random_map,
    ridge,
    solve,
)
from concept_transfer.data import Corpus, load_pairs
from concept_transfer.extraction import extract_concept, load_artefact
from concept_transfer.injection import graft
from concept_transfer.models import tiny_model, tiny_tokenizer, twin, wrap
from concept_transfer.moments import Moments, collect, last_token, paired_states, robust_weight

SCENES = Corpus("scenes", [t for e in ("happiness", "anger") for t in load_pairs(f"emotions/{e}").texts])


def rows(n, d1=12, d2=9, seed=0, noise=0.1):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 2, d1, generator=g, dtype=torch.float64) * torch.logspace(-1, 1, d1) + 3
    Y = (
        torch.einsum("rlc,lcd->rld", X, torch.randn(2, d1, d2, generator=g).double())
        + noise * torch.randn(n, 2, d2, generator=g)
        + 5
    )
    return X, Y


def summed(X, Y, folds=4, weight=None):
    m = Moments.zeros(folds, *X.shape[1:], *Y.shape[1:])
    m.add(X, Y, torch.arange(len(X)) % folds, weight)
    return m


def close(a, b, tol):
    assert (a - b).abs().max() <= tol * b.abs().max(), float((a - b).abs().max() / b.abs().max())


def test_order_of_rows_and_size_of_batches_do_not_matter():
    X, Y = rows(300)
    fold = torch.arange(300) % 4
    p = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    other = Moments.zeros(4, 2, 12, 2, 9)
    for i in p.split(37):
        other.add(X[i], Y[i], fold[i])
    close(ridge(other, 1)[0], ridge(summed(X, Y), 1)[0], 1e-9)


def test_merge_equals_the_whole():
    X, Y = rows(300)
    fold = torch.arange(300) % 4
    parts = [Moments.zeros(4, 2, 12, 2, 9) for _ in range(2)]
    for m, i in zip(parts, (slice(0, 90), slice(90, None))):
        m.add(X[i], Y[i], fold[i])
    close(ridge(parts[0] + parts[1], 0)[0], ridge(summed(X, Y), 0)[0], 1e-10)


def test_units_of_either_space_do_not_matter():
    X, Y = rows(200)
    a = torch.logspace(-2, 3, 12).double()
    c = torch.logspace(2, -3, 9).double()
    W, scaled = ridge(summed(X, Y), 0)[0], ridge(summed(X * a - 7, Y * c + 100), 0)[0]
    close(scaled * a[:, None] / c, W, 1e-5)


def test_a_planted_map_is_found_in_noise():
    g = torch.Generator().manual_seed(3)
    X = torch.randn(4000, 1, 20, generator=g).double()
    W = torch.randn(20, 15, generator=g).double()
    Y = (X[:, 0] @ W + 0.5 * torch.randn(4000, 15, generator=g) + 2)[:, None]
    got = ridge(summed(X, Y), 0)[0][0]
    assert (got - W).norm() / W.norm() < 0.02


@pytest.mark.parametrize("n", [30, 400])
def test_the_solution_is_that_of_scikit_learn(n):
    X, Y = rows(n, d1=40)
    W, _, lam, _ = ridge(summed(X, Y), 0)
    sx, sy = X[:, 0].std(0, correction=0), Y[:, 1].std(0, correction=0)
    ref = (
        Ridge(alpha=float(lam[1]) * n, solver="svd")
        .fit((X[:, 0] / sx).numpy(), (Y[:, 1] / sy).numpy())
        .coef_.T
    )
    close(W[1], torch.tensor(ref) / sx[:, None] * sy, 1e-6)


def test_weights_are_repetitions():
    X, Y = rows(60)
    w = torch.arange(60) % 3
    close(
        ridge(summed(X, Y, weight=w.double()), 0, [0.1])[0],
        ridge(summed(X.repeat_interleave(w, 0), Y.repeat_interleave(w, 0)), 0, [0.1])[0],
        1e-9,
    )


def test_duplicate_rows_and_constant_dimensions_are_harmless():
    X, Y = rows(50)
    X[:, :, 3] = 7.0
    Y[:, :, 2] = -1.0
    X, Y = torch.cat([X, X]), torch.cat([Y, Y])
    W = ridge(summed(X, Y), 0)[0]
    assert torch.isfinite(W).all() and not W[:, 3].any() and not W[:, :, 2].any()


def test_no_collapse_where_least_squares_collapses():
    X, Y = rows(400, d1=40, d2=20, noise=20.0)
    held = slice(40, None)
    W = ridge(summed(X[:40], Y[:40]), 0)[0][0]
    r2 = lambda P: float(
        1 - (Y[held, 0] - P).square().sum() / (Y[held, 0] - Y[:40, 0].mean(0)).square().sum()
    )
    with pytest.warns(UserWarning, match="n = d"):
        raw = r2(X[held, 0] @ contrans(X[:40, 0], Y[:40, 0]))
    assert r2((X[held, 0] - X[:40, 0].mean(0)) @ W + Y[:40, 0].mean(0)) > max(raw, -0.05) and raw < -1


def test_rows_that_are_not_finite_are_refused_and_the_text_is_named(monkeypatch):
    X, Y = rows(10)
    X[3, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        summed(X, Y)
    a, b = tiny_model("llama"), tiny_model("gpt2")
    bad = "The kettle sang in the empty kitchen."
    broken = tiny_model("llama")
    ids = a.tokenizer(bad).input_ids
    broken._module.model.embed_tokens.weight.data[ids[-3]] = torch.nan
    for pair in ((broken, b), (b, broken)):
        with pytest.raises(ValueError, match="not finite") as e:
            collect(*pair, Corpus("c", [bad]), [1], [1])
        assert "kettle" in str(e.value)


def test_an_interrupted_reading_goes_on_where_it_stopped(tmp_path, monkeypatch):
    a, b = tiny_model("llama"), tiny_model("gpt2")
    whole = collect(a, b, SCENES, [1], [2])
    real, calls = mo.paired_states, []

    def dies(*args, **kw):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kw)

    monkeypatch.setattr(mo, "_chunks", lambda texts: [texts[i : i + 60] for i in range(0, len(texts), 60)])
    monkeypatch.setattr(mo, "paired_states", dies)
    with pytest.raises(KeyboardInterrupt):
        collect(a, b, SCENES, [1], [2], path=tmp_path / "m", every=0)
    assert len(Moments.load(tmp_path / "m").seen) == 60
    again = collect(a, b, SCENES, [1], [2], path=tmp_path / "m", every=0)
    assert again.seen == whole.seen and torch.equal(again.n, whole.n) and len(calls) < 2 + len(SCENES) / 60
    close(solve(again).W, solve(whole).W, 1e-2)  # the shift differs, and products are float32


def test_two_machines_with_half_of_the_texts_each():
    a, b = tiny_model("llama"), tiny_model("gpt2")
    whole = collect(a, b, SCENES, [1], [2])
    texts = list(dict.fromkeys(SCENES.texts))
    n = len(texts) // 2
    both = collect(a, b, Corpus("one", texts[:n]), [1], [2]) + collect(
        a, b, Corpus("two", texts[n:]), [1], [2]
    )
    one, all_ = solve(both), solve(whole)
    assert (
        torch.equal(both.n, whole.n)
        and both.seen == whole.seen
        and (one.rows, one.data, one.settings) == (all_.rows, all_.data, all_.settings)
    )
    close(one.W, all_.W, 1e-2)
    close(one.r2, all_.r2, 1e-2)


@pytest.mark.parametrize(
    "other",
    [
        {"positions": last_token},
        {"weight": robust_weight},
        {"held_out": 0.2},
        {"folds": 4},
        {"template": "Story: {}"},
        "bfloat16",
    ],
)
def test_moments_read_in_another_way_are_not_mixed(tmp_path, other):
    a, b = tiny_model("llama"), tiny_model("gpt2")
    first, second = SCENES.take(60), Corpus("rest", SCENES.texts[60:120])
    m = collect(a, b, first, [1], [2], path=tmp_path / "m")
    half = wrap(copy.deepcopy(b._module).bfloat16(), b.tokenizer)
    target, options = (half, {}) if other == "bfloat16" else (b, other)
    with pytest.raises(
        ValueError, match=f"moments of another {'precision' if other == 'bfloat16' else next(iter(other))}"
    ):
        collect(a, target, second, [1], [2], path=tmp_path / "m", **options)
    with pytest.raises(ValueError, match="collect both in the same way"):
        m + collect(a, target, second, [1], [2], **options)
    assert (
        Moments.load(tmp_path / "m").seen == m.seen
        and len(collect(a, b, second, [1], [2], path=tmp_path / "m").seen) == 120
    )


def test_a_map_says_how_its_texts_were_read(tmp_path):
    a, b = tiny_model("llama"), tiny_model("gpt2")
    maps = fit_maps(a, b, SCENES, [1], [2], folds=3, held_out=0.2, positions=last_token, weight=robust_weight)
    maps.save(tmp_path / "m")
    said = dict(
        positions="last_token",
        weight="robust_weight",
        folds=3,
        held_out=0.2,
        precision=["float32", "float32"],
    )
    assert (
        maps.settings
        == LayerGrid.load(tmp_path / "m").settings
        == load_artefact(tmp_path / "m")[1]["settings"]
        == said
    )
    assert (
        fit_maps(a, b, SCENES, [1], [2], method="contrans").settings["positions"]
        == "last token of sentences cut short"
    )


def test_the_published_method_reads_inside_the_template_and_refuses_what_it_does_not_know():
    a, b = tiny_model("llama"), tiny_model("gpt2")
    plain, inside = (
        fit_maps(a, b, SCENES, [1], [2], method="contrans", template=t) for t in ("{}", "Story: {} The end")
    )
    assert inside.template == "Story: {} The end" and (inside.W - plain.W).norm() > 0.1 * plain.W.norm()
    for option in ({"positions": last_token}, {"weight": robust_weight}, {"path": "m"}, {"folds": 3}):
        with pytest.raises(ValueError, match=f"knows no {next(iter(option))}; .*method='ridge'"):
            fit_maps(a, b, SCENES, [1], [2], method="contrans", **option)


def test_texts_longer_than_the_context_keep_their_beginning():
    a, b = tiny_model("llama"), tiny_model("gpt2")
    start = SCENES.texts[0]
    long = start + " and then it rained" * 60
    (X, Y, _), (LX, LY, of) = (paired_states(a, b, [t], [1], [2]) for t in (start, long))
    n = len(X) - 2
    assert (
        len(LX) > n
        and not of.any()
        and torch.allclose(LX[:n], X[:n], atol=1e-4)
        and torch.allclose(LY[:n], Y[:n], atol=1e-4)
    )
    assert torch.isfinite(LX).all() and len(LX) < 128


def test_thinning_and_weights_reach_the_fit():
    a, b = tiny_model("llama"), tiny_model("gpt2")
    full, last, soft = (
        collect(a, b, SCENES, [1], [2], **kw).n.sum()
        for kw in ({}, {"positions": last_token}, {"weight": lambda X, Y: torch.full((len(X),), 0.5)})
    )
    assert last < len(SCENES) and soft == full / 2
    X, Y = rows(100)
    X[7] += 1000
    assert robust_weight(X, Y)[7] < 0.25 and (robust_weight(X, Y) == 1).sum() > 80


def test_every_method_finds_the_twin_and_the_controls_do_not():
    m = tiny_model("llama")
    t, Q = twin(m, widen=8)
    joy = extract_concept(m, load_pairs("emotions/happiness"))
    sums = collect(m, t, SCENES, [2], [2])
    for method in ("ridge", "procrustes", "lowrank", "whitened"):
        maps = solve(sums, method)
        cosine = torch.cosine_similarity(maps[2, 2].direction(joy), joy[2] @ Q, 0)
        assert cosine > (0.95 if method == "procrustes" else 0.99), (method, cosine)
    assert maps.p_value < 0.01 and maps.inside(joy)[0] > 0.99 and maps.rank.item() > 10
    assert (
        abs(torch.cosine_similarity(joy[2] @ random_map(maps[2, 2].W), joy[2] @ Q, 0)) < 0.6
        and maps.r2_null.item() < 0.05
    )
    area, cosine = downstream(maps, joy, t, load_pairs("emotions/happiness"))
    assert cosine.item() > 0.99 and area.item() > 0.6


def test_the_same_sums_serve_the_way_back():
    a, b = tiny_model("llama"), tiny_model("gpt2")
    back, direct = solve(collect(a, b, SCENES, [1], [2]).reversed()), solve(collect(b, a, SCENES, [2], [1]))
    assert (back.source, back.target_layers) == (direct.source, direct.target_layers)
    assert torch.allclose(back.r2, direct.r2, atol=0.01) and torch.allclose(
        back.W, direct.W, atol=0.05 * float(direct.W.abs().max())
    )


def test_maps_compose():
    m = tiny_model("llama")
    t, _ = twin(m)
    u, _ = twin(t, seed=5)
    there = fit_maps(m, t, SCENES, [2], [2])[2, 2]
    on = fit_maps(t, u, SCENES, [2], [2])[2, 2]
    joy = extract_concept(m, load_pairs("emotions/happiness"))
    direct = fit_maps(m, u, SCENES, [2], [2])[2, 2]
    assert torch.cosine_similarity(there.then(on).direction(joy), direct.direction(joy), 0) > 0.99
    with pytest.raises(ValueError, match="belongs to"):
        there.then(there)


def test_a_map_survives_its_file(tmp_path):
    a, b = tiny_model("llama"), tiny_model("gpt2")
    joy = extract_concept(a, load_pairs("emotions/happiness"))
    m = fit_maps(a, b, SCENES, [1], [2])[1, 2]
    for made in (m, m.inverse(), m.then(m.inverse())):
        made.save(tmp_path / "m")
        again = AffineMap.load(tmp_path / "m")
        for k in ("W", "b", "null"):
            assert (
                torch.equal(getattr(again, k), getattr(made, k))
                and getattr(again, k).dtype == getattr(made, k).dtype
            )
        assert (again.layers, again.source, again.target, again.notes) == (
            made.layers,
            made.source,
            made.target,
            made.notes,
        )
        assert again.r2 == made.r2 or math.isnan(again.r2) and math.isnan(made.r2)
    assert m.notes["settings"]["folds"] == 5 and graft(joy, b, map=m).notes["lam"] == m.notes["lam"] > 0
    with pytest.raises(ValueError, match="is an affine, where a map"):
        LayerGrid.load(tmp_path / "m")
    joy.save(tmp_path / "c")
    with pytest.raises(ValueError, match="is a concept, where an affine"):
        AffineMap.load(tmp_path / "c")


def planted(W, n, noise, offset=5.0, seed=3):
    "Moments of rows of a known affine map, the last tenth held out."
    g = torch.Generator().manual_seed(seed)
    d1, d2 = W.shape
    X = torch.randn(n, 1, d1, generator=g).double() + 2
    Y = X @ W + noise * torch.randn(n, 1, d2, generator=g) + offset
    k = n - n // 10
    m = Moments.zeros(4, 1, d1, 1, d2, source_layers=(0,), target_layers=(0,))
    m.add(X[:k], Y[:k], torch.arange(k) % 4)
    m.held_x, m.held_y, m.held_of = X[k:].float(), Y[k:].float(), torch.arange(n - k)
    return m


def test_a_planted_affine_map_comes_with_its_offset():
    W = torch.randn(20, 15, generator=torch.Generator().manual_seed(0)).double()
    maps = solve(planted(W, 4000, 0.1))
    close(maps.W[0, 0], W.float(), 0.01)
    assert (maps.b[0, 0] - 5).abs().max() < 0.05 and maps.r2.item() > 0.99


def test_a_planted_rank_is_found():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(40, 8, generator=g).double() @ torch.randn(8, 30, generator=g).double()
    low, full = (solve(planted(W, 2000, 8.0), method) for method in ("lowrank", "ridge"))
    rank = lambda maps: int(torch.linalg.matrix_rank(maps.W[0, 0], rtol=1e-4))
    lost = lambda maps: float((maps.W[0, 0] - W).norm() / W.norm())
    assert (rank(low), rank(full)) == (8, 30) and lost(low) < 0.8 * lost(full)


def test_pure_noise_is_not_significant():
    g = torch.Generator().manual_seed(0)
    p = []
    for _ in range(20):
        m = Moments.zeros(3, 2, 10, 2, 8, source_layers=(0, 1), target_layers=(0, 1))
        X, Y = torch.randn(400, 2, 10, generator=g), torch.randn(400, 2, 8, generator=g)
        m.add(X[:300], Y[:300], torch.arange(300) % 3)
        m.held_x, m.held_y, m.held_of = X[300:], Y[300:], torch.arange(100)
        p.append(solve(m).p_value)
    assert sum(x <= 0.05 for x in p) <= 4 and np.mean(p) > 0.25


ODD = (
    "cafe\u0301 noir, nai\u0308ve",
    "s\u0323\u0307 and \u1112\u1161\u11ab\u1100\u1173\u11af ok",
    "A \U0001f600\U0001f389 party \U0001f469\u200d\U0001f467 ok",
    "שלום مرحبا ok",
    "Two  spaces, \ufb01ne",
)


def unigram(prefix, normalizer=None):
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer, t.decoder = (k.Metaspace(prepend_scheme=prefix) for k in (pre_tokenizers, decoders))
    if normalizer:
        t.normalizer = normalizer
    letters = sorted({c for x in ODD for f in ("NFC", "NFKC", "NFD") for c in unicodedata.normalize(f, x)})
    t.train_from_iterator(
        SCENES.texts[:200],
        trainers.UnigramTrainer(
            vocab_size=600,
            special_tokens=["<unk>"],
            unk_token="<unk>",
            initial_alphabet=letters,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=t, unk_token="<unk>")


def test_both_sides_of_a_pair_have_read_the_same_characters():
    composing = copy.deepcopy(tiny_tokenizer("byte"))
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizers = [
        tiny_tokenizer("byte"),
        tiny_tokenizer("sentencepiece"),
        composing,
        unigram("never"),
        unigram("never", normalizers.NFC()),
        unigram("always", normalizers.NFKC()),
    ]
    sides = [wrap(tiny_model("llama", vocab_size=800)._module, t) for t in tokenizers]
    found = 0
    for one, two in itertools.combinations(sides, 2):
        (ids1, at1), (ids2, at2) = mo._paired(one, two, ODD)
        read = lambda m, ids: unicodedata.normalize(
            "NFKC", m.tokenizer.decode(ids).removeprefix("<s>")
        ).strip()
        for x, y, i, j in ((x, y, i, j) for x, y, a, b in zip(ids1, ids2, at1, at2) for i, j in zip(a, b)):
            assert read(one, x[: i + 1]) == read(two, y[: j + 1])
            found += 1
        assert all(at1)
    assert found > 15 * 20
