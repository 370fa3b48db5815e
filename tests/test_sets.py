"Test sets that were frozen before they were read, and what is fresh about them."

import hashlib
import itertools
import json
import re
from importlib.resources import files

import pytest

from concept_transfer.data import EMOTIONS, builtin_rows, load_corpus, overlap, split_words
from concept_transfer.tasks import BEHAVIOURS, load_task

SETS = files("concept_transfer") / "sets"
FROZEN = json.loads((SETS / "frozen.json").read_text())
LAST = {"fresh", "check"}  # splits that nothing was chosen on
WORDS = {w for r in builtin_rows("synonyms") for w in (r["concept"], *r["words"])}
NAMED = re.compile(
    r"\b(happ(y|i\w+)|glad\w*|joy\w*|sad\w*|griev\w+|sorrow\w*|angr\w+|furious\w*|fear\w*|afraid|scared?|"
    r"terrif\w+|disgust\w*|revolt\w+|surpris\w+|astonish\w*|amaz\w+)\b",
    re.I,
)


def rows_of(name):
    "Rows of a set that are frozen."
    if name == "prose":
        return load_corpus("prose").texts[12:]
    split = {"wordless": {"test"}, "synonyms": {None}, "cloze": {None}}.get(name, LAST)
    return [r for r in builtin_rows(name) if r.get("split") in split]


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_set_is_as_it_was(name):
    lines = [
        r if isinstance(r, str) else json.dumps(r, ensure_ascii=False, sort_keys=True) for r in rows_of(name)
    ]
    found = hashlib.sha256("".join(f"{x}\n" for x in lines).encode()).hexdigest()
    assert {"rows": len(lines), "sha256": found} == FROZEN[name], (
        "a changed set is another: give it a new name"
    )


def texts_of(row):
    "All that somebody wrote in a row."
    if isinstance(row, str):
        return [row]
    plain = {"label", "split", "group", "concept", "kind", "topic", "register"}
    found = [v for k, v in row.items() if k not in plain]
    return [x for v in found for x in (v if isinstance(v, list) else [v])]


def grams(texts, n=8):
    "Runs of words; the house template of `support` is meant to be the same throughout."
    words = [split_words(t.replace("Owner: the desk on duty.", "")) for t in texts]
    return {tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)}


@pytest.mark.parametrize("name", [n for n in FROZEN if n not in ("synonyms", "cloze")])
def test_fresh_texts_share_no_eight_words_with_what_was_fitted_or_tuned(name):
    fresh = grams(t for r in rows_of(name) for t in texts_of(r))
    older = [
        x
        for file in SETS.iterdir()
        if file.name.endswith(".jsonl")
        for r in builtin_rows(file.name.removesuffix(".jsonl"))
        if r.get("split") not in {*LAST, None} and not (name == "wordless" and r.get("split") == "test")
        for x in texts_of(r)
    ]
    older += load_corpus("general").texts + load_corpus("neutral").texts + load_corpus("prose").texts[:12]
    shared = fresh & grams(older)
    assert not shared, sorted(shared)[:5]


def test_fresh_emotions_are_new_scenes_and_do_not_name_themselves():
    rows = builtin_rows("emotions")
    fresh, old = ([r["text"] for r in rows if (r["split"] == "fresh") is new] for new in (True, False))
    assert [sum(r["label"] == e for r in rows if r["split"] == "fresh") for e in EMOTIONS] == [40] * 6
    assert not [t for t in fresh if NAMED.search(t)]
    assert not [(a, b) for a, b in itertools.product(fresh, old) if overlap(a, b) > 0.2]
    assert len(load_task("emotions/fear", "fresh")) == 200


def test_behaviours_have_fresh_rows():
    for b in BEHAVIOURS:
        fresh, test = load_task(f"behaviours/{b}", "fresh"), load_task(f"behaviours/{b}", "test")
        assert len(fresh) == 32 and not {*fresh.groups} & {*test.groups}


def test_wordless_endings_show_and_do_not_name():
    rows = builtin_rows("wordless")
    assert [sum(r["split"] == s for r in rows) for s in ("tune", "test")] == [24, 46]
    for r in rows:
        ends = [r[e] for e in EMOTIONS]
        assert len({*ends}) == 6 and all(x.startswith(" ") and 3 <= len(x.split()) <= 10 for x in ends)
        assert not NAMED.search(r["prompt"] + " ".join(ends)) and not WORDS & {*split_words(" ".join(ends))}
    for e in EMOTIONS:
        task = load_task(f"wordless/{e}")
        assert len(task) == 46 and {i.target for i in task.items} == {EMOTIONS.index(e)}


def test_synonyms_are_other_words_in_turn():
    words = [w for r in builtin_rows("synonyms") for w in r["words"]]
    assert not {*EMOTIONS} & {*words}
    assert len({*words}) == len(words) == 30
    task, asked = load_task("synonyms/anger", "tune"), load_task("emotions/anger", "tune")
    assert task.prompts == asked.prompts and len({i.choices for i in task.items}) == 5


def test_prose_is_long_and_in_twelve_registers():
    texts = load_corpus("prose").texts
    assert len(texts) == 48 and all(60 <= len(t.split()) <= 130 for t in texts)
    assert sum(len(t.split()) for t in texts[:12]) > 800


def test_twins_differ_in_harm_and_not_in_form():
    rows = builtin_rows("twins")
    by_twin = {
        g: {r["kind"]: r["prompt"] for r in rows if r["group"] == g} for g in {r["group"] for r in rows}
    }
    assert len(by_twin) == 60 and all({*t} == {"harmful", "benign"} for t in by_twin.values())
    lengths = [[len(t[k].split()) for t in by_twin.values()] for k in ("harmful", "benign")]
    assert abs(sum(lengths[0]) / sum(lengths[1]) - 1) < 0.1
