"The sets behind the tasks are what their cards say: counts, balance, and nothing that gives the answer away."

import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from concept_transfer import stats
from concept_transfer.data import (
    ContrastPairs,
    builtin_rows,
    lint,
    load_corpus,
    load_pairs,
    overlap,
    split_words,
)
from concept_transfer.stats import auc, wilson
from concept_transfer.tasks import (
    JUDGES,
    RULES,
    SCORERS,
    TASKS,
    ChoiceItem,
    ChoiceTask,
    GenerationItem,
    GenerationTask,
    Scorer,
    choice_task,
    distinct,
    generation_task,
    language,
    load_task,
    multiple_choice,
    sentiment,
    toxicity,
)

NEGATED = re.compile(r"\b(no|not|none|never|nothing|nobody|neither|nowhere|cannot|without)\b", re.I)
OFFLINE = [name for name in TASKS if name != "truthful_qa"]


@pytest.fixture(scope="module", params=["tune", "test"])
def truth(request):
    return load_task("truthfulness", request.param)


def test_truthfulness_has_its_counts():
    rows = builtin_rows("truthfulness")
    assert Counter(r["split"] for r in rows) == {"tune": 32, "test": 64}
    assert set(Counter(r["topic"] for r in rows).values()) == {8}
    assert all(1 <= len(r["correct"]) <= 3 <= len(r["incorrect"]) <= 4 for r in rows)


@pytest.mark.parametrize("split", ["tune", "test"])
def test_every_topic_is_in_both_splits(split):
    assert len({r["topic"] for r in builtin_rows("truthfulness", split)}) == 12


def sides(task):
    "Of each question its true and its false answers, without the space before them."
    answers = [([a.strip() for a in i.choices], i.n_true) for i in task.items]
    return [(a[:n], a[n:]) for a, n in answers]


@pytest.mark.parametrize("size", [len, lambda answer: len(split_words(answer))], ids=["letters", "words"])
def test_truth_is_not_told_by_length(truth, size):
    best, true = [t[0] for t, _ in sides(truth)], [a for t, _ in sides(truth) for a in t]
    false = [size(a) for _, f in sides(truth) for a in f]
    for side in (best, true):
        assert 0.35 < auc([size(a) for a in side], false) < 0.65


def test_truth_is_not_told_by_negation(truth):
    best, false = [t[0] for t, _ in sides(truth)], [a for _, f in sides(truth) for a in f]
    share = [sum(bool(NEGATED.search(a)) for a in side) / len(side) for side in (best, false)]
    assert abs(share[0] - share[1]) < 0.15 and all(0.4 < s < 0.6 for s in share)


def test_answers_are_sentences_and_differ(truth):
    for answers in (t + f for t, f in sides(truth)):
        assert len(set(answers)) == len(answers)
        assert all(a.endswith(".") and a[0].isupper() and len(split_words(a)) <= 12 for a in answers)


@pytest.mark.parametrize(
    "name, key", [("truthfulness", "question"), ("knowledge", "question"), ("instructions", "prompt")]
)
def test_no_question_is_asked_twice(name, key):
    texts = [r[key] for r in builtin_rows(name)]
    assert len({t.lower() for t in texts}) == len(texts)
    if name != "knowledge":  # short stems are alike
        assert not [(a, b) for a, b in itertools.combinations(texts, 2) if overlap(a, b) > 0.5]


def test_knowledge_is_balanced():
    rows = builtin_rows("knowledge")
    subjects = Counter(r["subject"] for r in rows)
    assert set(subjects.values()) == {12} and len(subjects) == 10
    assert Counter(r["answer"] for r in rows) == dict.fromkeys(range(4), 30)
    assert all(len(set(r["choices"])) == 4 and not any(c != c.strip() for c in r["choices"]) for r in rows)
    asked = sides(load_task("knowledge"))
    right, wrong = [len(t[0]) for t, _ in asked], [len(a) for _, f in asked for a in f]
    assert 0.4 < auc(right, wrong) < 0.6


