"The demo of 0.1.0, before the house was rebuilt: from texts to margins its numbers are still the same."

import json
from dataclasses import replace
from pathlib import Path

import pytest

from concept_transfer.concepts import extract_concept
from concept_transfer.data import load_corpus, load_pairs
from concept_transfer.maps import fit_maps
from concept_transfer.measure import Bench
from concept_transfer.steering import place
from concept_transfer.tasks import load_task

THEN = json.loads((Path(__file__).parent / "numbers.json").read_text())
close = pytest.approx


@pytest.fixture(scope="module")
def joy(smol):
    return extract_concept(smol, load_pairs("emotions/happiness"))


@pytest.fixture(scope="module")
def maps(smol, gemma, joy):
    return fit_maps(smol, gemma, load_corpus("general").take(300), [28], [13], template=joy.template)


def test_the_concept(joy):
    assert [*joy.auc] == close(THEN["auc"], abs=1e-3)
    assert joy.directions.norm(dim=1).tolist() == close(THEN["norms"], rel=1e-3)


def test_the_maps(maps):
    assert maps[28, 13].r2 == close(THEN["r2"], abs=1e-3)


def test_the_dose(joy, maps, gemma):
    "As the search of layers sets it, and what it does to the first tuning items."
    bench = Bench(gemma, 13, load_task("emotions/happiness", "tune").take(32).take(8))
    t = bench.at_damage(place(joy, gemma, map=maps[28, 13]))
    base, moved = bench.ask([None, t])
    found = {"dose": t.dose, "kl": t.notes["kl"], "choice_rate": moved.chosen.mean()}
    found["margin"] = (moved.margin - base.margin).mean()
    assert found == close(THEN["search"], abs=1e-3)


def test_the_answers(joy, maps, gemma):
    bench = Bench(gemma, 13, load_task("emotions/happiness").take(50))
    native = extract_concept(gemma, load_pairs("emotions/happiness"), [13])
    dose = {arm: x["dose"] for arm, x in THEN["arms"].items()}
    transplanted = place(joy, gemma, map=maps[28, 13], dose=dose["transplanted"])
    placed = {"transplanted": transplanted, "native": place(native, gemma, layer=13, dose=dose["native"])}
    wrong = dict(direction=transplanted.shuffled, shuffled=None, dose=dose["shuffled_map"])
    placed["shuffled_map"] = replace(transplanted, **wrong)
    asked = dict(zip(("base", *placed), bench.ask([None, *placed.values()]), strict=True))
    for arm, answers in asked.items():
        assert [*answers.margin] == close(THEN["arms"][arm]["margins"], abs=1e-3), arm
    for arm, t in placed.items():
        assert bench.hurt(t).mean == close(THEN["arms"][arm]["kl"], abs=1e-3), arm
