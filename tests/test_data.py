"The built-in sets are what their cards say, and files are read as people write them."

import csv
import gzip
import io
import itertools
import json
import os
import random
import re
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from concept_transfer.data import (
    EMOTIONS,
    PAIRS,
    SPLITS,
    ContrastPairs,
    Corpus,
    alike,
    data_hash,
    fill,
    leak,
    lint,
    load_corpus,
    load_pairs,
    overlap,
    parse_json,
    split_words,
    text_key,
    texts_hash,
)
from concept_transfer.tasks import choice_task, load_task, multiple_choice

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
        ("a.jsonl", '{"positive": "x", "negative": "y"}\n\n{"positive": "x"}\n', "negative, item 1 is nan"),
        ("b.jsonl", '{"text": "x", "label": 1}\n{"text": 3, "label": 0}\n', "text, item 1 is 3"),
        ("c.jsonl", '{"text": "x", "label": null}\n', "label 'none' is neither"),
        ("d.jsonl", '{"text": "x", "label": "maybe"}\n', "neither positive nor negative"),
        ("e.jsonl", '{"text": "x", "label": 1}\n["x"]\n', "not valid JSON (line 2: Extra data)"),
        ("f.jsonl", "{", "not valid JSON (line 1"),
        ("g.csv", "positive,negative\nx,y\nx\n", "row 2 has 1 cells under the columns"),
        ("h.csv", "a,b\n1,2\n", "or 'text' and 'label'; found the columns 'a', 'b'"),
        ("i.csv", "", "found []"),
        ("j.json", "{", "not valid JSON (line 1"),
        ("k.json", '{"positive": ["x"]}', "'positive' and 'negative'"),
        ("l.json", '{"pos": ["x"], "neg": "y"}', "a list is needed here, not str 'y'"),
        ("m.json", '{"pos": ["x"], "neg": []}', "negative side is empty"),
        ("n.json", '{"pos": ["x"], "neg": [" "]}', "item 0 is ' '"),
        ("o.json", '{"pos": ["x"], "neg": [3]}', "item 0 is 3"),
        ("p.json", '{"pos": ["x"], "neg": ["y"], "template": "So:"}', "has no {} for the text"),
        ("q.json", '{"pos": ["x"], "neg": ["y"], "template": 3}', "template, item 0 is 3"),
        ("r.csv", "text,label\na,1\nb,0\nc,-1\n", "neither positive nor negative"),  # three ways
        ("s.csv", "text,text\na,b\n", "Name each column once"),
        ("t.csv", "text,statement,label\na,b,1\n", "mean the same"),
        ("u.json", '{"text": ["x", "y"], "label": [1]}', "columns of one length"),
        ("v.json", '{"pos": ["x", "z"], "neg": ["y"], "group": ["a", "b"]}', "columns of one length"),
        ("w.jsonl", '{"prompt": 3, "chosen": "x", "rejected": "y"}\n', "prompt"),
        ("x.csv", 'positive,negative\n"x,y\n', "line 2: unexpected end of data"),
        ("y.tsv", 'positive\tnegative\n"Hi" he said\ty\n', "line 2: "),
        ("z.txt", "one\ntwo\n", "found ['one', 'two'"),
    ],
)
def test_a_file_of_pairs_that_cannot_be_read_says_where(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(says)) as e:
        load_pairs(tmp_path / name)
    assert name.split(".")[0] in str(e.value) or name == "q.json"


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
    with pytest.raises(ValueError, match="item 1 is nan"):
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


@pytest.fixture
def write(tmp_path):
    def write(name, text, encoding="utf-8"):
        (tmp_path / name).write_bytes(text.encode(encoding))
        return tmp_path / name

    return write


