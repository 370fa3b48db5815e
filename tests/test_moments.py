"""Pairs of rows and the sums over them: properties that hold whatever the data."""

import copy
import importlib
import itertools
import json
import unicodedata
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from concept_transfer import moments
from concept_transfer.artefacts import load_artefact
from concept_transfer.data import Corpus, load_pairs, text_key, texts_hash
from concept_transfer.engine import Chunk
from concept_transfer.maps import fit_maps, solve
from concept_transfer.models import model_info, tiny_model, wrap
from concept_transfer.moments import Moments, Rows, chosen, collect, needed, robust_weight
from concept_transfer.pairing import (
    last_token,
    paired_states,
    paired_tokens,
    shared_boundaries,
    spread_layers,
)
from concept_transfer.toys import tiny_tokenizer

SCENES = Corpus("scenes", [t for e in ("happiness", "anger") for t in load_pairs(f"emotions/{e}").texts])
SUMS = ("n", "x", "y", "xx", "xy", "yy", "squares")


@pytest.fixture(scope="module")
def pair():
    return tiny_model("llama"), tiny_model("gpt2")


def rows(n, d1=12, d2=9, seed=0, noise=0.1):
    "Source and target rows, (n, 2, d1) and (n, 2, d2), of a known linear map."
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 2, d1, generator=g, dtype=torch.float64) * torch.logspace(-1, 1, d1) + 3
    W = torch.randn(2, d1, d2, generator=g).double()
    return X, torch.einsum("rlc,lcd->rld", X, W) + noise * torch.randn(n, 2, d2, generator=g) + 5


def summed(X, Y, folds=4, weight=None, products=True):
    m = Moments.zeros(folds, *X.shape[1:], *Y.shape[1:], products=products)
    m.add(X, Y, torch.arange(len(X)) % folds, weight)
    return m


def oracle(X, Y, fold, K, weight):
    "All rows kept, the sums written down."
    own = torch.nn.functional.one_hot(fold, K).double() * weight[:, None]
    A, B = X - X.mean(0), Y - Y.mean(0)
    return dict(
        n=own.sum(0),
        x=torch.einsum("rk,rla->kla", own, A),
        y=torch.einsum("rk,rmb->kmb", own, B),
        xx=torch.einsum("rk,rla,rlc->klac", own, A, A),
        xy=torch.einsum("rk,rla,rmb->klamb", own, A, B),
        yy=torch.einsum("rk,rmb,rmc->kmbc", own, B, B),
        squares=torch.einsum("rk,rmb->kmb", own, B**2),
    )


def close(a, b, tol):
    off = float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
    assert off <= tol, off


def covariances(m):
    "Centred products over all folds: what does not depend on the shift."
    n, x, y = m.n.sum(), m.x.sum(0), m.y.sum(0)
    xx = m.xx.sum(0) / n - torch.einsum("la,lb->lab", x, x) / n**2
    xy = m.xy.sum(0) / n - torch.einsum("la,mb->lamb", x, y) / n**2
    return xx, xy, m.squares.sum(0) / n - (y / n) ** 2


def alike(one, two, tol):
    for a, b in zip(covariances(one), covariances(two), strict=True):
        close(a, b, tol)


def test_the_sums_are_those_of_the_oracle():
    X, Y = rows(300)
    weight, fold = torch.rand(300, generator=torch.Generator().manual_seed(1)).double(), torch.arange(300) % 4
    for products in (True, False):
        m = summed(X, Y, weight=weight, products=products)
        for k, want in oracle(X, Y, fold, 4, weight).items():
            if k != "yy" or products:
                close(getattr(m, k), want, 1e-12)
        assert m.products == (m.yy.ndim == 4) == products


def test_the_shuffled_control_pairs_one_row_in_ten_with_another():
    X, Y = rows(300)
    m = summed(X, Y, folds=1)
    A, B = (X - X.mean(0))[::10], (Y - Y.mean(0))[::10].roll(15, 0)
    assert m.n_shuffled == 30
    close(m.shuffled, torch.einsum("rla,rmb->lamb", A, B).float(), 1e-5)
    few = summed(X[:1], Y[:1], folds=1)
    assert few.n == 1 and few.n_shuffled == 0 and not few.shuffled.any()


def test_float32_rows_far_from_zero_keep_their_variance():
    X, Y = rows(4000, noise=1)
    far = Moments.zeros(1, 2, 12, 2, 9)
    for i in torch.arange(4000).split(500):
        far.add((X + 1000).float()[i], (Y - 1000).float()[i])
    alike(far, summed(X, Y, folds=1), 1e-3)


def test_order_of_rows_and_size_of_batches_do_not_matter():
    X, Y = rows(300)
    fold, order = torch.arange(300) % 4, torch.randperm(300, generator=torch.Generator().manual_seed(1))
    other = Moments.zeros(4, 2, 12, 2, 9)
    for i in order.split(37):
        other.add(X[i], Y[i], fold[i])
    alike(other, summed(X, Y), 1e-9)


