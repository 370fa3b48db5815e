"What the search and the one call that does it all make of what they are given."

import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from concept_transfer.artefacts import keeping
from concept_transfer.concepts import activations, extract_concept
from concept_transfer.data import Corpus, load_corpus, load_pairs
from concept_transfer.maps import fit_maps
from concept_transfer.measure import Bench
from concept_transfer.models import load_model, tiny_model, twin
from concept_transfer.selection import (
    Carried,
    answer_shifts,
    causal_score,
    choose,
    offline_scores,
    transplant,
)
from concept_transfer.tasks import load_task
from concept_transfer.toys import planted_module

PAIRS = load_pairs("emotions/happiness")
SCENES = Corpus("scenes", [x for e in ("sadness", "fear") for x in load_pairs(f"emotions/{e}").texts])
NEUTRAL = Corpus("neutral", load_corpus("neutral").texts[:16])
TASK = load_task("emotions/happiness", "tune").take(8)


@pytest.fixture(scope="module")
def given():
    "A concept, maps and their target."
    source = load_model(*planted_module())
    target, _ = twin(source)
    maps = fit_maps(source, target, SCENES, [1, 2], [1, 2], template=PAIRS.template)
    return extract_concept(source, PAIRS), maps, target


@pytest.fixture
def unread(monkeypatch):
    "Reading fails."
    monkeypatch.setattr("concept_transfer.measure.encode", None)
    monkeypatch.setattr("concept_transfer.steering.encode", None)


WRONG = [
    ({"concept": "joy"}, "'concept'"),
    ({"maps": None}, "'maps'"),
    ({"target": "smollm2-135m-instruct"}, "'target'"),
    ({"target": partial(tiny_model, "gpt2")}, "target side"),
    ({"task": "emotions/happiness"}, "'task'"),
    ({"task": NEUTRAL}, "'task'"),
    ({"neutral": ["a"]}, "'neutral'"),
    ({"damage": float("nan")}, "damage"),
    ({"damage": "0.1"}, "damage"),
    ({"damage": 0}, "positive KL"),
]


@pytest.mark.parametrize("wrong, said", WRONG)
@pytest.mark.parametrize("call", [choose, transplant])
def test_what_does_not_belong_together_is_refused_before_anything_is_read(given, unread, call, wrong, said):
    some = dict(zip(("concept", "maps", "target"), given, strict=True)) | {"task": TASK, "neutral": NEUTRAL}
    wrong = {k: x() if callable(x) else x for k, x in wrong.items()}
    with pytest.raises(ValueError, match=said):
        call(**some | wrong)


@pytest.mark.parametrize("positions", ["all", [], ["frist"], [5], None], ids=str)
def test_positions_are_a_list_of_rules(given, unread, positions):
    with pytest.raises(ValueError, match="position"):
        choose(*given, TASK, NEUTRAL, positions=positions)


@pytest.mark.parametrize("candidates", [[(1, 9)], [1], "12", [(1,)], 5, [("1", "2")]], ids=str)
def test_candidates_are_pairs_of_layers(given, unread, candidates):
    with pytest.raises(ValueError, match="candidates|no map for layers"):
        choose(*given, TASK, NEUTRAL, candidates=candidates)


def test_a_candidate_is_tried_once(given, unread):
    maps = given[1]
    two = [maps.layer_pairs[0]] * 2
    with pytest.raises(ValueError, match="give each once"):
        choose(*given, TASK, NEUTRAL, candidates=two)


@pytest.mark.parametrize("layers", ["best", "1:2", (1,), 5, [1, 9], (1, 2, 1)], ids=str)
def test_layers_are_auto_or_a_pair(given, unread, layers):
    with pytest.raises(ValueError, match="layers"):
        transplant(*given, layers=layers)


def test_layers_that_no_task_chose_are_said(given):
    with pytest.warns(
        UserWarning, match="chosen without a task, by an offline score of 0.*give a task to choose with"
    ) as said:
        t = transplant(*given, neutral=NEUTRAL, damage=0.5)
    assert [w.filename for w in said] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = transplant(*given, neutral=NEUTRAL, damage=0.5, layers=[np.int64(t.source_layer), t.layer])
    assert (same.source_layer, same.layer, same.dose) == (t.source_layer, t.layer, t.dose)