def test_B1_a_corpus_is_a_table_where_it_looks_like_one(write):
    for name in ("c.csv", "c.txt", "C.CSV"):
        path = write(name, 'text,id\nHello there.,1\n"Two\nlines",2\n')
        assert load_corpus(path).texts == ("Hello there.", "Two\nlines")
    assert load_corpus(write("c.txt", '"text","id"\n"Hello there.","1"\n')).texts == ("Hello there.",)
    assert load_corpus(write("c.txt", '"text", she said.\n')).texts == ('"text", she said.',)
    assert load_corpus(write("c.tsv", "id\tstatement\n1\tOne, two.\n")).texts == ("One, two.",)
    for name in ("c.md", "c", "c.xlsx", "c.parquet", "c.gz", "c.csv.zip"):
        with pytest.raises(ValueError, match=".csv, .tsv, .json, .jsonl, .ndjson, .txt"):
            load_corpus(write(name, "text\nHello.\n"))


def test_B3_json_is_json_whatever_the_ending(write):
    for name in ("C.JSONL", "c.ndjson", "c.json", "c.txt"):
        text = '{"text": "Snow is cold."}\n{"text": "So."}\n'
        assert load_corpus(write(name, text)).texts == ("Snow is cold.", "So.")
    assert load_corpus(write("c.jsonl", '{"text": "Snow."}\n')).texts == ("Snow.",)
    assert load_corpus(write("c.jsonl", '"Snow."\n\n"Ice\\n[and] more."\n')).texts == (
        "Snow.",
        "Ice\n[and] more.",
    )
    assert load_corpus(write("c.json", '[\n"Snow.",\n"Ice."]')).texts == ("Snow.", "Ice.")
    assert load_corpus(write("c.txt", '["Snow.", "Ice."]')).texts == ("Snow.", "Ice.")
    assert load_corpus(write("c.txt", '"Snow," he said.\n[laughs]')).texts == ('"Snow," he said.', "[laughs]")
    for text in (
        "3",
        "null",
        '"Snow."',
        "{}",
        "[]",
        "[3]",
        '[{"words": "x"}]',
        '{"text": "x"}',
        '{"text": []}',
        '{"text": 3}',
    ):
        with pytest.raises(ValueError, match="c.json|corpus 'c'"):
            load_corpus(write("c.json", text))


@pytest.mark.parametrize(
    "text",
    ["positive,negative\nHello, I love this,Hello I hate this\nGreat day, friend,Bad day\n",
     "positive,negative\nI was glad, really, to see you,I left\nWe sang,We slept\n"],
)  # fmt: skip
def test_B5_92_a_comma_that_is_not_quoted_is_refused(write, text):
    with pytest.raises(ValueError, match=r"p.csv: row 1 has \d cells under the columns"):
        load_pairs(write("p.csv", text))


def test_B6_groups_of_labelled_rows_are_kept(write):
    text = "text,label,group\nBy the lake,1,lake\nIn town,1,town\nCried in town,0,town\nFought by it,0,lake\n"
    assert load_pairs(write("p.csv", text)).groups == ("lake", "town", "town", "lake")
    both = dict(positive=["a", "b"], negative=["c", "d"], group=["x", "y"])
    assert load_pairs(both).groups == ("x", "y", "x", "y")
    assert load_pairs(pd.DataFrame(both)).groups == ("x", "y", "x", "y")
    with_prompts = [dict(prompt="q", chosen=c, rejected="n") for c in "ab"]
    assert load_pairs(with_prompts).groups == ("q",) * 4


def test_B7_an_empty_group_is_its_own_scenario(write):
    text = "positive,negative,group\n" + "".join(f"We sang {i},We left {i},\n" for i in range(12))
    pairs = load_pairs(write("p.csv", text))
    assert len({*pairs.groups}) == 12 and pairs.groups[:12] == pairs.groups[12:]
    some = ContrastPairs("x", ["a", "b", "c"], ["d", "e"], ["lake", None, float("nan"), " ", 7])
    assert some.groups == ("lake", "row 1", "row 2", "row 0", "7")
    for none in ("NA", "n/a", "null", pd.NaT):
        assert ContrastPairs("x", ["a", "b"], ["c"], [none] * 3).groups == ("row 0", "row 1", "row 0")
    items = [ITEM | {"group": g} for g in ("", None, "")]
    assert len({*load_task({"items": items}).groups}) == 3


