"The built-in sets are what their cards say, and files are read as people write them."

import itertools
import json
import re

import pytest

from concept_transfer.data import (
    EMOTIONS,
    PAIRS,
    SPLITS,
    ContrastPairs,
    Corpus,
    lint,
    load_corpus,
    load_pairs,
    overlap,
    split_words,
    text_key,
    texts_hash,
)
from concept_transfer.tasks import load_task

FEELING = re.compile(
    r"\b(happ(y|i\w+)|glad|joy\w*|sad\w*|cry|cries|cried|tears?|grief|angr\w+|anger|furious|upset|fear\w*|"
    r"afraid|scared?|terrif\w+|disgust\w*|gross|revolting|surpris\w+|shock\w*|astonish\w*|unexpected\w*)\b",
    re.I,
)
CONCEPTS = [name for name in PAIRS if not name.startswith("emotions/")]


@pytest.fixture(scope="module")
def scenarios():
    return {e: [t for s in SPLITS for t in load_pairs(f"emotions/{e}", s).positive] for e in EMOTIONS}


def test_emotions_are_many_and_do_not_name_themselves(scenarios):
    for e, texts in scenarios.items():
        assert len(texts) >= 100 and not [t for t in texts if FEELING.search(t)], e


def test_no_near_duplicates(scenarios):
    texts = [t for ts in scenarios.values() for t in ts]
    assert not [(a, b) for a, b in itertools.combinations(texts, 2) if overlap(a, b) > 0.25]


def test_scenarios_vary_in_length_and_opening(scenarios):
    for texts in scenarios.values():
        lengths = [len(split_words(t)) for t in texts]
        openings = [tuple(split_words(t)[:2]) for t in texts]
        assert min(lengths) <= 12 and max(lengths) >= 28 and max(map(openings.count, openings)) <= 4


@pytest.mark.parametrize("concept", CONCEPTS)
def test_concepts_have_many_pairs_of_like_length(concept):
    sides = [
        [t for s in SPLITS for t in getattr(load_pairs(concept, s), k)] for k in ("positive", "negative")
    ]
    assert len(sides[0]) >= 100
    if concept == "brevity":
        return
    means = [sum(len(split_words(t)) for t in side) / len(side) for side in sides]
    assert abs(means[0] / means[1] - 1) < 0.08


@pytest.mark.parametrize("name", PAIRS)
def test_splits_are_disjoint_and_lint_is_quiet(name):
    parts = [set(load_pairs(name, s).texts) for s in SPLITS]
    assert not any(a & b for a, b in itertools.combinations(parts, 2))
    found = lint(load_pairs(name))
    assert not [problem for problem in found if name != "brevity" or "length alone" not in problem]
    if name.startswith("emotions/"):
        for split in ("tune", "test"):
            assert not lint(load_pairs(name), load_task(name, split))