def test_merge_equals_the_whole():
    X, Y = rows(300)
    fold, whole = torch.arange(300) % 4, Moments.zeros(4, 2, 12, 2, 9)
    parts = [Moments.zeros(4, 2, 12, 2, 9) for _ in range(2)]
    for m, i in zip(parts, (slice(0, 90), slice(90, None)), strict=True):
        m.add(X[i], Y[i], fold[i])
        whole.add(X[i], Y[i], fold[i])
    both = parts[0] + parts[1]
    for k in SUMS:
        close(getattr(both, k), getattr(whole, k), 1e-10)
    close(both.n_shuffled, whole.n_shuffled, 0)
    nothing = Moments.zeros(4, 2, 12, 2, 9)
    for k in SUMS:
        assert torch.equal(getattr(nothing + summed(X, Y), k), getattr(summed(X, Y), k))


def test_a_sum_leaves_its_parts_as_they_were():
    X, Y = rows(300)
    fold, parts = torch.arange(300) % 4, (slice(0, 90), slice(90, 180), slice(180, None))

    def moments_of(*some):
        m = Moments.zeros(4, 2, 12, 2, 9, settings={"held_out": 0.1})
        for i in some:
            m.add(X[i], Y[i], fold[i])
        m.held_x, m.held_y = (Z[some[0]][:5].float() for Z in (X, Y))
        m.held_of = torch.arange(5)
        m.seen = {i.start for i in some}
        return m

    one, two, both = (moments_of(i) for i in parts)
    before = [copy.deepcopy(m) for m in (one, two, both)]
    for first in (one, two):  # the same one stands on the right twice
        total = first + both
        want = moments_of(parts[0] if first is one else parts[1], parts[2])
        for k in (*SUMS, "shift_x", "shift_y"):
            close(getattr(total, k), getattr(want, k), 1e-10)
        assert total.seen == want.seen and len(total.held_x) == len(total.held_of) == 10
    for m, was in zip((one, two, both), before, strict=True):
        assert m.seen == was.seen and all(torch.equal(v, m.tensors()[k]) for k, v in was.tensors().items())


def about(shift_x, shift_y, m):
    "The same sums about another shift."
    nothing = Moments.zeros(*m.shape, products=m.products)
    nothing.shift_x, nothing.shift_y = shift_x, shift_y
    return nothing + m


def test_another_shift_changes_no_covariance():
    X, Y = rows(300)
    for products in (True, False):
        m, moved = (summed(X, Y, products=products) for _ in range(2))
        moved = about(m.shift_x + 1, m.shift_y - 2, moved)
        alike(moved, m, 1e-9)
        want = oracle(X, Y, torch.arange(300) % 4, 4, torch.ones(300).double())
        moved = about(X.mean(0), Y.mean(0), moved)
        for k in SUMS if products else SUMS[:5]:
            close(getattr(moved, k), want[k], 1e-9)


def test_weights_are_repetitions():
    X, Y = rows(60)
    w = torch.arange(60) % 3
    weighted, repeated = Moments.zeros(1, 2, 12, 2, 9), Moments.zeros(1, 2, 12, 2, 9)
    weighted.add(X, Y, weight=w.double())
    repeated.add(X.repeat_interleave(w, 0), Y.repeat_interleave(w, 0))
    alike(weighted, repeated, 1e-9)


def test_far_rows_weigh_less():
    X, Y = rows(100)
    X[7] += 1000
    assert robust_weight(X, Y)[7] < 0.25 and (robust_weight(X, Y) == 1).sum() > 80


def test_a_text_keeps_its_fold_on_every_machine():
    m = Moments.zeros(5, 1, 2, 1, 2, settings={"held_out": 0.1})
    assert [m.fold(t) for t in ("The kettle sang.", "Nobody came.", "Rain.", "text 30")] == [3, 0, 2, -1]
    dealt = [m.fold(f"text {i}") for i in range(2000)]
    assert 150 < dealt.count(-1) < 250 and all(300 < dealt.count(k) < 420 for k in range(5))
    one = Moments.zeros(1, 1, 2, 1, 2, settings={"held_out": 0.0})
    assert [one.fold(f"text {i}") for i in range(50)] == [0] * 50