ITEM = dict(prompt="The street", choices=[" is wet", " is dry"], target=0)
NO_LISTS = [
    "Hello",
    b"Hello",
    {"a": 1},
    {"a"},
    frozenset("a"),
    5,
    None,
    pd.DataFrame({"a": ["b"]}),
    np.array([["a"]]),
]


@pytest.mark.parametrize("strange", NO_LISTS, ids=lambda x: type(x).__name__)
def test_B8_what_is_no_list_is_not_taken_for_one(strange):
    for make in (
        lambda: ContrastPairs("x", strange, ["World"]),
        lambda: ContrastPairs("x", ["World"], strange),
        lambda: ContrastPairs("x", ["a"], ["b"], strange),
        lambda: Corpus("x", strange),
        lambda: choice_task(strange, ["a", "b"], "a"),
        lambda: choice_task(["x"], strange, "a"),
        lambda: data_hash(strange),
    ):
        with pytest.raises(ValueError, match="x|list|task"):
            make()


@pytest.mark.parametrize("load", [load_pairs, load_corpus, load_task])
def test_B8_a_set_has_no_order_to_be_read_in(load):
    with pytest.raises(ValueError, match="a list is needed here"):
        load({"It rained.", "It snowed."})


@pytest.mark.parametrize(
    "found, meant",
    [
        ({"templates": "It rained: {}"}, "template"),
        ({"grops": ["lake"]}, "groups"),
        ([{"grup": "lake"}], "group"),
        ([{"prompts": "How was it?"}], "prompt"),
        ([{"templates": "It rained: {}"}], "template"),
    ],
)
def test_a_slip_in_a_name_beside_pairs_is_not_passed_over(found, meant):
    sides = dict(positive="We sang", negative="We cried")
    lists = {k: [x] for k, x in sides.items()}
    made = lists | found if isinstance(found, dict) else [sides | found[0]]
    with pytest.raises(ValueError, match=f"Did you mean '{meant}'"):
        load_pairs(made)


def test_B6_a_template_and_a_name_beside_pairs_are_kept():
    rows = [dict(text=f"{i}", label=i % 2, template="It rained: {}") for i in range(4)]
    lists = dict(positive=["1", "3"], negative=["0", "2"], template="It rained: {}", name="rain")
    assert load_pairs(rows).template == load_pairs(lists).template == "It rained: {}"
    assert load_pairs(lists).name == "rain"
    with pytest.raises(ValueError, match="one template"):
        load_pairs([*rows, rows[0] | {"template": "{}"}])


def test_B9_data_in_memory_is_read():
    both = dict(positive=["a", "c"], negative=["b", "d"])
    rows = [dict(positive="a", negative="b"), dict(positive="c", negative="d")]
    wanted = ContrastPairs("data", both["positive"], both["negative"])

    class Dataset:  # as `datasets.Dataset`
        column_names = ("positive", "negative")

        def __iter__(self):
            return iter(rows)

    labelled = pd.DataFrame(dict(Text=[*"acbd"], Label=[True, True, False, False]))
    for ref in (
        both,
        rows,
        tuple(rows),
        iter(rows),
        pd.DataFrame(both),
        Dataset(),
        labelled,
        labelled.to_dict("list"),
    ):
        got = load_pairs(ref)
        assert (got.hash, got.positive) == (wanted.hash, wanted.positive)
    assert (
        load_corpus(["a", "b"]).texts == load_corpus(pd.DataFrame(dict(text=["a", "b"]))).texts == ("a", "b")
    )
    frame = pd.DataFrame({"Question": ["q"], "chosen": [" a"], "rejected": ["b"]})
    assert load_pairs(frame).positive == ("q a",) and [*frame] == ["Question", "chosen", "rejected"]
    assert frame["chosen"][0] == " a"
    assert (
        load_task([ITEM]).hash == load_task(dict(items=[ITEM])).hash == load_task(pd.DataFrame([ITEM])).hash
    )
    for load in (load_pairs, load_corpus, load_task):
        for nothing in (5, None, [], {}, [5], [[]], pd.DataFrame(), {"train": rows}, object()):
            with pytest.raises((ValueError, FileNotFoundError)):
                load(nothing)


