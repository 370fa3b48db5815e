"What the search and the one call that does it all make of what they are given."

import warnings

import numpy as np
import pytest

from concept_transfer.concepts import extract_concept
from concept_transfer.data import Corpus, load_corpus, load_pairs
from concept_transfer.maps import fit_maps
from concept_transfer.models import load_model, tiny_model, twin
from concept_transfer.selection import choose, offline_scores, transplant
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
    ({"target": tiny_model("gpt2")}, "target side"),
    ({"task": "emotions/happiness"}, "'task'"),
    ({"task": NEUTRAL}, "'task'"),
    ({"neutral": ["a"]}, "'neutral'"),
    ({"damage": float("nan")}, "damage"),
    ({"damage": "0.1"}, "damage"),
    ({"damage": 0}, "positive KL"),
]


@pytest.mark.parametrize("wrong, said", WRONG, ids=str)
@pytest.mark.parametrize("call", [choose, transplant])
@pytest.mark.slow
def test_what_does_not_belong_together_is_refused_before_anything_is_read(given, unread, call, wrong, said):
    some = dict(zip(("concept", "maps", "target"), given, strict=True)) | {"task": TASK, "neutral": NEUTRAL}
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


@pytest.mark.parametrize("layers", ["best", "1:2", (1,), 5, [1, 9], (1, 2, 1)], ids=str)
def test_layers_are_auto_or_a_pair(given, unread, layers):
    with pytest.raises(ValueError, match="layers"):
        transplant(*given, layers=layers)


def test_layers_that_no_task_chose_are_said(given):
    with pytest.warns(
        UserWarning, match="chosen without a task, by an offline score of 0.*give tuning items"
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