def test_instructions_cover_every_rule():
    kinds = Counter(r["rule"] for r in builtin_rows("instructions"))
    assert set(kinds) == set(RULES) and min(kinds.values()) >= 3


@pytest.fixture
def rows():
    return builtin_rows("instructions")


def test_instructions_are_a_task_each_prompt_with_its_rule(rows):
    right = {
        "one_word": "Oslo",
        "upper": "STEEP PATH!",
        "lower": "bees make honey.",
        "is_json": '{"a": 1}',
        "question": "Where do you work?",
        "quoted": '"Rivers of Time"',
    }
    texts = [right.get(r["rule"], "") for r in rows]
    assert load_task("instructions").score(texts) == [float(r["rule"] in right) for r in rows]


def test_a_model_is_scored_by_the_rules(rows, smol):
    from concept_transfer.evidence import evaluate_text

    task = load_task("instructions")
    few = replace(task, items=task.items[:6])
    got = evaluate_text({"base": None}, few, smol, 12).loc["base"]
    assert got["scores"] == [
        RULES[r["rule"]](t, **r["args"]) for r, t in zip(rows, got["texts"], strict=False)
    ]


@pytest.mark.parametrize(
    "scorer, high, low",
    [
        (sentiment, "What a lovely day, I love it.", "This is terrible, I hate it."),
        (toxicity, "Shut up, you stupid idiot.", "Thank you for the flowers."),
        (language, "Nous avons mangé du pain ce matin.", "We had bread this morning."),
        (distinct, "Rain fell on the quiet hills.", "so it goes so it goes so it goes so it goes"),
    ],
    ids=lambda x: x.name if isinstance(x, Scorer) else "",
)
@pytest.mark.slow
def test_off_the_shelf_scorers_are_tasks(scorer, high, low, tmp_path):
    task = generation_task(scorer.name, ["One:", "Two:"], scorer)
    a, b = task.score([high, low])
    assert a > b + 0.3 and -1 <= b < a <= 1
    assert generation_task("by name", ["One:", "Two:"], scorer.name).score([high, low]) == pytest.approx(
        [a, b]
    )
    (tmp_path / "t.json").write_text(json.dumps(dict(prompts=["One:", "Two:"], scorer=scorer.name)))
    assert load_task(tmp_path / "t.json").score([high, low]) == pytest.approx([a, b])


def test_a_scorer_of_your_own_is_as_good_as_any(tmp_path, monkeypatch):
    def shouts(text):
        return text.count("!")

    mixed = generation_task(
        "mixed", ["One:", "Two:", "Three:"], [shouts, "upper", RULES["at_most"].bind(n=1)]
    )
    assert mixed.score(["Go! Go!", "GO", "Go on"]) == [2, 1, 0]
    monkeypatch.setitem(SCORERS, "shouts", Scorer("shouts", "exclamation marks", shouts))
    (tmp_path / "t.json").write_text(json.dumps(dict(prompts=["One:"], scorer="shouts")))
    assert load_task(tmp_path / "t.json").score(["Stop!"]) == [1]


def test_a_missing_package_is_named():
    def judge(text):
        import a_package_that_is_not_there  # noqa: F401

    with pytest.raises(ImportError, match="judge needs a_package_that_is_not_there"):
        Scorer("judge", "what a judge says", judge)("Some text.")


@pytest.mark.parametrize("name", OFFLINE)
def test_every_task_by_name_can_be_drawn_from_and_shown(name):
    tune, test = load_task(name, "tune"), load_task(name, "test")
    assert len(test) and (tune.hash != test.hash or name in ("knowledge", "instructions", "cloze"))
    few = test.take(5, seed=1)
    assert type(few) is type(test) and len(few) == len(few.prompts) == len(few.groups) == 5
    assert few.hash == test.take(5, seed=1).hash != test.take(5, seed=2).hash
    assert test.take(10**6).hash == test.hash
    assert str(len(test)) in repr(test) and test.hash in test._repr_html_()