CAA = dict(question="q", answer_matching_behavior="(A)", answer_not_matching_behavior="(B)")


def test_published_choices_are_tasks_too():
    rows = [CAA | dict(question=q) for q in ("one", "two")]
    for form in (rows, pd.DataFrame(rows), {k: [r[k] for r in rows] for k in CAA}):
        task = load_task(form)
        assert [(i.prompt, i.wanted) for i in task.items] == [("one", " (A)"), ("two", " (A)")]
        assert {i.choices for i in task.items} == {(" (A)", " (B)"), (" (B)", " (A)")}
    (item,) = load_task([dict(prompt="q", chosen=" yes", rejected="no", group="g")]).items
    assert (item.choices, item.target, item.group) == ((" yes", " no"), 0, "g")


FORMS = {
    "caa.json": json.dumps([CAA]),
    "evals.jsonl": json.dumps(
        CAA | dict(answer_matching_behavior=" (A)", answer_not_matching_behavior=" (B)")
    ),
    "dpo.jsonl": '{"prompt": "q", "chosen": "(A)", "rejected": "(B)"}\n',
    "facts.csv": "statement,label\nq (B),0\nq (A),1\n",
    "rows.json": '[{"positive": "q (A)", "negative": "q (B)"}]',
    "lines.json": '{"positive": "q (A)", "negative": "q (B)"}\n{"positive": "q (A)", "negative": "q (B)"}\n',
    "float.csv": "text,label\nq (A),1.0\nq (B),0.0\n",
    "minus.csv": "text,label\nq (A),1\nq (B),-1\n",
    "words.csv": "text,label\nq (A),Yes\nq (B),no\n",
    "truth.jsonl": '{"sentence": "q (A)", "label": true}\n{"sentence": "q (B)", "label": false}\n',
    "excel.csv": "\ufeffPositive;Negative\r\nq (A);q (B)\r\n;\r\n",
    "B10.TSV": "positive\tnegative\nq (A)\tq (B)\n",
    "B10.CSV": "positive,negative\nq (A),q (B)\n",
    "B10.JSON": '{"positive": ["q (A)"], "negative": ["q (B)"]}',
    "lists.txt": '{"positive": ["q (A)"], "negative": ["q (B)"]}',
}


@pytest.mark.parametrize("name", FORMS)
def test_B10_B14_files_that_people_have(write, name, tmp_path):
    pairs = load_pairs(write(name, FORMS[name]))
    assert {*pairs.positive} == {"q (A)"} and {*pairs.negative} == {"q (B)"}
    with gzip.open(tmp_path / f"{name}.gz", "wt", encoding="utf-8") as f:
        f.write(FORMS[name])
    assert load_pairs(tmp_path / f"{name}.gz").texts == pairs.texts


BROKEN = {
    "empty": b"",
    "head": b"\x1f\x8b",
    "none": b"no gzip",
    "cut": gzip.compress(b"text\nHello.\n" * 99)[:-9],
}


@pytest.mark.parametrize("packed", BROKEN.values(), ids=BROKEN)
def test_a_broken_archive_is_named(tmp_path, packed):
    (tmp_path / "c.csv.gz").write_bytes(packed)
    with pytest.raises(ValueError, match=r"c\.csv"):
        load_corpus(tmp_path / "c.csv.gz")


def test_an_archive_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("concept_transfer.data._LIMIT", 10**5)
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"rain " * 10**5))
    with pytest.raises(ValueError, match="100000 characters or more"):
        load_corpus(tmp_path / "c.txt.gz")


def test_B11_95_a_huge_cell_or_number_is_named(write):
    for n in (150_000, 200_000):
        with pytest.raises(ValueError, match=r"p.csv: line 2: field larger"):
            load_pairs(write("p.csv", "positive,negative\n" + "g" * n + ",bad\n"))
    for name in ("p.json", "p.jsonl"):
        with pytest.raises(ValueError, match=rf"{name}: not valid JSON \(line 1: Exceeds the limit"):
            load_pairs(write(name, '{"positive": [' + "1" * 5000 + '], "negative": ["x"]}'))