def test_what_a_server_sums_is_what_is_summed_here():
    X, Y = (Z.float() for Z in rows(400))
    texts, of = [f"text {i}" for i in range(40)], torch.arange(400) // 10
    here, there = (Moments.zeros(4, 2, 12, 2, 9, settings={"held_out": 0.2}) for _ in range(2))
    fold = torch.tensor([here.fold(t) for t in texts])[of]
    held, fit = torch.nonzero(fold < 0)[:30, 0], fold >= 0
    chunk = Chunk(texts, X, of, fold, held, [], [], robust_weight)
    assert here.take(chunk, Y) == 40
    folds, w = [0, 1, 2, 3], robust_weight(X[fit], Y[fit])
    tally = there.tally(folds)("cpu")
    tally.add(X[fit].double(), Y[fit].double(), fold[fit], w.double())
    there.merge(tally.tensors(), folds)
    assert there.keep(chunk, Y[held], w) == 40 and here.seen == there.seen
    for k in (*SUMS, "shuffled", "n_shuffled", "shift_x", "shift_y"):
        close(getattr(here, k), getattr(there, k), 1e-4)
    for k in ("held_x", "held_y", "held_of"):
        assert torch.equal(getattr(here, k), getattr(there, k))
    again = there.tally([1])("cpu")  # a later request, of one fold, about the shift of the first
    again.add(X[fit][:50].double(), Y[fit][:50].double(), torch.zeros(50).long(), torch.ones(50).double())
    before, shift, elsewhere = there.n.clone(), there.shift_x, copy.deepcopy(there)
    there.merge(again.tensors(), [1])
    assert (there.n - before).tolist() == [0, 50, 0, 0] and torch.equal(there.shift_x, shift)
    other = Moments.zeros(4, 2, 12, 2, 9).tally([1])("cpu")  # the same request about a shift of its own
    other.add(X[fit][:50].double(), Y[fit][:50].double(), torch.zeros(50).long(), torch.ones(50).double())
    elsewhere.merge(other.tensors(), [1])
    assert not torch.equal(elsewhere.shift_x, shift)
    for a, b in zip(covariances(elsewhere)[1:], covariances(there)[1:], strict=True):
        close(a, b, 1e-9)


def test_rows_that_are_not_finite_are_refused_and_the_text_is_named():
    X, Y = rows(10)
    X[3, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        summed(X, Y)
    a, b, broken = tiny_model("llama"), tiny_model("gpt2"), tiny_model("llama")
    bad = "The kettle sang in the empty kitchen."
    model_info(broken)  # its weights are looked at while they are whole
    broken._module.model.embed_tokens.weight.data[a.tokenizer(bad).input_ids[-3]] = torch.nan
    for two in ((broken, b), (b, broken)):
        with pytest.raises(ValueError, match="not finite") as e:
            collect(*two, Corpus("c", [bad]), [1], [1])
        assert "kettle" in str(e.value)


@pytest.mark.slow
def test_an_interrupted_reading_goes_on_where_it_stopped(tmp_path, monkeypatch, pair):
    whole, real, calls = collect(*pair, SCENES, [1], [2]), moments.paired_tokens, []

    def dies(*args, **kw):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kw)

    here = importlib.import_module("concept_transfer.engine")
    monkeypatch.setattr(here, "CHUNK", 6000)
    monkeypatch.setattr(here.Local, "tokens", 1500)
    monkeypatch.setattr(here.engine(pair[0]), "tokens", 1500)
    monkeypatch.setattr(here.engine(pair[1]), "tokens", 1500)
    monkeypatch.setattr(moments, "paired_tokens", dies)
    with pytest.raises(KeyboardInterrupt):
        collect(*pair, SCENES, [1], [2], path=tmp_path / "m", every=0)
    kept = Moments.load(tmp_path / "m")
    assert 20 < len(kept.seen) < 100
    again = collect(*pair, SCENES, [1], [2], path=tmp_path / "m", every=0)
    assert again.seen == whole.seen and torch.equal(again.n, whole.n) and len(calls) < 14
    assert not (tmp_path / "m.jobs").exists()
    alike(again, whole, 1e-4)
    monkeypatch.setattr(moments, "paired_tokens", None)  # all is there: nothing is read again
    assert torch.equal(collect(*pair, SCENES, [1], [2], path=tmp_path / "m").xy, again.xy)


@pytest.mark.slow
def test_two_machines_with_half_of_the_texts_each(pair):
    whole, texts = collect(*pair, SCENES, [1], [2]), list(dict.fromkeys(SCENES.texts))
    n = len(texts) // 2
    one, two = (collect(*pair, Corpus("half", part), [1], [2]) for part in (texts[:n], texts[n:]))
    with pytest.raises(ValueError, match="in both moments and would count twice"):
        whole + one
    both = one + two
    assert torch.equal(both.n, whole.n) and both.seen == whole.seen and both.kind == whole.kind
    assert both.texts_hash == whole.texts_hash == texts_hash(map(text_key, texts))
    assert len(both.held_x) == len(both.held_of) == len(whole.held_x)
    alike(both, whole, 1e-4)


@pytest.mark.parametrize(
    "other",
    [
        {"thin": last_token},
        {"weight": robust_weight},
        {"held_out": 0.2},
        {"folds": 4},
        {"template": "Story: {}"},
        "bfloat16",
    ],
)
@pytest.mark.slow
def test_moments_read_in_another_way_are_not_mixed(tmp_path, other, pair):
    a, b = pair
    first, second = SCENES.take(60), SCENES.take(120)
    m = collect(a, b, first, [1], [2], path=tmp_path / "m")
    half = wrap(copy.deepcopy(b._module).bfloat16(), b.tokenizer, model_info(b).name)
    target, options = (half, {}) if other == "bfloat16" else (b, other)
    name = "precision" if other == "bfloat16" else next(iter(other))
    with pytest.raises(ValueError, match=f"moments of another {name}"):
        collect(a, target, second, [1], [2], path=tmp_path / "m", **options)
    with pytest.raises(ValueError, match="collect both in the same way"):
        m + collect(a, target, Corpus("rest", SCENES.texts[60:120]), [1], [2], **options)
    assert Moments.load(tmp_path / "m").seen == m.seen
    assert len(collect(a, b, second, [1], [2], path=tmp_path / "m").seen) == 120


