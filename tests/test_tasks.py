"The sets behind the tasks are what their cards say: counts, balance, and nothing that gives the answer away."
import itertools, json, re
from collections import Counter
from dataclasses import replace

import pytest

from concept_transfer.data import _auc, _builtin, _near, _words
from concept_transfer.evaluation import evaluate_text
from concept_transfer.tasks import (RULES, GenerationTask, distinct, follows, instruction_task, language, load_generation_task, load_instructions, load_knowledge, load_truthfulness,
                                    sentiment, toxicity)

NEGATED = re.compile(r"\b(no|not|none|never|nothing|nobody|neither|nowhere|cannot|without)\b", re.I)


@pytest.fixture(scope="module", params=["tune", "test"])
def truth(request): return load_truthfulness(request.param)


def test_truthfulness_has_its_counts():
    rows = _builtin("truthfulness")
    assert Counter(r["split"] for r in rows) == {"tune": 32, "test": 64}
    assert set(Counter(r["topic"] for r in rows).values()) == {8}
    assert all(1 <= len(r["correct"]) <= 3 <= len(r["incorrect"]) <= 4 for r in rows)


def test_every_topic_is_in_both_splits(truth): assert len(set(truth.topics)) == 12


def test_truth_is_not_told_by_length(truth):
    best, true, false = [t[0] for t in truth.true], [a for t in truth.true for a in t], [a for f in truth.false for a in f]
    for size, side in itertools.product((len, lambda a: len(_words(a))), (best, true)):
        assert .35 < _auc(list(map(size, side)), list(map(size, false))) < .65


def test_truth_is_not_told_by_negation(truth):
    best, false = [t[0] for t in truth.true], [a for f in truth.false for a in f]
    share = [sum(bool(NEGATED.search(a)) for a in side) / len(side) for side in (best, false)]
    assert abs(share[0] - share[1]) < .15 and all(.4 < s < .6 for s in share)


def test_answers_are_sentences_and_differ(truth):
    for answers in (t + f for t, f in zip(truth.true, truth.false)):
        assert len(set(answers)) == len(answers) and all(a.endswith(".") and a[0].isupper() and len(_words(a)) <= 12 for a in answers)


@pytest.mark.parametrize("name, key", [("truthfulness", "question"), ("knowledge", "question"), ("instructions", "prompt")])
def test_no_question_is_asked_twice(name, key):
    texts = [r[key] for r in _builtin(name)]
    assert len({t.lower() for t in texts}) == len(texts)
    if name != "knowledge": assert not [(a, b) for a, b in itertools.combinations(texts, 2) if _near(a, b) > .5]   # short stems are alike


def test_knowledge_is_balanced():
    rows = _builtin("knowledge")
    assert set(Counter(r["subject"] for r in rows).values()) == {12} and len({r["subject"] for r in rows}) == 10
    assert Counter(r["answer"] for r in rows) == dict.fromkeys(range(4), 30)
    assert all(len(set(r["choices"])) == 4 and not any(c != c.strip() for c in r["choices"]) for r in rows)
    task = load_knowledge(); right, wrong = [len(t[0]) for t in task.true], [len(a) for f in task.false for a in f]
    assert .4 < _auc(right, wrong) < .6


def test_instructions_cover_every_rule():
    kinds = Counter(r["rule"] for r in load_instructions())
    assert set(kinds) == set(RULES) and min(kinds.values()) >= 3


def test_instructions_are_a_task_each_prompt_with_its_rule(smol):
    task = instruction_task(); rows = load_instructions()
    right = {"one_word": "Oslo", "upper": "STEEP PATH!", "lower": "bees make honey.", "is_json": '{"a": 1}', "question": "Where do you work?", "quoted": '"Rivers of Time"'}
    texts = [right.get(r["rule"], "") for r in rows]
    assert task.score(texts) == [float(r["rule"] in right) for r in rows]
    few = replace(task, prompts=task.prompts[:6], scorer=task.scorer[:6], groups=task.groups[:6]); got = evaluate_text({"base": None}, few, smol, 12)["base"]
    assert got["scores"] == [float(follows(r, t)) for r, t in zip(rows, got["texts"])]


@pytest.mark.parametrize("scorer, name, high, low", [
    (sentiment, "sentiment", "What a lovely day, I love it.", "This is terrible, I hate it."), (toxicity, "toxicity", "Shut up, you stupid idiot.", "Thank you for the flowers."),
    (language, "language", "Nous avons mangé du pain ce matin.", "We had bread this morning."), (distinct, "distinct", "Rain fell on the quiet hills.", "so it goes so it goes so it goes so it goes")])
def test_off_the_shelf_scorers_are_tasks(scorer, name, high, low, tmp_path):
    task = GenerationTask(name, ["One:", "Two:"], scorer); a, b = task.score([high, low]); assert a > b + .3
    (tmp_path/"t.json").write_text(json.dumps(dict(prompts=["One:", "Two:"], scorer=name))); assert load_generation_task(tmp_path/"t.json").score([high, low]) == pytest.approx([a, b])