def test_B12_a_template_has_a_place_and_is_filled_one_way():
    task = choice_task(["It {rained}."], ["a", "b"], "a", template='{"story": "{}", "mood":')
    assert task.items[0].prompt == '{"story": "It {rained}.", "mood":'
    for template in ("What is the mood?", "{0}", "", None, 3):
        for make in (
            lambda t: choice_task(["It rained."], ["a", "b"], "a", template=t),
            lambda t: ContrastPairs("x", ["a"], ["b"], template=t),
            lambda t: fill(t, ["a"]),
        ):
            with pytest.raises(ValueError, match="template"):
                make(template)


def test_B13_text_in_another_encoding_is_refused(write):
    for encoding in ("utf-16-le", "utf-16-be", "utf-16", "utf-32"):
        for name, load in (
            ("c.txt", load_corpus),
            ("c.csv", load_corpus),
            ("c.csv", load_pairs),
            ("c.json", load_pairs),
        ):
            with pytest.raises(ValueError, match="c"):
                load(write(name, "text,label\nSnow.,1\nBirds.,0\n", encoding))
    for strange in ("a\0b", "a\x1b[2J", "a\x9b", "\ud83d", "a\udce9"):
        for make in (
            lambda t: Corpus("x", [t]),
            lambda t: ContrastPairs("x", ["a"], [t]),
            lambda t: load_task(dict(items=[ITEM | {"prompt": t}])),
            lambda t: load_task(dict(items=[ITEM | {"choices": ["a", t]}])),
            lambda t: choice_task([t], ["a", "b"], "a"),
            lambda t: ContrastPairs(t, ["a"], ["b"]),
            lambda t: Corpus(t, ["b"]),
        ):
            with pytest.raises(ValueError, match="item 0|item 1"):
                make(strange)
    assert Corpus("x", ["a\tb\nc\r\n\f🎉é\u0301"])
    with pytest.raises(ValueError, match="item 0"):
        load_pairs(write("p.json", r'{"positive": ["\ud83d"], "negative": ["x"]}'))


def texts_of(rng, n, words):
    return [" ".join(rng.choices(words, k=25)) for _ in range(n)]


@pytest.mark.slow
def test_J1_lint_takes_seconds_for_thousands_of_pairs():
    rng, words = random.Random(0), [f"w{i}" for i in range(2000)]
    lead = "Pretend that you are a very happy person who makes statements about the world. "
    pairs = ContrastPairs("x", *([lead + t for t in texts_of(rng, 5000, words)] for _ in range(2)))
    task = choice_task(texts_of(rng, 300, words), ["a", "b"], "a")
    began = time.process_time()
    assert not lint(pairs, task)
    assert time.process_time() - began < 20


@pytest.mark.parametrize("near", [0.05, 0.3, 0.5, 0.9, 1])
def test_J1_near_duplicates_are_those_of_the_plain_count(near):
    rng = random.Random(1)
    words = [*"abcdef", "g!", "?"]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(80)]
    others = texts[:20] + [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(60)]
    slow = [(i, j) for i, a in enumerate(texts) for j, b in enumerate(others) if overlap(a, b) >= near]
    assert list(alike(texts, others, near)) == slow


@pytest.mark.parametrize("near", [0, -1, 1.5, float("nan")])
def test_lint_refuses_an_overlap_that_is_none(near):
    with pytest.raises(ValueError, match="near"):
        lint(load_pairs("honesty"), near=near)


@pytest.mark.parametrize("n", [0, -1, 2.5, "x", None])
def test_the_first_texts_are_a_number_of_texts(n):
    for some in (Corpus("x", ["a", "b"]), load_task("knowledge")):
        with pytest.raises(ValueError, match="take"):
            some.take(n)
    assert len(Corpus("x", ["a", "b"]).take(np.int64(1))) == 1