def test_corpora_are_disjoint_from_everything():
    general, neutral = load_corpus("general"), load_corpus("neutral")
    every = [*general.texts, *neutral.texts]
    assert len(general) >= 2000 and len(set(every)) == len(general) + len(neutral)

    def grams(texts):
        words = [split_words(t) for t in texts]
        return {tuple(w[i : i + 6]) for w in words for i in range(len(w) - 5)}

    assert not grams(general.texts) & grams(neutral.texts)
    concept = [t for name in PAIRS for s in SPLITS for t in load_pairs(name, s).texts]
    assert not grams(concept) & grams(every)


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("a.jsonl", '{"positive": "x", "negative": "y"}\n\n{"positive": "x"}\n', "row 2, 'negative'"),
        ("b.jsonl", '{"text": "x", "label": 1}\n{"text": 3, "label": 0}\n', "row 2, 'text'"),
        ("c.jsonl", '{"text": "x", "label": null}\n', "label 'none' is neither"),
        ("d.jsonl", '{"text": "x", "label": "maybe"}\n', "neither positive nor negative"),
        ("e.jsonl", '{"text": "x", "label": 1}\n["x"]\n', "row 2: Input should be a valid dictionary"),
        ("f.jsonl", "{", "not valid JSON (line 1"),
        ("g.csv", "positive,negative\nx,y\nx\n", "row 2, 'negative'"),
        ("h.csv", "a,b\n1,2\n", "the columns positive,negative or text,label; found [{'a': '1', 'b': '2'}]"),
        ("i.csv", "", "found []"),
        ("j.json", "{", "not valid JSON (line 1"),
        ("k.json", '{"positive": ["x"]}', "the lists 'positive' and 'negative'"),
        ("l.json", '{"pos": ["x"], "neg": "y"}', "the lists 'positive' and 'negative'"),
        ("m.json", '{"pos": ["x"], "neg": []}', "negative side is empty"),
        ("n.json", '{"pos": ["x"], "neg": [" "]}', "item 0 is ' '"),
        ("o.json", '{"pos": ["x"], "neg": [3]}', "item 0 is 3"),
        ("p.json", '{"pos": ["x"], "neg": ["y"], "template": "So:"}', "has no {} for the text"),
    ],
)
def test_a_file_of_pairs_that_cannot_be_read_says_where(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(says)):
        load_pairs(tmp_path / name)


def test_pairs_are_the_same_from_every_kind_of_file(tmp_path):
    pairs = load_pairs("honesty", "tune")
    rows = list(zip(pairs.positive, pairs.negative, strict=True))
    (tmp_path / "a.json").write_text(json.dumps(dict(pos=pairs.positive, neg=pairs.negative)))
    both = [
        json.dumps(dict(positive=p, negative=n, group=g))
        for (p, n), g in zip(rows, pairs.groups, strict=False)
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(both))
    single = [
        json.dumps(dict(text=t, label=label)) for row in rows for t, label in zip(row, (True, 0), strict=True)
    ]
    (tmp_path / "c.jsonl").write_text("\ufeff" + "\n".join(single), encoding="utf-8")
    read = [load_pairs(tmp_path / name) for name in ("a.json", "b.jsonl", "c.jsonl")]
    assert {p.hash for p in read} == {pairs.hash} and read[1].groups == pairs.groups


def test_a_corpus_forgives_blank_lines_but_not_other_encodings(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\n two \n")
    assert load_corpus(tmp_path / "a.txt").texts == ("one", " two ")
    (tmp_path / "b.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        load_corpus(tmp_path / "b.txt")
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n{"text": " "}\n{"words": "b"}\n')
    with pytest.raises(ValueError, match="row 3, 'text'"):
        load_corpus(tmp_path / "c.jsonl")


@pytest.mark.parametrize("load", [load_pairs, load_corpus, load_task])
def test_an_unknown_name_says_what_is_built_in(load):
    with pytest.raises(FileNotFoundError, match="Built in: "):
        load("gravity")


def test_a_slip_of_the_finger_is_understood():
    with pytest.raises(FileNotFoundError, match="Did you mean 'honesty'"):
        load_pairs("honestly")
    with pytest.raises(ValueError, match="use one of fit, tune, test"):
        load_pairs("honesty", "all")


def test_a_set_of_texts_has_one_hash_whatever_its_order():
    texts = ["one", "two", "three"]
    keys = [text_key(t) for t in texts]
    assert texts_hash(keys) == texts_hash(keys[::-1] + keys) == "03a4bf8d622c1a2b"
    assert text_key("one") == 8544106591765445504


def test_objects_show_their_texts_and_nothing_is_markup():
    shown = [
        ContrastPairs("a<b", ["<i>We hugged.</i>"], ["We nodded."]),
        Corpus("a<b", ["<i>It rained.</i>"]),
    ]
    for html in (x._repr_html_() for x in shown):
        assert "a&lt;b" in html and "&lt;i&gt;" in html and "<i>" not in html