def test_moments_without_products_are_told_from_those_with(tmp_path, pair):
    few = SCENES.take(60)
    slim, full = (collect(*pair, few, [1], [2], products=p) for p in (False, None))
    assert slim.yy.ndim == 3 and full.yy.ndim == 4 and torch.equal(slim.xy, full.xy)
    close(slim.squares, full.squares, 1e-5)
    slim.save(tmp_path / "m")
    assert torch.equal(Moments.load(tmp_path / "m").yy, slim.yy)
    with pytest.raises(ValueError, match="another choice of products"):
        collect(*pair, few, [1], [2], path=tmp_path / "m")
    with pytest.raises(ValueError, match="products=True"):
        slim.reversed()


def test_the_same_sums_serve_the_way_back(pair):
    (a, b), few = pair, SCENES.take(200)
    back, direct = collect(a, b, few, [1], [2, 0]).reversed(), collect(b, a, few, [2, 0], [1])
    assert back.kind == direct.kind and back.seen == direct.seen and torch.equal(back.n, direct.n)
    alike(back, direct, 1e-4)
    assert torch.allclose(back.held_x, direct.held_x, atol=1e-5)
    for k in SUMS:
        assert torch.equal(getattr(back.reversed().reversed(), k), getattr(back, k))


def test_moments_survive_their_file(tmp_path, pair):
    m = collect(
        *pair, SCENES.take(60), [1, 2], [2], thin=last_token, weight=robust_weight, folds=3, held_out=0.2
    )
    m.save(tmp_path / "m")
    again = Moments.load(tmp_path / "m")
    assert again.kind == m.kind and again.seen == m.seen and repr(again) == repr(m)
    assert all(
        torch.equal(getattr(again, k), v) and getattr(again, k).dtype == v.dtype
        for k, v in m.tensors().items()
    )
    said = dict(
        thin="last_token", weight="robust_weight", folds=3, held_out=0.2, precision=["float32", "float32"]
    ) | {"most_rows": 2048}
    assert again.settings == load_artefact(tmp_path / "m")[1]["settings"] == said
    assert "3 folds" in repr(m) and all(
        words in m._repr_html_() for words in (m.texts_hash, m.source.name, "MB")
    )


@pytest.mark.parametrize("squares", [False, True])
def test_a_file_of_the_first_format_is_read(tmp_path, pair, squares):
    m = collect(*pair, SCENES.take(60), [1], [2])
    m.save(tmp_path / "new")
    tensors, head = load_artefact(tmp_path / "new")
    for new, old in (("shuffled", "null"), ("n_shuffled", "n_null")):
        tensors[old] = tensors.pop(new)
    if squares:  # as a server gave them
        tensors["yy"] = m.squares
    head["format"], head["settings"]["positions"] = 1, head["settings"]["thin"]
    settings = {k: head["settings"][k] for k in ("positions", "weight", "folds", "held_out", "precision")}
    words = {"concept_transfer": json.dumps(head | dict(settings=settings))}
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "old", words)
    with pytest.warns(UserWarning, match="older format 1"):
        old = Moments.load(tmp_path / "old")
    assert old.settings | {"most_rows": 2048} == m.settings and old.products != squares and old.seen == m.seen
    for k, v in m.tensors().items():
        if k != "yy" or not squares:
            assert torch.allclose(getattr(old, k), v, rtol=1e-5)
    if not squares:
        with pytest.warns(UserWarning, match="older format 1"):
            assert len(collect(*pair, SCENES.take(80), [1], [2], path=tmp_path / "old").seen) == 80
        assert load_artefact(tmp_path / "old")[1]["format"] == 2


def test_too_little_text_says_what_to_do(pair):
    with pytest.raises(ValueError, match="3 texts are too few for 5 folds .* better hundreds"):
        collect(*pair, SCENES.take(3), [1], [2])


@pytest.mark.slow
def test_thinning_and_weights_reach_the_sums(pair):
    few = SCENES.take(120)
    ways = {}, {"thin": last_token}, {"weight": lambda X, Y: torch.full((len(X),), 0.5)}
    full, last, soft = (collect(*pair, few, [1], [2], **how).n.sum() for how in ways)
    assert last < len(few) and soft == full / 2
    m = collect(*pair, few, [1], [2], most_rows=100)
    assert len(m.held_x) == 100 and m.n.sum() == full