@pytest.mark.parametrize("name", ["t.json", "t.jsonl"])
def test_94_json_without_end_is_named(write, name):
    for text in ("[" * 200_000, '{"a":' * 200_000, '{"items": ' + "[" * 200_000):
        for load in (load_pairs, load_corpus, load_task):
            with pytest.raises(ValueError, match=re.escape(name)):
                load(write(name, text))


CHATS = {
    side: [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"{side} {k}"}] for k in range(3)
    ]
    for side in ("chosen", "rejected")
}


@pytest.mark.parametrize("form", ["columns", "rows", "arrays", "jsonl", "prompts", "sides"])
def test_chats_in_the_place_of_texts_say_how_they_become_some(write, form):
    rows = pd.DataFrame(CHATS)
    data = {
        "columns": CHATS,
        "rows": rows.to_dict("records"),
        "arrays": rows.map(np.array),  # as parquet gives them
        "jsonl": rows,
        "prompts": rows.assign(prompt="Hi"),
        "sides": {"positive": CHATS["chosen"], "negative": CHATS["rejected"]},
    }[form]
    data = write("p.jsonl", rows.to_json(orient="records", lines=True)) if form == "jsonl" else data
    with pytest.raises(ValueError, match="item 0 is .*apply_chat_template"):
        load_pairs(data)


@pytest.mark.parametrize(
    "data", [[["It rained.", "It snowed."], ["We left.", "We came."]], np.array([["a", "b"]])]
)
def test_B5_a_corpus_of_several_columns_without_names_is_refused(data):
    with pytest.raises(ValueError, match="a corpus is one text a line"):
        load_corpus(data)
    assert load_corpus([["It rained."], ["We left."]]).texts == ("It rained.", "We left.")


def test_answers_that_stand_among_the_pairs_are_a_leak():
    task = multiple_choice("what to say", [("What did she do?", ["She told the whole truth"], ["She lied"])])
    pairs = ContrastPairs("honesty", ["She told the whole truth", "It is so"], ["No", "Never"])
    assert "share scenarios" in leak(pairs, task)
    assert leak(load_pairs("honesty"), task) is None


def test_a_name_that_stands_twice_in_json_is_refused():
    with pytest.raises(ValueError, match="x: not valid JSON .*stands twice among .'a', 'a'"):
        parse_json('{"a": 1, "a": 2}', "x")


def test_97_fingerprints_tell_lists_apart():
    lists = [["a\0b"], ["a", "b"], ["ab"], ["a", "", "b"], [""], [], ["\1"], ["\1", "\2"], ["\1\2"], ["\0"]]
    assert len({data_hash(x) for x in lists}) == len(lists)
    assert data_hash(["one", "two"]) == "a0ef70c43442d404"  # as in 0.1.0: kept notes stay valid
    with pytest.raises(ValueError, match="texts 0: Input should be a valid string"):
        data_hash([1])
    assert ContrastPairs("x", ["a", "b"], ["c"]).hash != ContrastPairs("x", ["a"], ["b", "c"]).hash
    assert ContrastPairs("x", ["a"], ["b"]).hash != ContrastPairs("x", ["a"], ["b"], template="{}.").hash


few = settings(
    max_examples=30,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1).filter(str.strip)
ROWS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6)


@pytest.mark.slow
@few
@given(ROWS, st.sampled_from(",;\t"))
def test_any_texts_come_back_from_every_kind_of_file(tmp_path, rows, mark):
    p, n = (list(side) for side in zip(*rows, strict=True))
    table = io.StringIO()
    writer = csv.writer(table, delimiter=mark, quoting=csv.QUOTE_ALL)
    writer.writerows([["positive", "negative"], *rows])
    dicts = [dict(chosen=a, rejected=b) for a, b in rows]
    files = {"a.csv": table.getvalue(), "b.json": json.dumps(dict(pos=p, neg=n)), "c.json": json.dumps(dicts),
             "d.jsonl": "\n".join(json.dumps(d, ensure_ascii=False) for d in dicts)}  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
        got = load_pairs(tmp_path / name)
        assert (list(got.positive), list(got.negative)) == (p, n), name
    assert load_pairs(pd.DataFrame(dicts)).hash == got.hash