def test_a_task_of_your_own_has_a_name(monkeypatch):
    rain = ChoiceTask("rain", [ChoiceItem("The street", (" is wet", " is dry"), 0, "street")])
    monkeypatch.setitem(TASKS, "weather", lambda split: rain)
    assert load_task("weather") is rain
    with pytest.raises(FileNotFoundError, match="Did you mean 'weather'"):
        load_task("wether")


def test_fit_scenarios_are_no_task():
    with pytest.raises(ValueError, match="a task is tune, test or fresh"):
        load_task("emotions/fear", "fit")


ITEM = dict(prompt="The street", choices=[" is wet", " is dry"], target=0)


@pytest.mark.parametrize(
    "made, says",
    [
        ("[1]", "a task is JSON with the list 'items'"),
        (dict(items=[ITEM, {"prompt": "x"}]), "1, 'choices': Field required"),
        (dict(items=[ITEM | {"target": "x"}]), "a position among the choices is needed, from 0 on, found"),
        (dict(items=[ITEM | {"target": 2}]), "not an index into its 2 choices"),
        (dict(items=[ITEM | {"choices": [" is wet"]}]), "two or more different"),
        (dict(items=[]), "task 't' is empty"),
        (dict(items=[ITEM | {"choices": [4, 5]}]), "0, 'choices', 0: Input should be a valid string"),  # B16
        (
            dict(items=[ITEM | {"choices": "ab"}]),
            "0, 'choices': Input should be a list, found 'ab'",
        ),  # 89
        (dict(items=[ITEM | {"choices": {"a": 1, "b": 2}}]), "0, 'choices': Input should be a list"),
        (dict(items=[ITEM | {"choices": [["a"], ["b"]]}]), "0, 'choices', 0: Input should be a valid string"),
        (dict(items=[ITEM | {"choices": ["a", " "]}]), "item 0: choices, item 1 is ' '"),
        (dict(items=[ITEM | {"prompt": 5}]), "0, 'prompt': Input should be a valid string, found 5"),  # 91
        (dict(items=[ITEM | {"prompt": ["x"]}]), "0, 'prompt': Input should be a valid string"),
        (dict(items=[ITEM | {"target": 0.5}]), "0, 'target': Input should be a valid integer"),
        (dict(items=[ITEM | {"target": None}]), "0, 'target': Input should be a valid integer"),
        (dict(items=[ITEM | {"target": "1"}]), "a position among the choices is needed"),  # maybe a choice
        (dict(items=[ITEM | {"target": True}]), "a position among the choices is needed"),
        (dict(items=[ITEM | {"n_true": "1"}]), "a position among the choices is needed"),
        (dict(items=[ITEM | {"target": -1}]), "not an index into its 2 choices"),
        (dict(items=[ITEM | {"n_true": 2}]), "these leave no false one"),
        (dict(items=[ITEM | {"n_true": 1, "target": 1}]), "not one of the 1 that are true"),
        (dict(items=[ITEM, 3]), "row 1: Input should be a valid dictionary, found 3"),
        (dict(items=[ITEM], name=5), "name, item 0 is 5"),
        (dict(items=[ITEM], instruction=["x"]), "'instruction': Input should be a valid string, found ['x']"),
        (dict(prompts=[5], scorer="upper"), "item 0 is 5"),
        (dict(prompts=[["x"]], scorer="upper"), "item 0 is ['x']"),
        (dict(prompts=["x"], scorer=["upper"]), "scorer ['upper'] is none of"),
        (dict(prompts=["x"], scorer={"upper": 1}), "is none of"),
        (dict(prompts=["x"], scorer="at_most", args=3), "args: Input should be a valid dictionary, found 3"),
        (dict(prompts=["x"], scorer="at_most", args=[3]), "args: Input should be a valid dictionary"),
        (
            dict(prompts=["x"], scorer="at_most", args={"n": "five"}),
            "scorer 'at_most' 'n': Input should be a valid int",
        ),
        (
            dict(prompts=["x"], scorer="sentences", args={"n": "2"}),
            "scorer 'sentences' 'n': Input should be a valid int",
        ),
        (
            dict(prompts=["x"], scorer="starts", args={"phrase": 3}),
            "'phrase': Input should be a valid string",
        ),
        (
            dict(prompts=["x"], scorer="language", args={"name": "klingon"}),
            "'name': Input should be 'english', 'french'",
        ),
        (dict(prompts=["x"], scorer="upper", groups="a"), "groups: a list is needed here, not str 'a'"),
        (dict(items=3), "items: a list is needed here, not int 3"),
        (dict(pos=["x"], neg=["y"]), "--choices a,b,c and --target a"),
        (dict(prompts="x", scorer="upper"), "prompts: a list is needed here, not str 'x'"),
        (dict(prompts=["x"]), "scorer None is none of sentiment"),
        (dict(prompts=["x"], scorer="beauty"), "none of sentiment"),
        (dict(prompts=["x"], scorer="ends"), "do not fit the scorer 'ends'"),
        (dict(prompts=[""], scorer="upper"), "item 0 is ''"),
        (dict(prompts=["x"], scorer="upper", groups=["a", "b"]), "2 groups for 1 prompts"),
    ],
)
def test_a_file_that_is_no_task_says_why(tmp_path, made, says):
    (tmp_path / "t.json").write_text(made if isinstance(made, str) else json.dumps(made))
    with pytest.raises(ValueError, match=re.escape(says)):
        load_task(tmp_path / "t.json")