def test_texts_are_read_inside_the_template(pair, monkeypatch):
    few, read, real = SCENES.take(60), [], moments.paired_tokens

    def heard(source, target, texts, thin):
        read.extend(texts)
        return real(source, target, texts, thin)

    monkeypatch.setattr(moments, "paired_tokens", heard)
    plain, inside = (collect(*pair, few, [1], [2], template=t) for t in ("{}", "Story: {}!"))
    texts = list(dict.fromkeys(few.texts))
    assert read == [*texts, *(f"Story: {t}!" for t in texts)]
    assert inside.seen == plain.seen and inside.n.sum() > plain.n.sum()


def test_default_layers_lie_from_a_third_of_the_depth_on():
    assert spread_layers(tiny_model("llama", num_hidden_layers=30)) == [10, 13, 15, 18, 20, 23, 25, 28]
    assert spread_layers(tiny_model("llama", num_hidden_layers=1)) == [0]


def test_texts_longer_than_the_context_keep_their_beginning(pair):
    start = SCENES.texts[0]
    long = start + " and then it rained" * 60
    (X, Y, _), (LX, LY, of) = (paired_states(*pair, [t], [1], [2]) for t in (start, long))
    n = len(X) - 2
    assert len(LX) > n and not of.any() and torch.isfinite(LX).all() and len(LX) < 128
    assert torch.allclose(LX[:n], X[:n], atol=1e-4) and torch.allclose(LY[:n], Y[:n], atol=1e-4)


def test_a_text_without_tokens_is_named(pair):
    with pytest.raises(ValueError, match="text 0 is empty"):  # of the llama only its start token is left
        paired_states(pair[1], pair[0], ["", "fine"], [1], [1], last_token)
    with pytest.raises(ValueError, match="text 1 is empty"):
        paired_states(*pair, ["fine", ""], [1], [1])


@pytest.mark.parametrize("text", ["😀🎉 ok", "مرحبا بالعالم", "naïve café", "a\tb\n\nc", "  two  spaces  "])
def test_shared_boundaries_mean_the_same_characters(text):
    one, two = (
        tiny_tokenizer(k)(text, return_offsets_mapping=True).offset_mapping for k in ("byte", "sentencepiece")
    )
    for i, j in shared_boundaries(one, two):
        assert one[i][1] == two[j][1]


ODD = (
    "cafe\u0301 noir, nai\u0308ve",
    "s\u0323\u0307 and \u1112\u1161\u11ab\u1100\u1173\u11af ok",
    "A \U0001f600\U0001f389 party \U0001f469\u200d\U0001f467 ok",
    "שלום مرحبا ok",
    "Two  spaces, \ufb01ne",
)


def unigram(prefix, normalizer=None):
    "A sentencepiece-like tokenizer that knows every letter of the odd texts."
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer, t.decoder = (k.Metaspace(prepend_scheme=prefix) for k in (pre_tokenizers, decoders))
    if normalizer:
        t.normalizer = normalizer
    letters = sorted({c for x in ODD for f in ("NFC", "NFKC", "NFD") for c in unicodedata.normalize(f, x)})
    how = dict(special_tokens=["<unk>"], unk_token="<unk>", initial_alphabet=letters, show_progress=False)
    t.train_from_iterator(SCENES.texts[:200], trainers.UnigramTrainer(vocab_size=600, **how))
    return PreTrainedTokenizerFast(tokenizer_object=t, unk_token="<unk>")


@pytest.mark.slow
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
    sides, found = [wrap(tiny_model("llama", vocab_size=800)._module, t) for t in tokenizers], 0

    def read(model, ids):
        return unicodedata.normalize("NFKC", model.tokenizer.decode(ids).removeprefix("<s>")).strip()

    for one, two in itertools.combinations(sides, 2):
        (ids1, at1), (ids2, at2) = paired_tokens(one, two, ODD)
        for x, y, here, there in zip(ids1, ids2, at1, at2, strict=True):
            assert here
            for i, j in zip(here, there, strict=True):
                assert read(one, x[: i + 1]) == read(two, y[: j + 1])
                found += 1
    assert found > 15 * 20


def test_a_tokenizer_without_offsets_is_refused(pair):
    slow = copy.copy(pair[0].tokenizer)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(slow), "is_fast", False)
        with pytest.raises(ValueError, match="gives no character offsets; pass a fast one to load_model"):
            paired_tokens(*pair, ["fine"])


def only(texts):
    return Corpus("some", texts)


FEW, MORE = SCENES.texts[:60], SCENES.texts[60:120]


