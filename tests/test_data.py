"""The built-in sets are what their cards say."""
import itertools, re
import pytest
from concept_transfer.data import CONCEPTS, EMOTIONS, SPLITS, _near, _words, lint, load_corpus, load_pairs, load_task

FEELING = re.compile(r"\b(happ(y|i\w+)|glad|joy\w*|sad\w*|cry|cries|cried|tears?|grief|angr\w+|anger|furious|upset|fear\w*|afraid|scared?|terrif\w+|disgust\w*|gross|revolting|surpris\w+|shock\w*|astonish\w*|unexpected\w*)\b", re.I)


@pytest.fixture(scope="module")
def scenarios(): return {e: [t for s in SPLITS for t in load_pairs(f"emotions/{e}", s).positive] for e in EMOTIONS}

def test_emotions_are_many_and_do_not_name_themselves(scenarios):
    for e, texts in scenarios.items():
        assert len(texts) >= 100 and not [t for t in texts if FEELING.search(t)], e

def test_no_near_duplicates(scenarios):
    texts = [t for ts in scenarios.values() for t in ts]
    assert not [(a, b) for a, b in itertools.combinations(texts, 2) if _near(a, b) > .25]

def test_scenarios_vary_in_length_and_opening(scenarios):
    for texts in scenarios.values():
        lengths = [len(_words(t)) for t in texts]; openings = [tuple(_words(t)[:2]) for t in texts]
        assert min(lengths) <= 12 and max(lengths) >= 28 and max(map(openings.count, openings)) <= 4

@pytest.mark.parametrize("concept", CONCEPTS)
def test_concepts_have_many_pairs_of_like_length(concept):
    sides = [[t for s in SPLITS for t in getattr(load_pairs(concept, s), side)] for side in ("positive", "negative")]
    assert len(sides[0]) >= 100
    if concept == "brevity": return
    means = [sum(len(_words(t)) for t in side) / len(side) for side in sides]
    assert abs(means[0] / means[1] - 1) < .08

@pytest.mark.parametrize("name", [f"emotions/{e}" for e in EMOTIONS] + list(CONCEPTS))
def test_splits_are_disjoint_and_lint_is_quiet(name):
    parts = [set(load_pairs(name, s).texts) for s in SPLITS]
    assert not any(a & b for a, b in itertools.combinations(parts, 2))
    assert not [l for l in lint(load_pairs(name)) if name != "brevity" or "length alone" not in l]
    if name.startswith("emotions/"):
        for split in ("tune", "test"): assert not lint(load_pairs(name), load_task(name, split))

def test_corpora_are_disjoint_from_everything():
    general, neutral = load_corpus("general"), load_corpus("neutral")
    assert len(general) >= 2000 and len(set(general.texts + neutral.texts)) == len(general) + len(neutral)
    grams = lambda texts: {tuple(w[i:i + 6]) for t in texts for w in [_words(t)] for i in range(len(w) - 5)}
    assert not grams(general.texts) & grams(neutral.texts)
    concept = [t for n in [f"emotions/{e}" for e in EMOTIONS] + list(CONCEPTS) for s in SPLITS for t in load_pairs(n, s).texts]
    assert not grams(concept) & grams(general.texts + neutral.texts)