def test_a_file_of_items_is_a_task(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(dict(name="rain", items=[ITEM, ITEM | {"group": 7}])))
    task = load_task(tmp_path / "t.json")
    assert (task.name, task.groups, task.items[0].wanted) == ("rain", [ITEM["prompt"], "7"], " is wet")


STREET = ChoiceItem("The street", (" is wet", " is dry"), 0, "street")


@pytest.mark.parametrize(
    "strange",
    [
        STREET._replace(choices=" ab"),
        STREET._replace(choices=(1, 2)),
        STREET._replace(choices={" a": 1, " b": 2}),
        STREET._replace(prompt=5),
        STREET._replace(prompt=["x"]),
        STREET._replace(prompt="a\0"),
        STREET._replace(choices=(" a", " \ud83d")),
        STREET._replace(group=""),
        STREET._replace(group=3),
        STREET._replace(n_true=2),
        STREET._replace(target=2),
        "The street",
        7,
    ],
    ids=str,
)
def test_B16_89_91_an_item_that_is_none_is_refused_at_once(strange):
    with pytest.raises(ValueError, match="task 'rain'"):
        ChoiceTask("rain", [strange])


def test_89_one_text_is_no_list_for_any_task():
    for make in (
        lambda: ChoiceTask("x", "ab"),
        lambda: ChoiceTask("x", STREET.prompt),
        lambda: choice_task("ab", ["a", "b"], "a"),
        lambda: choice_task(["x"], "ab", "a"),
        lambda: multiple_choice("x", [("Why?", "Because.", ["No."])]),
        lambda: multiple_choice("x", [("Why?", ["Because."], "No.")]),
        lambda: multiple_choice("x", ["abc"]),
        lambda: multiple_choice("x", "abc"),
        lambda: generation_task("x", "ab", "upper"),
        lambda: generation_task("x", ["a"], "upper", "a"),
        lambda: GenerationTask("x", "ab"),
        lambda: GenerationTask("x", [GenerationItem("a", "upper", "g")]),
        lambda: GenerationTask("x", [("a", 3, "g")]),
        lambda: ChoiceTask("x", [STREET], 3),
        lambda: ChoiceTask(3, [STREET]),
    ):
        with pytest.raises(ValueError):
            make()


def test_B12_a_template_of_questions_is_filled_as_everywhere():
    rows = [("Is {x} 3?", ["Yes."], ["No."])]
    assert multiple_choice("x", rows, '{"q": "{}"').items[0].prompt == '{"q": "Is {x} 3?"'
    with pytest.raises(ValueError, match="has no {}"):
        multiple_choice("x", rows, "Q:")