@pytest.mark.parametrize("texts", [MORE, FEW[:50], FEW[1:] + MORE])
@pytest.mark.parametrize("run", [collect, fit_maps])
@pytest.mark.slow
def test_36_sums_of_texts_that_are_not_in_the_corpus_are_refused(tmp_path, pair, run, texts):
    run(*pair, only(FEW), [1], [2], path=tmp_path / "m")
    kept = (tmp_path / "m").read_bytes()
    with pytest.raises(ValueError, match=r"m holds moments of another corpus\. Give another path"):
        run(*pair, only(texts), [1], [2], path=tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == kept


def test_36_the_same_and_a_longer_corpus_go_on(tmp_path, pair):
    first = collect(*pair, only(FEW), [1], [2], path=tmp_path / "m")
    assert torch.equal(collect(*pair, only(FEW[::-1]), [1], [2], path=tmp_path / "m").xy, first.xy)
    assert len(collect(*pair, only(FEW + MORE), [1], [2], path=tmp_path / "m").seen) == 120


def weighed(by):
    return lambda X, Y: X.new_full((len(X),), by)


@pytest.mark.parametrize("other", [weighed(0.5), partial(robust_weight), robust_weight, None])
@pytest.mark.slow
def test_37_a_weight_is_known_by_what_it_does(tmp_path, pair, other):
    how = dict(source_layers=[1], target_layers=[2], path=tmp_path / "m")
    m = collect(*pair, only(FEW), weight=weighed(1.0), **how)
    same = collect(*pair, only(FEW + MORE), weight=weighed(1.0), **how)
    assert same.kind == m.kind and len(same.seen) == 120
    with pytest.raises(ValueError, match="moments of another weight"):
        collect(*pair, only(FEW + MORE), weight=other, **how)
    with pytest.raises(ValueError, match="collect both in the same way"):
        m + collect(*pair, only(MORE), [1], [2], weight=weighed(0.5))


def test_37_thinning_and_the_number_of_judging_rows_are_known_too(tmp_path, pair):
    how = dict(source_layers=[1], target_layers=[2], path=tmp_path / "m")
    collect(*pair, only(FEW), thin=lambda pairs, n1, n2: pairs[::2], **how)
    with pytest.raises(ValueError, match="moments of another thin"):
        collect(*pair, only(FEW), thin=lambda pairs, n1, n2: pairs[::3], **how)
    how["path"] = tmp_path / "rows"
    collect(*pair, only(FEW), most_rows=20, **how)
    with pytest.raises(ValueError, match="moments of another most_rows"):
        collect(*pair, only(FEW), **how)


def test_37_a_function_that_cannot_be_told_from_others_is_refused(pair):
    with pytest.raises(ValueError, match="cannot be told"):
        collect(*pair, only(FEW), [1], [2], weight=partial(min, Lock()))


WRONG = {
    "folds": (0, -1, 2.5, 1, True, "5"),
    "held_out": (0.0, 1.0, -0.1, float("nan"), "0.1"),
    "most_rows": (0, 1, 2.5),
    "template": ("no place", 3),
    "thin": ("last_token",),
    "weight": (0.5,),
    "source_layers": ([], "12", [1.5], [9], 1),
    "target_layers": ([], "12", [1.5], [-9]),
    "every": (float("nan"),),
    "corpus": (FEW, "general", Path("corpus.txt")),
    "source": ("llama",),
    "target": ("gpt2", None),
}


@pytest.mark.parametrize(("name", "wrong"), [(k, v) for k, some in WRONG.items() for v in some])
def test_107_what_is_wrong_is_said_before_anything_is_read(pair, monkeypatch, name, wrong):
    monkeypatch.setattr(moments, "paired_tokens", None)
    given = dict(source=pair[0], target=pair[1], corpus=only(FEW), source_layers=[1], target_layers=[2])
    with pytest.raises(ValueError, match=name if "layers" not in name else "layer"):
        collect(**given | {name: wrong})


def test_f1_layers_from_numpy(pair):
    m = collect(*pair, only(FEW), np.arange(2), range(1, 3), most_rows=np.int64(30))
    assert m.source_layers == (0, 1) and m.target_layers == (1, 2)


@pytest.mark.parametrize("weight", [torch.nan, torch.inf, -1.0])
def test_14_weights_that_are_none_are_refused(pair, weight):
    X, Y = rows(10)
    with pytest.raises(ValueError, match="weights must be finite and not negative"):
        summed(X, Y, weight=torch.full((10,), weight).double())
    for wrong in (lambda X, Y: X.new_full((len(X),), weight), lambda X, Y: X.new_ones(3)):
        with pytest.raises(ValueError, match="weights must be finite and not negative"):
            collect(*pair, only(FEW), [1], [2], weight=wrong)


def test_46_a_link_to_a_file_that_is_not_there_yet_stays(tmp_path, pair):
    link, there = tmp_path / "m", tmp_path / "elsewhere"
    link.symlink_to(there)
    collect(*pair, SCENES, [1], [2], path=link)
    assert link.is_symlink() and there.stat().st_size


def test_14_sums_beyond_all_numbers_are_refused(tmp_path, pair):
    with pytest.raises(ValueError, match="not finite"):
        collect(*pair, only(FEW), [1], [2], weight=lambda X, Y: X.new_full((len(X),), 3e38))
    m = collect(*pair, only(FEW), [1], [2])
    for name in ("xx", "n", "held_y", "shift_x"):
        with pytest.raises(ValueError, match=f"'{name}'.*not finite"):
            replace(m, **{name: getattr(m, name) * torch.nan})


def test_held_out_texts_that_resemble_others_are_told(pair, recwarn):
    collect(*pair, only(FEW), [1], [2])
    assert not recwarn
    with pytest.warns(UserWarning, match="held-out texts are nearly the same as others, such as"):
        collect(*pair, only([*FEW, *(f"{t} Truly." for t in FEW)]), [1], [2])


def test_106_a_place_where_nothing_can_be_kept_is_said_before_anything_is_read(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(moments, "paired_tokens", None)
    (tmp_path / "notes.txt").write_text("dear notes")
    for name in ("", "nowhere/m", "notes.txt"):
        with pytest.raises((OSError, ValueError), match=str(tmp_path / name)):
            collect(*pair, only(FEW), [1], [2], path=tmp_path / name)
    assert (tmp_path / "notes.txt").read_text() == "dear notes" and not (tmp_path / "m").exists()


def test_14_folds_that_are_none_are_refused():
    X, Y = rows(10)
    m = Moments.zeros(4, 2, 12, 2, 9)
    for fold in (-1, torch.arange(10) - 1):
        with pytest.raises(ValueError, match="folds from 0 on"):
            m.add(X, Y, fold)
    assert not m.n.any()


# rows in the place of sums


def kept(X, Y, folds=4, weight=None, cls=Rows):
    "In two chunks, as rows or as sums."
    m = cls.zeros(folds, *X.shape[1:], *Y.shape[1:], settings={"held_out": 0.1})
    for i in (slice(0, 170), slice(170, None)):
        m.add(X[i], Y[i], (torch.arange(len(X)) % folds)[i], None if weight is None else weight[i])
    m.held_x, m.held_y, m.held_of = X[:40].float(), Y[:40].float(), torch.arange(40)
    return m


def same_sums(one, two, tol):
    for k in (*SUMS, "shuffled", "n_shuffled", "shift_x", "shift_y", "held_x"):
        close(getattr(one, k), getattr(two, k), tol)


def test_rows_sum_up_to_the_moments():
    X, Y = rows(300)
    weight = torch.rand(300, generator=torch.Generator().manual_seed(1)).double()
    weight[::7] = 0
    for w in (None, weight):
        same_sums(kept(X, Y, weight=w).summed(), kept(X, Y, weight=w, cls=Moments), 1e-5)
    m = Rows.zeros(4, 2, 12, 2, 9, products=False)
    m.add(X, Y)
    assert m.summed().yy.ndim == 3


def test_rows_are_added_turned_and_kept_in_a_file(tmp_path):
    X, Y = rows(300)
    one, two = kept(X[:200], Y[:200]), kept(X[200:], Y[200:])
    one.seen, two.seen = {1, 2}, {3}
    before = copy.deepcopy(vars(one.summed()))
    both, mixed = one + two, one + two.summed()
    for m in (both.summed(), mixed):
        alike(m, one.summed() + two.summed(), 1e-5)
    assert torch.equal(both.shift_x, one.shift_x) and both.n_shuffled == one.n_shuffled + two.n_shuffled
    assert both.seen == {1, 2, 3} and len(both.X) == 300 and len(both.held_x) == 80
    assert len(one.X) == 200 and torch.equal(one.summed().xy, before["xy"]) and one.seen == {1, 2}
    with pytest.raises(ValueError, match="would count twice"):
        one + one
    alike(one.reversed().summed(), one.summed().reversed(), 1e-6)
    one.save(tmp_path / "m")
    again = Rows.load(tmp_path / "m")
    assert repr(again) == repr(one) and again.kind == one.kind and "Rows" in again._repr_html_()
    for k, v in vars(one).items():
        assert not isinstance(v, torch.Tensor) or torch.equal(getattr(again, k), v), k
    again.add(X[:9], Y[:9])
    assert len(again.X) == 209 and torch.equal(again.X[:200], one.X)
    with pytest.raises(ValueError, match="holds kind 'rows', where 'moments' is needed"):
        Moments.load(tmp_path / "m")
    with pytest.raises(ValueError, match="'far': holds numbers that are not from 0 to 199"):
        replace(one, far=one.far + 200)


def test_rows_that_are_wrong_are_refused():
    X, Y = rows(10)
    for fold, weight in ((-1, None), (0, -torch.ones(10)), (0, torch.full((10,), torch.nan))):
        with pytest.raises(ValueError, match="weights must be finite and not negative, folds from 0 on"):
            Rows.zeros(2, 2, 12, 2, 9).add(X, Y, fold, weight)
    with pytest.raises(ValueError, match="not finite"):
        Rows.zeros(2, 2, 12, 2, 9).add(X * torch.nan, Y)


def test_a_corpus_kept_as_rows_gives_the_same_maps_and_goes_on(tmp_path, pair, monkeypatch):
    few, more, how = only(FEW), only(FEW + MORE), dict(source_layers=[1], target_layers=[2])
    sums, all_sums = (collect(*pair, c, **how) for c in (few, more))
    monkeypatch.setattr(moments, "chosen", lambda *a: "rows")
    found = collect(*pair, few, **how, path=tmp_path / "m")
    assert isinstance(found, Rows) and isinstance(sums, Moments) and found.seen == sums.seen
    same_sums(found.summed(), sums, 1e-5)
    one, other = solve(found), solve(sums)
    assert torch.equal(one.lam, other.lam) and one.texts_hash == other.texts_hash
    for k in ("W", "b", "r2", "span", "rank", "p_value"):
        close(*(torch.as_tensor(getattr(grid, k)) for grid in (one, other)), 1e-4)
    close(one.shuffled.float(), other.shuffled.float(), 1e-2)  # bfloat16
    went_on = collect(*pair, more, **how, path=tmp_path / "m")
    assert isinstance(went_on, Rows)
    size = (tmp_path / "m").stat().st_size
    with monkeypatch.context() as little:
        little.setattr(moments, "virtual_memory", lambda: SimpleNamespace(available=size - 1))
        with pytest.raises(ValueError, match="going on from it needs that much memory; free are"):
            collect(*pair, more, **how, path=tmp_path / "m")
    alike(went_on.summed(), all_sums, 1e-4)
    collect(*pair, few, **how, path=tmp_path / "other")
    monkeypatch.setattr(moments, "chosen", lambda *a: "sums")  # of a longer corpus rows may be more than sums
    now_sums = collect(*pair, more, **how, path=tmp_path / "other")
    assert isinstance(now_sums, Moments)
    alike(now_sums, all_sums, 1e-4)
    assert isinstance(Moments.load(tmp_path / "other"), Moments)
    monkeypatch.setattr(moments, "chosen", lambda *a: "rows")  # and sums are never rows again
    assert isinstance(collect(*pair, more, **how, path=tmp_path / "other"), Moments)


def room(monkeypatch, memory, disk=1e15):
    monkeypatch.setattr(moments, "virtual_memory", lambda: SimpleNamespace(available=memory))
    monkeypatch.setattr(moments, "disk_usage", lambda folder: SimpleNamespace(free=disk))


def test_the_smaller_form_is_chosen_by_arithmetic(monkeypatch):
    shape = (5, 8, 4096, 8, 8192)
    need = needed(shape, 10_000, False)
    sums = 8 * 5 * (64 * 4096 * 8192 + 8 * 4096**2 + 8 * 8192 + 8 * (4096 + 8192)) + 8 * 64 * 4096 * 8192
    assert need["sums"] == sums and need["rows"] == 4 * 10_000 * 8 * (4096 + 8192)
    assert need["from rows"] == need["from sums"] > needed(shape, 1000, False)["from rows"]
    for memory, n, form in ((1e12, 10_000, "sums"), (1e12, 4000, "rows"), (80e9, 10_000, "rows")):
        room(monkeypatch, memory)
        assert chosen(shape, n, False) == form
    for memory, disk in ((10e9, 1e15), (80e9, 1e9)):
        room(monkeypatch, memory, disk)
        with pytest.raises(
            ValueError, match=r"8 x 8 layers .* need 15 GB .* and 3.93 GB of disk for about 10,000"
        ):
            chosen(shape, 10_000, False)


def test_what_is_kept_and_what_it_takes_is_said_before_the_work(pair, monkeypatch):
    said, real = [], moments.tqdm
    monkeypatch.setattr(moments, "tqdm", lambda *a, **k: said.append(k["desc"]) or real(*a, **k))
    for form in ("sums", "rows"):
        monkeypatch.setattr(moments, "chosen", lambda *a, form=form: form)
        collect(*pair, only(FEW), [1], [2])
    assert said[0] == "moments (sums, 0.0003 GB, then 0.0012 GB)"
    assert said[1].startswith("moments (rows, 0.000") and said[1].endswith(" GB, then 0.0012 GB)")


def test_what_does_not_fit_is_refused_before_anything_is_read(pair, monkeypatch, tmp_path):
    monkeypatch.setattr(moments, "paired_tokens", None)
    room(monkeypatch, 1000)
    for run in (collect, fit_maps):
        with pytest.raises(ValueError, match="free are 1e-06 GB of memory .* Give fewer source_layers"):
            run(*pair, only(FEW), [1], [2])


def test_options_of_reading_are_named(pair):
    with pytest.raises(TypeError, match="collect: no option 'lambdas'; use folds, held_out"):
        fit_maps(*pair, SCENES, [1], [2], lambdas=[1.0])
    with pytest.raises(ValueError, match="every"):
        collect(*pair, SCENES, [1], [2], every=-1)


@pytest.mark.parametrize("kind", [Moments, Rows])
def test_rows_that_do_not_fit_change_nothing(kind):
    X, Y = rows(10)
    m = kind.zeros(4, 2, 12, 2, 9)
    wrong = (X[:, 0], Y), (X, Y[:9]), (Y, X), (X[:, :1], Y), (X, Y, 4), (X, Y, torch.arange(10))
    for given in wrong:
        with pytest.raises(ValueError, match="do not fit"):
            m.add(*given)
    assert not m.n.any() and not m.x.any()


def test_moments_are_added_to_moments_alone():
    with pytest.raises(TypeError, match="unsupported operand"):
        Moments.zeros(2, 1, 3, 1, 3) + None