def test_offline_scores_belong_to_the_maps_and_pairs_need_a_reader(given):
    joy, maps, target = given
    other = extract_concept(tiny_model("gpt2"), load_pairs("honesty"), [1, 2])
    with pytest.raises(ValueError, match="source side"):
        offline_scores(other, maps)
    with pytest.raises(ValueError, match="give it too"):
        offline_scores(joy, maps, pairs=PAIRS)
    with pytest.raises(ValueError, match="'concept'"):
        offline_scores(maps, joy)


# a search that goes on


@pytest.mark.slow
def test_a_stopped_search_goes_on_to_the_same_transplant(given, tmp_path, monkeypatch):
    want, real, calls = choose(*given, TASK, NEUTRAL, 0.5), Bench.at_damage, []

    def stops(self, ts, *a):
        calls.append(ts)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, ts, *a)

    monkeypatch.setattr(Bench, "at_damage", stops)
    file = tmp_path / "search"
    with pytest.raises(KeyboardInterrupt), keeping(file):
        choose(*given, TASK, NEUTRAL, 0.5)
    assert file.exists()
    with keeping(file):
        found = choose(*given, TASK, NEUTRAL, 0.5)
    assert found.dose == want.dose and not file.exists()
    assert {**found.notes, "texts_read": 0} == {**want.notes, "texts_read": 0}  # some were read twice
    searched = {(s["round"], *s["layers"]) for s in want.notes["search"]}
    assert len(calls) <= 4 + len(searched) - 3  # three trials were kept


def test_another_search_is_not_mixed_in(given, tmp_path):
    with pytest.raises(ZeroDivisionError), keeping(tmp_path / "search"):
        choose(*given, TASK, NEUTRAL, 0.5, [(1, 1)])
        1 / 0  # noqa: B018
    for other in (dict(damage=0.3), dict(neutral=Corpus("other", load_corpus("neutral").texts[20:40]))):
        with pytest.raises(ValueError, match="belongs to another run"), keeping(tmp_path / "search"):
            choose(*given, TASK, **{"neutral": NEUTRAL, "damage": 0.5} | other, candidates=[(1, 1)])
    assert (tmp_path / "search").exists()


# whether a map carries what a change does


@pytest.fixture(scope="module")
def changes(given):
    "A source, changes of it, and open questions."
    source = load_model(*planted_module())
    H = activations(source, SCENES.texts[:32], [2])[:, 0]
    return source, H[::2] - H[1::2], load_task("cloze").take(40)


@pytest.mark.slow
def test_a_twin_carries_every_change_and_a_shuffled_map_none(given, changes):
    _, maps, target = given
    source, directions, cloze = changes
    twins = causal_score(maps[2, 2], source, target, directions, cloze)
    assert np.diag(twins.agreement) == pytest.approx(1, abs=0.02) and twins.retrieval == 1
    nothing = causal_score(
        replace(maps[2, 2], W=maps[2, 2].shuffled.float()), source, target, directions, cloze
    )
    assert abs(nothing.score) < 0.25 and nothing.retrieval < 0.3 < 0.6 < twins.score


def test_the_score_is_the_diagonal_minus_the_rest(given, changes):
    source, directions, cloze = changes
    shifts = answer_shifts(Bench(source, 2, cloze), directions[:3])
    assert shifts.shape == (3, sum(len(i.choices) for i in cloze.items))
    sizes = np.cumsum([len(i.choices) for i in cloze.items])[:-1]
    assert max(abs(x.sum()) for row in shifts for x in np.split(row, sizes)) < 1e-5
    agreement = np.array([[0.9, 0.1, 0.2], [0.3, 0.5, 0.6], [0.0, 0.0, 0.7]])
    found = Carried(agreement)
    assert found.score == pytest.approx((0.9 + 0.5 + 0.7) / 3 - (0.1 + 0.2 + 0.3 + 0.6) / 6)
    assert found.retrieval == pytest.approx(2 / 3)


def test_a_causal_score_wants_the_models_of_the_map(given, changes):
    _, maps, target = given
    source, *_ = changes
    with pytest.raises(ValueError, match="source side"):
        causal_score(maps[2, 2], target, target)
    with pytest.raises(ValueError, match="target side"):
        causal_score(maps[2, 2], source, source)
    with pytest.raises(ValueError, match="one direction cannot be told from others"):
        causal_score(maps[2, 2], source, target, torch.ones(1, 48))