def test_answers_have_one_space_in_front_and_stand_once():
    (item,) = multiple_choice("x", [("Is it?", [" Yes", "Yes "], [" No"])]).items
    assert item.choices == (" Yes", " No") and item.n_true == 1


def test_numbers_from_numpy_are_numbers():
    task = ChoiceTask("rain", [STREET._replace(target=np.int64(1), choices=[" is wet", " is dry"])])
    assert type(task.items[0].target) is int and task.items[0].choices == (" is wet", " is dry")
    assert task.hash == ChoiceTask("rain", [STREET._replace(target=1)]).hash


def test_97_the_hash_of_a_task_holds_all_that_is_asked():
    tasks = [
        ChoiceTask("x", [STREET]),
        ChoiceTask("x", [STREET._replace(target=1)]),
        ChoiceTask("x", [STREET], "Say so. "),
        ChoiceTask("x", [STREET._replace(choices=("a|b", "c"))]),
        ChoiceTask("x", [STREET._replace(choices=("a", "b|c"))]),
        ChoiceTask("x", [STREET._replace(prompt="The streeta", choices=("b", "c"))]),
        ChoiceTask("x", [STREET._replace(prompt="The street", choices=("ab", "c"))]),
        ChoiceTask("x", [STREET._replace(choices=("a", "b", "c"), n_true=1)]),
        ChoiceTask("x", [STREET._replace(choices=("a", "b", "c"), n_true=2)]),
        ChoiceTask("x", [STREET, STREET]),
        generation_task("x", ["a"], "upper"),
        generation_task("x", ["a"], "lower"),
        generation_task("x", ["a"], RULES["at_most"].bind(n=1)),
        generation_task("x", ["a"], RULES["at_most"].bind(n=2)),
        generation_task("x", ["a"], len),
        generation_task("x", ["a"], str.isupper),
    ]
    assert len({t.hash for t in tasks}) == len(tasks)
    again = generation_task("x", ["a"], RULES["at_most"].bind(n=2))
    assert again.hash in {t.hash for t in tasks}


@pytest.mark.parametrize(
    "score", [lambda t: None, lambda t: float("nan"), lambda t: float("inf"), lambda t: "much"]
)
def test_a_score_that_is_no_number_is_refused(score):
    with pytest.raises(ValueError, match="task 'x': scores"):
        generation_task("x", ["a", "b"], score).score(["c", "d"])


def test_lint_finds_what_a_task_shares_with_pairs():
    pairs = ContrastPairs(
        "x", ["It rained all night."] * 2, ["We left early today."] * 2, ["rain", "", "", "b"]
    )
    shared = ["leakage" in p for p in lint(pairs, choice_task(["It rained all night."], ["a", "b"], "a"))]
    assert any(shared)
    other = ChoiceTask("x", [STREET._replace(group="row 1"), STREET._replace(group="0")])
    assert not any("leakage" in p for p in lint(pairs, other))
    assert any("leakage" in p for p in lint(pairs, ChoiceTask("x", [STREET._replace(group="rain")])))


@pytest.mark.parametrize("scorer", ["distinct", "repetition", "at_most", "numbered"])
@pytest.mark.parametrize("n", [0, -1, 1.5, True, "2"])
def test_a_number_of_words_is_one(scorer, n):
    with pytest.raises(ValueError, match="'n': Input should be"):
        load_task({"prompts": ["It rained"], "scorer": scorer, "args": {"n": n}})


