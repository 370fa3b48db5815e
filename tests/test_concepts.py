"Reading and refining a concept, where it could go wrong."

import copy

import numpy as np
import pytest
import torch

from concept_transfer import engine
from concept_transfer.concepts import (
    POSITIONS,
    REDUCERS,
    Concept,
    Position,
    activations,
    extract_concept,
    position_rule,
)
from concept_transfer.data import ContrastPairs, Corpus, load_pairs
from concept_transfer.engine import encode
from concept_transfer.maps import fit_maps
from concept_transfer.models import model_info, tiny_model, wrap

SCENES = Corpus("scenes", [t for e in ("sadness", "fear") for t in load_pairs(f"emotions/{e}").texts])


def test_identical_sides_have_no_direction():
    same = ContrastPairs("same", ["It rained."] * 5, ["It rained."] * 5)
    with pytest.raises(ValueError, match="identical"):
        extract_concept(tiny_model("llama"), same)


def test_duplicate_pairs_keep_together_in_the_folds():
    groups = (["a"] * 6 + ["b"] * 6) * 2
    positive, negative = ["We hugged."] * 6 + ["We sang."] * 6, ["We left."] * 6 + ["We slept."] * 6
    twice = ContrastPairs("twice", positive, negative, groups)
    assert np.isfinite(extract_concept(tiny_model("llama"), twice).auc).all()


def test_one_scenario_gives_no_held_out_score():
    alone = extract_concept(tiny_model("llama"), ContrastPairs("one", ["We hugged."], ["We left."]))
    assert np.isnan(alone.auc).all() and alone.best == 0 and "nan" in repr(alone)


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.slow
def test_a_reducer_can_be_named_or_given(reducer):
    m, pairs = tiny_model("gpt2"), load_pairs("honesty")
    named, given = (
        extract_concept(m, pairs, reducer=reducer),
        extract_concept(m, pairs, reducer=REDUCERS[reducer]),
    )
    assert torch.equal(named.directions, given.directions) and named.reducer == given.reducer == reducer


def test_what_is_not_there_is_said():
    m, pairs = tiny_model("gpt2"), load_pairs("honesty")
    with pytest.raises(ValueError, match="reducer 'median': use mean_difference, pca, logistic"):
        extract_concept(m, pairs, reducer="median")
    with pytest.raises(ValueError, match="position 'first': use last, mean, all"):
        activations(m, ["fine"], position="first")
    with pytest.raises(ValueError, match="position 'mean': use last, all"):
        position_rule("mean", "write")
    with pytest.raises(ValueError, match="one state a text"):
        extract_concept(m, pairs, position="all")
    with pytest.raises(ValueError, match="cannot be kept"):
        activations(m, ["fine"], position=lambda h: h[0], path="nowhere")
    with pytest.raises(ValueError, match=r"has no layer 9; it has \[1, 2\]"):
        extract_concept(m, pairs, [1, 2])[9]


def test_a_position_of_ones_own_reads_like_any_other():
    m, texts = tiny_model("llama"), SCENES.texts[:6]
    everything = activations(m, texts, position="all")  # n of (t, L, d)
    for rule, want in {
        "second": (Position("second", read=lambda h: h[1]), [h[1] for h in everything]),
        "ends": (Position("ends", read=lambda h: h[[1, -1]].mean(0)), None),
        "function": (lambda h: h.amax(0), [h.amax(0) for h in everything]),
        "taken": (Position("taken", take=lambda h, mask: h[:, 0]), [h[0] for h in everything]),
    }.values():
        want = torch.stack(want or [(h[1] + h[-1]) / 2 for h in everything])
        assert torch.allclose(activations(m, texts, position=rule), want, atol=1e-5)


def test_a_position_that_is_added_to_the_table_has_a_name(monkeypatch, tmp_path):
    second = Position("second", "the second token", read=lambda h: h[1])
    monkeypatch.setitem(POSITIONS, "second", second)
    m, texts = tiny_model("llama"), SCENES.texts[:4]
    kept = activations(m, texts, position="second", path=tmp_path)
    assert torch.equal(kept, activations(m, texts, position=second, path=tmp_path))
    assert extract_concept(m, load_pairs("honesty"), position="second").position == "second"


def test_kept_states_are_those_of_a_precision(tmp_path):
    m, texts = tiny_model("llama"), SCENES.texts[:5]
    half = wrap(copy.deepcopy(m._module).bfloat16(), m.tokenizer)
    assert model_info(half).weights == model_info(m).weights
    kept = [activations(x, texts, path=tmp_path) for x in (m, half)]
    assert torch.equal(kept[1], activations(half, texts)) and not torch.equal(*kept)