NAMES = "positive negative text label group prompt items prompts choices target scorer args".split()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(NAMES), x),
    max_leaves=12,
)
LOADERS = [load_pairs, load_corpus, load_task]


@few
@given(JSON, st.sampled_from(LOADERS), st.sampled_from(["json", "jsonl", "txt", "csv"]))
def test_any_json_is_read_or_refused_in_words(tmp_path, value, load, ending):
    path = tmp_path / f"any.{ending}"
    path.write_text(json.dumps(value))
    for ref in (path, value):
        try:
            got = load(ref)
        except (ValueError, FileNotFoundError) as e:
            assert len(str(e)) > 20
        else:
            assert len(got) and all(got.texts if load is not load_task else got.prompts)


@few
@given(
    st.binary(max_size=60), st.sampled_from(LOADERS), st.sampled_from("csv tsv json jsonl txt csv.gz".split())
)
def test_any_bytes_are_read_or_refused_in_words(tmp_path, content, load, ending):
    path = tmp_path / f"any.{ending}"
    for data in (content, b"text,label\n" + content, b'{"items": [' + content):
        path.write_bytes(data)
        try:
            load(path)
        except ValueError as e:
            assert "any" in str(e) or "data" in str(e)


@few
@given(st.lists(st.text()), st.lists(st.text()))
def test_lists_that_differ_have_other_fingerprints(a, b):
    try:
        assert (data_hash(a) == data_hash(b)) == (a == b)
    except UnicodeEncodeError:
        assert re.search("[\ud800-\udfff]", "".join(a + b))


@pytest.mark.parametrize(
    "text",
    [
        "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n",
        "\n<!DOCTYPE html>\n<p>Not found",
        "<html>",
    ],
)
@pytest.mark.parametrize("name", ["c.txt", "c.csv", "c.jsonl"])
def test_what_stands_for_a_file_is_no_data(tmp_path, name, text):
    "A pointer of Git LFS, or the page of a server that has not got it."
    (tmp_path / name).write_text(text)
    for load in (load_corpus, load_pairs, load_task):
        with pytest.raises(ValueError, match=f"{name} is a web page, or a pointer"):
            load(tmp_path / name)


def test_an_array_without_a_dimension_is_no_list():
    for load in (load_corpus, load_pairs, load_task):
        with pytest.raises(FileNotFoundError, match="'abc' is neither"):
            load(np.array("abc"))


@pytest.mark.parametrize(
    "load, name, meant",
    [
        (load_pairs, "hapiness", "emotions/happiness"),
        (load_pairs, "Honesty", "honesty"),
        (load_pairs, "EMOTIONS/FEAR", "emotions/fear"),
        (load_task, "Honesty", "behaviours/honesty"),
        (load_task, "knowlege", "knowledge"),
        (load_corpus, "neutrl", "neutral"),
    ],
)
def test_names_are_understood_in_any_case_and_by_their_last_part(load, name, meant):
    with pytest.raises(FileNotFoundError, match=f"Did you mean '{meant}'"):
        load(name)


def test_B6_scenarios_are_groups(write):
    for name in ("scenario", "Scenarios"):
        pairs = load_pairs(write("p.csv", f"text,label,{name}\nWe sang,1,town\nWe cried,0,lake\n"))
        assert pairs.groups == ("town", "lake")
    sides = {"positive": ["We sang"], "negative": ["We cried"], "scenario": ["town"]}
    assert load_pairs(sides).groups == ("town", "town")


def test_what_is_no_pairs_no_task_and_no_seed_is_said():
    honesty = load_pairs("honesty")
    for call in (
        lambda: lint(load_corpus("neutral")),
        lambda: lint(honesty, "knowledge"),
        lambda: lint(honesty, near="x"),
        lambda: load_pairs("emotions/fear", seed="x"),
        lambda: load_task("knowledge").take(2, seed=[1]),
        lambda: load_task("knowledge").take(2, seed=None),
    ):
        with pytest.raises(ValueError, match="pairs|task|near|seed"):
            call()
    assert not lint(honesty, load_task("instructions"))