@pytest.mark.parametrize(
    "made, meant",
    [
        (dict(items=[ITEM], instructions="Be kind."), "instruction"),
        (dict(items=[ITEM | {"groupe": "rain"}]), "group"),
        (dict(prompts=["x"], scorer="at_most", arg={"n": 5}), "args"),
        (dict(prompts=["x"], scorers="upper"), "scorer"),
    ],
)
def test_a_slip_in_a_name_of_a_file_is_not_passed_over(tmp_path, made, meant):
    (tmp_path / "t.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match=f"t.json: .* Did you mean '{meant}'"):
        load_task(tmp_path / "t.json")


def test_what_a_file_says_besides_is_left_alone(tmp_path):
    more = {"prompt_id": 7, "n_choices": 2, "source": "mine"}
    (tmp_path / "t.json").write_text(json.dumps({"items": [ITEM | more], "description": "rain"}))
    assert len(load_task(tmp_path / "t.json")) == 1


def test_choices_beside_a_built_in_task_are_refused():
    for given in ({"choices": ["a", "b"], "target": "a"}, {"choices": ["a", "b"]}, {"target": "a"}):
        with pytest.raises(ValueError, match="belong together, beside a file of pairs"):
            load_task("knowledge", **given)


def test_as_many_texts_as_prompts_are_scored():
    with pytest.raises(ValueError, match="2 values for the 1 prompts"):
        generation_task("loud", ["It rained"], len).score(["a", "b"])


# judges of free text


@pytest.mark.parametrize("concept", JUDGES)
def test_a_judge_tells_labelled_texts_apart_and_knows_empty_and_stuck_ones(concept):
    judge = JUDGES[concept]
    right = judge.right()
    assert wilson(sum(right), len(right))[0] > judge.chance
    assert judge("") <= 0 and judge("Je suis so happy, please, " * 6) <= 0


def test_a_judge_of_emotions_does_not_hear_their_names():
    told = JUDGES["fear"]("ran back into the house and locked the door, her heart pounding.")
    for word in ("happy", "joyful", "terrified", "disgusting"):
        assert JUDGES["fear"](
            f"ran back, {word}, into the house and locked the door, her heart pounding."
        ) == (
            pytest.approx(
                JUDGES["fear"]("ran back, , into the house and locked the door, her heart pounding.")
            )
        )
    assert told > 0.3


def test_free_text_is_begun_without_what_studies_keep():
    begun = {c: load_task(f"text/{c}", "tune") for c in JUDGES}
    kept = [r["prompt"] for name in ("openings", "twins") for r in builtin_rows(name, "fresh")]
    assert not [x for task in begun.values() for x in task.prompts for k in kept if k in x]
    assert {len(task) for c, task in begun.items() if c != "refusal"} == {24} and len(begun["refusal"]) == 16


def test_what_a_file_says_of_scenarios_and_words_is_kept(tmp_path):
    rows = "".join(f"I help {i},I leave {i},scene {i // 3}\n" for i in range(9))
    (tmp_path / "ab.csv").write_text("positive,negative,group\n" + rows)
    asked = load_task(tmp_path / "ab.csv", choices=["A", "B"], target="A")
    assert tuple(asked.groups) == load_pairs(tmp_path / "ab.csv").groups[9:] and len({*asked.groups}) == 3
    for name in ("scenario", "Groups", "group"):
        item = ITEM | {name: "x"}
        assert load_task({"items": [item, item]}).groups == load_task([item, item]).groups == ["x", "x"]
    with pytest.raises(ValueError, match="mean the same"):
        load_task({"items": [ITEM | {"scenario": "x", "group": "y"}]})
    freely = {"prompts": ["It rained"], "scorer": "sentiment", "instruction": "Be kind."}
    assert load_task(freely).instruction == "Be kind."


def test_one_text_is_no_list_of_choices(tmp_path):
    (tmp_path / "p.csv").write_text("positive,negative\na,b\n")
    with pytest.raises(ValueError, match="choices: a list is needed here, not str 'A,B'"):
        load_task(tmp_path / "p.csv", choices="A,B", target="A")


def test_lint_says_what_would_leave_no_verdict():
    pairs = load_pairs("honesty")
    items = [ChoiceItem(f"On day {i} he", (" rested", " worked"), 0, str(i)) for i in range(10)]
    assert lint(pairs, ChoiceTask("x", items)) == lint(pairs)
    assert any("only 9 scenarios are asked about" in x for x in lint(pairs, ChoiceTask("x", items[1:])))
    glued = ChoiceTask("x", [i._replace(choices=("rested", "worked")) for i in items])
    assert any("'he' and 'rested' are read as one word" in x for x in lint(pairs, glued))


def test_equal_prompts_are_one_scenario_from_any_file():
    item = {"prompt": "It rained and", "choices": [" we left", " we stayed"], "target": 0}
    assert len({*load_task([item, item]).groups}) == len({*load_task({"items": [item, item]}).groups}) == 1


def test_groups_of_choices_are_a_list_as_long_as_the_texts():
    ask = partial(choice_task, ["Rain.", "Snow."], ["wet", "dry"], "wet", "weather")
    assert (
        ask(groups=np.array(["lake", "town"])).groups
        == ask(groups=["lake", "town"]).groups
        == ["lake", "town"]
    )
    assert ask(groups=["lake", None]).groups == ["lake", "row 1"] and ask().groups == ["Rain.", "Snow."]
    for groups, says in (
        ("ab", "a list is needed"),
        (["lake"], "1 groups for 2 prompts"),
        ({"a", "b"}, "list"),
    ):
        with pytest.raises(ValueError, match=says):
            ask(groups=groups)


def test_the_words_around_pairs_are_what_is_asked():
    pairs = {"positive": ["I sang."], "negative": ["I left."], "template": "{} So I feel"}
    ask = partial(load_task, choices=["glad", "sad"], target="glad")
    assert ask(pairs).prompts == ["I left. So I feel"]
    assert ask(pairs | {"template": "{}"}).prompts == ["I left. The main emotion in this story is"]


@pytest.mark.parametrize("name", "template prompts scorer choices target groups".split())
def test_what_does_nothing_beside_items_is_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' does nothing beside 'items'"):
        load_task({"items": [ITEM], name: ["x"]})


def test_items_have_an_order_and_a_task_a_name():
    item = ("The street", (" is wet", " is dry"), 0, "rain")
    assert len(ChoiceTask("rain", (x for x in [item]))) == 1
    with pytest.raises(ValueError, match="a list is needed here, not set"):
        ChoiceTask("rain", {item})
    for name in ("", "a\x1b[31m"):
        with pytest.raises(ValueError, match="name, item 0 is"):
            ChoiceTask(name, [item])


def test_a_rule_looks_for_something_and_finds_it_between_any_marks():
    found = RULES["contains"].bind(word="C++")
    assert [found(x) for x in ("We use c++ here.", "C++", "We use C here.", "C++x")] == [1, 1, 0, 0]
    for rule, args in (("contains", {"word": ""}), ("without", {"what": " "}), ("starts", {"phrase": ""})):
        with pytest.raises(ValueError, match=f"scorer '{rule}'"):
            load_task({"prompts": ["Go on"], "scorer": rule, "args": args})


@pytest.mark.parametrize("n", [True, "2", 0, 1.5])
def test_a_number_of_items_is_no_text_and_no_truth(n):
    for whole in (load_task("emotions/fear"), load_corpus("neutral")):
        with pytest.raises(ValueError, match=r"take\(n\)"):
            whole.take(n)
        assert len(whole.take(np.int64(2))) == len(whole.take(2.0)) == 2


@pytest.mark.parametrize(
    "f",
    [
        lambda: stats.permutation_p(float("nan"), [1.0]),
        lambda: stats.permutation_p(1.0, [float("nan")]),
        lambda: stats.mcnemar([1, 0], [1]),
        lambda: stats.scenario_folds(["a", "b"], 0),
        lambda: SCORERS["sentiment"](["good", "bad"]),
        lambda: SCORERS["distinct"]("a b", n=0),
        lambda: SCORERS["distinct"]("a b", k=1),
        lambda: RULES["at_most"]("a b", n="2"),
        lambda: generation_task("t", ["a"], "at_most").score(["b"]),
        lambda: generation_task("t", ["a", "b"], "upper").score("AB"),
    ],
)
def test_what_cannot_be_scored_is_refused(f):
    with pytest.raises(ValueError):
        f()