def test_a_text_given_twice_loses_nothing_that_was_kept(tmp_path, monkeypatch):
    m = tiny_model("gpt2")
    a, b, c = [m.tokenizer.decode(x[:20]) for x in encode(m, SCENES.texts[:3])]
    texts = [a, b, a, c]
    whole = activations(m, texts, batch_tokens=40, path=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # both batches begin with the same text
    monkeypatch.setattr(engine.Local, "read", lambda *args: pytest.fail("read again"))
    assert torch.equal(activations(m, texts, path=tmp_path), whole)


def test_a_resumed_run_names_the_right_text(tmp_path):
    m, texts = tiny_model("llama"), ["Rain.", "A kettle sang in the kitchen.", "He slept.", "The zebra."]
    activations(m, texts[:3], path=tmp_path)
    m._module.model.embed_tokens.weight.data[m.tokenizer(texts[3]).input_ids[-2]] = torch.nan
    with pytest.raises(ValueError, match=r"text 3, .*zebra"):
        activations(m, texts, path=tmp_path)


def test_a_batch_of_one_and_one_token():
    assert activations(tiny_model("gpt2"), ["a"], position="mean").shape == (1, 4, 48)


def test_a_concept_survives_its_file(tmp_path):
    m = tiny_model("llama")
    for pairs in (load_pairs("emotions/happiness"), ContrastPairs("one", ["We hugged."], ["We left."])):
        made = extract_concept(m, pairs, [1, 3], "mean", "pca", seed=4)
        made.save(tmp_path / "c")
        again = Concept.load(tmp_path / "c")
        assert torch.equal(again.directions, made.directions) and np.array_equal(
            again.auc, made.auc, equal_nan=True
        )
        for k in (
            "name",
            "layers",
            "model",
            "n_pairs",
            "reducer",
            "position",
            "template",
            "texts_hash",
            "seed",
        ):
            assert getattr(again, k) == getattr(made, k)
        assert made.name in again._repr_html_()


def test_states_of_a_steered_model_are_not_kept(tmp_path):
    m = tiny_model("llama")
    with engine.engine(m).steer(1, lambda h: h + 1), pytest.raises(ValueError, match="leave path= away"):
        activations(m, SCENES.texts[:2], path=tmp_path / "kept")


# functions of yours


@pytest.mark.parametrize("rule", [lambda h: None, lambda h: "x", lambda h: h[9:].mean(0), lambda h: h / 0])
def test_a_position_gives_finite_numbers(rule):
    with pytest.raises(ValueError, match="position '<lambda>' gives"):
        activations(tiny_model("gpt2"), ["It rained"], position=rule)


def test_numbers_of_numpy_and_other_kinds_are_numbers():
    m, pairs = tiny_model("gpt2"), load_pairs("honesty")
    want = activations(m, ["It rained"], [1], lambda h: h.mean(0))
    assert torch.allclose(activations(m, ["It rained"], [1], lambda h: h.numpy().mean(0)), want)
    plain = extract_concept(m, pairs, [1])
    for kind in (torch.Tensor.double, torch.Tensor.numpy, torch.Tensor.tolist):
        other = extract_concept(m, pairs, [1], reducer=lambda P, N, kind=kind: kind(P.mean(0) - N.mean(0)))
        assert torch.allclose(other.directions, plain.directions) and other.auc == plain.auc


@pytest.mark.parametrize("reducer", [lambda P, N: None, lambda P, N: P, lambda P, N: P[0, :3], ["pca"]])
def test_a_reducer_gives_a_direction(reducer):
    with pytest.raises(ValueError, match="reducer .*(gives .*(48,)|use)"):
        extract_concept(tiny_model("gpt2"), load_pairs("honesty"), [1], reducer=reducer)


@pytest.mark.parametrize("size", [0, -1, "x", 1.5])
def test_a_batch_holds_some_tokens(size):
    with pytest.raises(ValueError, match="batch_tokens"):
        activations(tiny_model("gpt2"), ["It rained"], batch_tokens=size)


def test_a_layer_is_given_once():
    m, pairs = tiny_model("gpt2"), load_pairs("honesty")
    for layers in ([1, 1], [-1, 3]):
        with pytest.raises(ValueError, match="give each once"):
            extract_concept(m, pairs, layers)
        with pytest.raises(ValueError, match="give each once"):
            fit_maps(m, m, Corpus("c", pairs.texts), [1], layers)


def test_a_function_does_not_go_by_the_name_of_another():
    m, pairs = tiny_model("gpt2"), load_pairs("honesty")

    def pca(P, N):
        return P[0] - N[0]

    def last(h):
        return h[0]

    for given in ({"reducer": pca}, {"position": last}):
        with pytest.raises(ValueError, match="is the name of another one here"):
            extract_concept(m, pairs, [1], **given)
    assert extract_concept(m, pairs, [1], reducer=REDUCERS["pca"]).reducer == "pca"