def test_a_file_of_yours_is_not_taken_for_built_in_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("neutral", "general", "prose"):
        ours = load_corpus(name).hash
        (tmp_path / name).write_text("notes")
        assert load_corpus(name).hash == ours
    (tmp_path / "mine.txt").write_text("It rained.")
    assert load_corpus("mine.txt").texts == ("It rained.",)


def test_a_slip_in_the_name_of_a_file_is_seen(tmp_path):
    (tmp_path / "curiosity.csv").write_text("positive,negative\na,b\n")
    with pytest.raises(FileNotFoundError, match="Did you mean 'curiosity.csv'"):
        load_pairs(tmp_path / "curosity.csv")


@pytest.mark.parametrize("ending, mark", [("csv", ","), ("csv", ";"), ("tsv", "\t")])
def test_a_blank_between_a_mark_and_a_quote_is_no_part_of_a_text(write, ending, mark):
    rows = 'I sang|   "I ""wept"", | ""too"""', '"We| ""too"""| We left', '5" nails|"a|b"'
    text = "\n".join(["positive| negative", *rows, ""])
    pairs = load_pairs(write(f"p.{ending}", text.replace("|", mark)))
    assert pairs.positive == ("I sang", f'We{mark} "too"', '5" nails')
    assert pairs.negative == (f'I "wept", {mark} "too"', " We left", f"a{mark}b")


def test_groups_in_the_index_of_a_table_are_kept():
    table = pd.DataFrame(dict(positive=["a", "b"], negative=["c", "d"], group=["lake", "town"]))
    want = load_pairs(table)
    assert load_pairs(table.set_index("group")).groups == want.groups == ("lake", "town") * 2
    assert load_pairs(table.rename_axis("id")) == want
    with pytest.raises(ValueError, match="mean the same"):
        load_pairs(table.set_index("group", drop=False))


def test_two_lists_stand_under_any_of_their_names():
    want = ContrastPairs("joy", ["a", "c"], ["b"], template="{} now")
    for p, n, name, words in (
        ("positive", "negative", "name", "template"),
        ("chosen", "rejected", "name", "template"),
        ("Pos", "Neg", "Name", "TEMPLATE"),
    ):
        assert load_pairs({p: ["a", "c"], n: ["b"], name: "joy", words: "{} now"}) == want
    with pytest.raises(ValueError, match="positive, negative, pos mean the same"):
        load_pairs({"positive": ["a"], "negative": ["b"], "pos": ["c"]})


def test_labelled_answers_stand_behind_their_prompt():
    rows = [dict(prompt="Why?", text=" Because.", label=1), dict(prompt="Why?", text="Go away.", label=0)]
    pairs = load_pairs(rows)
    assert pairs.texts == ("Why? Because.", "Why? Go away.") and {*pairs.groups} == {"Why?"}


def test_a_folder_and_a_pipe_are_called_what_they_are(tmp_path):
    (tmp_path / "p.csv").mkdir()
    os.mkfifo(tmp_path / "p.jsonl")
    for load in (load_pairs, load_corpus, load_task):
        for name in ("p.csv", "p.jsonl"):
            with pytest.raises(FileNotFoundError, match="is a folder or a device"):
                load(tmp_path / name)


@pytest.mark.parametrize("text", ['["It rained"\n"It snowed"]', '[{"text": "a"}\n{"text": "b"}]'])
def test_a_comma_that_is_missing_is_said(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="a.json: not valid JSON .line 2: Expecting ',' delimiter"):
        load_corpus(tmp_path / "a.json")


def test_groups_may_stand_in_one_of_several_indices():
    at = pd.MultiIndex.from_tuples([("g", 1), ("h", 2)], names=["group", "k"])
    table = pd.DataFrame({"positive": ["a b", "c d"], "negative": ["e f", "g h"]}, at)
    assert load_pairs(table).groups == ("g", "h", "g", "h")
