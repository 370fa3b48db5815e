"Planted truths: where the answer is known, the evidence must find it."

import json
import shutil
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from concept_transfer import arms as module
from concept_transfer.arms import (
    ARMS,
    PUSHES,
    Arm,
    Run,
    Settings,
    Trial,
    Unsteered,
    Words,
    few_shot,
    native_direction,
    readouts_of,
)
from concept_transfer.concepts import extract_concept
from concept_transfer.data import (
    EMOTION_PROMPT,
    EMOTIONS,
    ContrastPairs,
    Corpus,
    builtin_rows,
    data_hash,
    load_corpus,
    load_pairs,
)
from concept_transfer.evidence import Evidence, evaluate, evaluate_text, off_target
from concept_transfer.maps import fit_maps
from concept_transfer.measure import METRICS, Bench, Metric, word_direction
from concept_transfer.models import model_info, tiny_model, twin
from concept_transfer.report import verdict, write_report
from concept_transfer.selection import choose
from concept_transfer.steering import generate, place, seeded
from concept_transfer.tasks import BEHAVIOURS, ChoiceItem, ChoiceTask, Judge, generation_task, load_task

PAIRS = load_pairs("emotions/happiness")
NEUTRAL = Corpus("neutral", load_corpus("neutral").texts[:48])
WORDS = (
    "red blue cold warm old new near far open shut soft hard wet dry late early dark light loud calm".split()
)
EQUAL = ("equal_damage",)


@pytest.fixture(scope="module")
def pair():
    m = tiny_model("qwen2", max_position_embeddings=256)
    t, _ = twin(m)
    texts = [x for e in ("sadness", "fear", "anger") for x in load_pairs(f"emotions/{e}").texts]
    joy, maps = extract_concept(m, PAIRS), fit_maps(m, t, Corpus("scenes", texts), [2], [2])
    return m, t, place(replace(joy, template="{}"), t, map=maps[2, 2])


@pytest.fixture(scope="module")
def pushed(pair):
    "Every word asked of every scene, its log-probability (n, words) before and after the twin's own push."
    _, t, _ = pair
    words = tuple(f" {w}" for w in WORDS)
    scenes = [x for e in ("fear", "anger") for x in load_pairs(f"emotions/{e}", "test").positive]
    whole = ChoiceTask("all", [ChoiceItem(f"{x} It was", words, 0, x) for x in scenes])
    native = place(extract_concept(t, PAIRS), t, 2, dose=0.5)
    before, after = (np.array(a.logp) for a in Bench(t, 2, whole).ask([None, native]))  # (n, words)
    return whole, before, after


@pytest.fixture(scope="module")
def task(pushed):
    "Two answers a scenario: the base model prefers one, the twin's own direction makes it prefer the other."
    whole, before, after = pushed
    words = whole.items[0].choices
    items = []
    for item, b, p in zip(whole.items, before, after, strict=True):
        gain = (p[:, None] - p) * ((b[:, None] - b) < 0)
        k, j = np.unravel_index(gain.argmax(), gain.shape)  # k overtakes j by most
        if gain[k, j] > 0:
            items.append(item._replace(choices=(words[k], words[j])))
    return ChoiceTask("planted", items, "Say it.\n\n")


@pytest.fixture(scope="module")
def few(task):
    "Where it does not matter how many there are."
    return task.take(12)


def asked(pair, task, path=None, experiments=("equal_damage", "equal_norm", "curves"), arms=ARMS, **settings):
    chosen = Settings(**({"damage": 0.5, "bootstrap": 500} | settings))
    return evaluate(pair[2], task, NEUTRAL, arms, experiments, chosen, path, pairs=PAIRS)


@pytest.fixture(scope="module")
def evidence(pair, task):
    return asked(pair, task)


@pytest.mark.slow
def test_in_a_twin_the_transplant_is_the_native_concept(evidence):
    a, b, e = evidence.arms["transplanted"], evidence.arms["native"], evidence.effect
    assert e.recovery == 1 and e.recovery_ci is None and e.gain > 0.2  # both are always right
    assert abs(a.logit_shift - b.logit_shift) < 0.02 and a.logit_shift > 0
    slopes = [evidence.steered(arm)["slope"] for arm in ("transplanted", "native")]
    assert abs(slopes[0] - slopes[1]) < 0.02


def test_arms_stand_at_equal_damage_and_at_equal_norm(evidence):
    steered = [evidence.arms[k] for k in ("transplanted", "native", "random", "shuffled_map")]
    assert max(a.kl for a in steered) < 2 * min(a.kl for a in steered)
    assert all(a.same_norm.kl > 0 for a in steered)
    assert len(evidence.arms["random"].draws) == 20


def test_every_number_follows_from_the_file(evidence, tmp_path):
    evidence.save(tmp_path / "e.json")
    data = json.loads((tmp_path / "e.json").read_text())
    again = Evidence.load(tmp_path / "e.json")
    assert again == evidence and again.data == data
    contract = {"transplant", "task", "n", "damage_budget", "layers", "arms", "recovery", "p_value"}
    assert contract | {"versions", "seed"} <= data.keys() and set(data["arms"]) >= set(list(ARMS)[:7])
    of_arm = {"dose", "target_rate", "choice_rate", "logit_shift", "ci", "kl", "perplexity_ratio"}
    assert all(of_arm <= a.keys() for a in data["arms"].values())
    missing = data["arms"]["other_concept"]
    assert "--other" in missing["reason"] and all(missing[k] is None for k in of_arm)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json"):
        Evidence.load(tmp_path / "other.json")


def test_one_table_holds_every_answer(evidence, task):
    t = evidence.table
    assert set(t.experiment) == {"equal_damage", "equal_norm", "curves"}
    equal = t[t.experiment == "equal_damage"]
    rates = equal.groupby("arm").chosen.mean()
    for name, arm in evidence.arms.items():
        if arm.ci:
            assert rates[name] == pytest.approx(arm.choice_rate)
    assert (equal.groupby(["arm", "draw"]).size() == len(task)).all()
    assert set(equal.group) == {i.group for i in task.items}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_file(pair, task, evidence, tmp_path):
    for e, name in ((evidence, "a"), (asked(pair, task), "b")):
        e.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.slow
def test_experiments_are_chosen_by_the_caller(pair, task):
    e = asked(pair, task, experiments=("knowledge", "texts", "off_target"), off=(task,))
    assert e.effect.gain is None and "not asked" in e.arms["transplanted"].reason and not e.of("curves")
    assert set(e.capability) == {"base"} and e.capability["base"].knowledge_n == len(load_task("knowledge"))
    only = asked(pair, task, experiments=EQUAL, random=0)
    assert only.arms["native"].same_norm is None and not only.capability and not only.off_target
    assert only.arms["random"].reason and only.effect.p_value is None
    with pytest.raises(ValueError, match="equal_damage, equal_norm"):
        asked(pair, task, experiments=("curvs",))
    with pytest.raises(TypeError, match="'pair'.*other, pairs"):
        evaluate(pair[2], task, NEUTRAL, pair=PAIRS)


@pytest.mark.slow
def test_what_else_moves_is_asked_of_the_followed_arms(pair, task):
    e = asked(
        pair, task, experiments=("equal_damage", "knowledge", "texts", "off_target"), off=(task,), random=0
    )
    assert set(e.capability) == {"base", "transplanted", "native"}
    assert e.capability["base"].knowledge_p is None and 0 <= e.capability["native"].knowledge <= 1
    (moved,) = e.off_target
    assert moved.change["transplanted"] == pytest.approx(e.effect.gain, abs=1e-6)


@pytest.mark.slow
def test_several_true_answers_are_scored_as_truthfulqa_does(pair):
    mc = load_task("truthfulness", "tune")
    settings = Settings(random=2, damage=0.5)
    e = evaluate(pair[2], mc, NEUTRAL, experiments=EQUAL, settings=settings, source=pair[0])
    for a in ("base", "transplanted", "source"):
        arm = e.arms[a]
        assert arm.score_means["mc1"]["mean"] == pytest.approx(arm.choice_rate)
    for k in ("mc1", "mc2", "mc2_norm"):  # the twin answers as the model does
        means = [e.arms[a].score_means[k]["mean"] for a in ("base", "source")]
        assert means[0] == pytest.approx(means[1], abs=1e-3)


@pytest.mark.slow
def test_an_arm_and_a_metric_of_ones_own(pair, task, monkeypatch, tmp_path):
    def opposite(trial):
        return [replace(trial.t, direction=-trial.t.direction)]

    def rank(answers):
        scored = zip(answers.logp, answers.target, strict=True)
        return np.array([(x > x[wanted]).sum() for x, wanted in scored])

    monkeypatch.setitem(METRICS, "rank", Metric("rank", "likelier choices", rank))
    monkeypatch.setitem(METRICS, "fall", Metric("fall", "fall in rank", rank, change=True))
    mine = {
        "opposite": Arm("opposite", "the other way", opposite),
        "hint": Arm("hint", "a hint", lambda trial: [Words("Red or blue. ")]),
    }
    e = asked(pair, task, experiments=EQUAL, arms={**ARMS, **mine}, random=0)
    assert e.arms["opposite"].logit_shift < 0 < e.arms["transplanted"].logit_shift
    assert e.arms["hint"].dose is None and e.arms["hint"].kl > 0
    means = e.table.groupby("arm")["rank"].mean()
    assert (means + e.table.groupby("arm").chosen.mean() - 1).abs().max() < 1e-9  # of two choices
    for arm in ("base", "transplanted"):
        scores = e.arms[arm].score_means
        assert scores["rank"]["mean"] == pytest.approx(means[arm])
        assert scores["fall"]["mean"] == pytest.approx(means[arm] - means["base"])
    assert (e.summary["rank"] - means).abs().max() < 1e-9 and "rank" in repr(e)
    write_report(e, tmp_path / "r.html", {})
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    for words in ("likelier choices", "fall in rank"):
        assert words in page and words in e._repr_html_()
    assert e.show(metric="rank").axes[0].get_xlabel().startswith("likelier choices")


def test_a_behaviour_is_moved_by_its_own_transplant_first(pair, task):
    own = replace(pair[2], dose=0.5)
    shift, p = off_target([own, replace(own, direction=-own.direction)], [task])
    assert shift[0, 0] >= shift[1, 0] and p.shape == (2, 1) and (p <= 1).all()


def test_only_what_is_measured_counts_as_a_step(pair, few, monkeypatch):
    seen, real = [], module.steps
    monkeypatch.setattr(module, "steps", lambda what, names: seen.append(names) or real(what, names))
    some = {k: ARMS[k] for k in ("base", "native", "other_concept", "transplanted")}
    e = asked(pair, few, None, ("equal_damage",), some)
    assert [[*x] for x in seen] == [["base", "native", "transplanted"]] and "other_concept" in e.missing


@pytest.mark.slow
def test_evidence_goes_on_behind_the_arms_that_are_done(pair, few, tmp_path, monkeypatch):
    want, real, calls = asked(pair, few, random=6), Bench.at_damage, []

    def fails(self, ts, *a):
        calls.append(ts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, ts, *a)

    monkeypatch.setattr(Bench, "at_damage", fails)
    with pytest.raises(KeyboardInterrupt):
        asked(pair, few, tmp_path / "arms", random=6)
    again = asked(pair, few, tmp_path / "arms", random=6)
    assert again == want and len(calls) == 3 + 6  # two arms were kept, then six searches were left
    other = asked(pair, few, tmp_path / "arms", random=6, damage=0.25)  # another question: nothing is used
    assert other.arms["transplanted"].dose < 0.8 * want.arms["transplanted"].dose


def test_few_shot_labels_are_right_and_wrong():
    examples = load_task("emotions", "tune")
    own = {t: e for e in EMOTIONS for t in load_pairs(f"emotions/{e}", "tune").positive}
    for text, good in ((few_shot(examples), True), (few_shot(examples, rotate=True), False)):
        shots = [(s, k) for s in own for k in EMOTIONS if f"{EMOTION_PROMPT.format(s)} {k}\n" in text]
        assert len(shots) == 4 and len({label for _, label in shots}) == 4
        assert all((own[s] == label) == good for s, label in shots)


def test_items_that_stand_among_the_pairs_are_noticed(pair):
    t, task = pair[2], load_task("emotions/happiness").take(2)
    how = dict(experiments=("equal_norm",), settings=Settings(random=0, damage=0.5))
    shared = ContrastPairs("mine", [task.items[0].prompt, "We sang."], ["We left.", "We slept."])
    for pairs, groups in (
        (shared, ()),
        (ContrastPairs("x", ["We sang."], ["We left."], ["a", "b"]), ("b", "c")),
    ):
        items = (
            [i._replace(group=g) for i, g in zip(task.items, groups, strict=True)] if groups else task.items
        )
        with pytest.warns(UserWarning, match="task and pairs share scenarios"):
            evaluate(t, replace(task, items=items), NEUTRAL, pairs=pairs, **how)
    with warnings.catch_warnings(action="error"):
        evaluate(t, task, NEUTRAL, pairs=PAIRS, **how)


@pytest.mark.slow
def test_items_that_chose_the_layers_are_noticed_again(pair, task):
    source, target, t = pair
    corpus = Corpus("scenes", load_pairs("emotions/fear").texts)
    maps, joy = (
        fit_maps(source, target, corpus, [2], [2]),
        extract_concept(source, replace(PAIRS, template="{}")),
    )
    found = choose(joy, maps, target, task.take(8), Corpus("n", NEUTRAL.texts[:16]), 0.5)
    with pytest.warns(UserWarning, match="8 of these items"):
        e = evaluate(found, task, NEUTRAL, experiments=EQUAL, settings=Settings(random=0))
    assert e.provenance.notes["texts_read"] == found.notes["texts_read"]
    with pytest.raises(ValueError, match="greater than 0"):
        asked(pair, task, damage=0.0)
    with pytest.raises(ValueError, match="'random': .* greater than or equal to 0"):
        Settings(random=-1)


def test_texts_are_scored_for_every_arm(pair):
    _, target, t = pair
    found = evaluate_text({"base": None, "steered": t}, generation_task("n", ("It", "Rain"), len), target, 6)
    assert found.scores["base"] == [float(len(x)) for x in found.texts["base"]]
    assert found.gain_ci["base"] == [0, 0] and list(found.index) == ["base", "steered"]


def curve(pair, task, path, strengths=(-1.0, 0.0, 1.0), **more):
    e = asked(pair, task, path, ("equal_damage", "curves"), random=0, strengths=strengths, **more)
    return e, [p.strength for p in e.of("curves")["transplanted"]]


@pytest.fixture
def measured(monkeypatch):
    "Names of the arms and experiments that are measured, and not taken from a journal."
    made, real = [], module.recorded

    def counted(arm, experiment, *args, **where):
        made.append((arm, experiment))
        return real(arm, experiment, *args, **where)

    monkeypatch.setattr(module, "recorded", counted)
    return made


@pytest.mark.slow
def test_28_a_file_of_the_users_own_is_refused_and_stays(pair, few, tmp_path, evidence):
    evidence.save(tmp_path / "evidence.json")
    for name, text in (
        ("notes.txt", "dear notes\n"),
        ("rows.jsonl", '{"text": "a"}\n'),
        ("evidence.json", None),
    ):
        path = tmp_path / name
        if text:
            path.write_text(text)
        before = path.read_bytes()
        with pytest.raises(ValueError, match=name):
            asked(pair, few, path, EQUAL, random=0)
        assert path.read_bytes() == before
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder"):
        asked(pair, few, tmp_path, EQUAL, random=0)


@pytest.mark.slow
def test_30_other_strengths_give_another_curve_and_arms_are_kept(pair, few, tmp_path, measured):
    first, strengths = curve(pair, few, tmp_path / "arms")
    assert strengths == [-1, 0, 1]
    measured.clear()
    again, strengths = curve(pair, few, tmp_path / "arms")
    assert not measured and again == first
    other, strengths = curve(pair, few, tmp_path / "arms", (-2.0, 0.0, 2.0))
    assert strengths == [-2, 0, 2] and {x for _, x in measured} == {"curves"}
    assert other.of("equal_damage") == first.of("equal_damage") and other.steered() is None


@pytest.mark.slow
def test_32_other_tasks_are_asked_anew(pair, few, tmp_path):
    def other(name, n=4):
        off = [replace(load_task(name).take(n), name="other")]
        return asked(pair, few, tmp_path / "off", (*EQUAL, "off_target"), random=0, off=off)

    one, two = other("emotions/fear"), other("emotions/anger")  # another task of the same name
    assert one.of("off_target") != two.of("off_target") and one.of("equal_damage") == two.of("equal_damage")
    three = other("emotions/anger", 3)
    assert len(three.of("off_target")["base"][0].answers["chosen"]) == 3


@pytest.fixture(scope="module")
def begun(pair, few, tmp_path_factory):
    "What an evaluation kept, and found."
    path = tmp_path_factory.mktemp("begun") / "arms"
    return path, asked(pair, few, path, EQUAL, random=2)


@pytest.mark.parametrize(
    "changed", [{"random": 3}, {"seed": 1}, {"damage": 0.25}, {"experiments": (*EQUAL, "equal_norm")}]
)
@pytest.mark.slow
def test_30_whatever_else_is_asked_is_measured_anew(pair, few, begun, tmp_path, changed):
    how = {"random": 2, "experiments": EQUAL} | changed
    shutil.copy(begun[0], tmp_path / "arms")
    e, want = (asked(pair, few, path, **how) for path in (tmp_path / "arms", None))
    assert e == want


@pytest.mark.parametrize("arm", ["native", "other_concept", "few_shot", "source", "mine"])
@pytest.mark.slow
def test_30_another_input_of_an_arm_is_measured_anew(pair, few, tmp_path, measured, arm):
    fear, anger = (load_pairs(f"emotions/{e}") for e in ("fear", "anger"))
    inputs = {
        "native": [{"pairs": p} for p in (fear, anger)],
        "other_concept": [{"other": p} for p in (fear, anger)],
        "few_shot": [{"examples": load_task("knowledge").take(4, seed)} for seed in (0, 1)],
        "source": [{"source": tiny_model("gpt2", seed, n_positions=256)} for seed in (1, 2)],
        "mine": [{}, {}],
    }
    hints = [lambda trial: [Words("Red or blue. ")], lambda trial: [Words("Hard or soft. ")]]
    found = []
    for given, hint in zip(inputs[arm], hints, strict=True):
        arms = {k: ARMS[k] for k in ("base", "transplanted", arm) if k in ARMS} | {
            "mine": Arm("mine", "a hint", hint)
        }
        quick = Settings(random=0, damage=0.5)
        measured.clear()
        found.append(evaluate(pair[2], few, NEUTRAL, arms, EQUAL, quick, tmp_path / "arms", **given))
    assert {x for x, _ in measured} == {arm, "mine"}
    one, two = ([r.answers["margin"] for r in e.of("equal_damage")[arm]] for e in found)
    assert one != two


@pytest.mark.slow
def test_30_a_metric_of_ones_own_is_measured_anew(pair, few, tmp_path, monkeypatch):
    asked(pair, few, tmp_path / "arms", EQUAL, random=0)
    for k in (1.0, 2.0):
        monkeypatch.setitem(METRICS, "mine", Metric("mine", "mine", lambda a, k=k: k * np.ones(len(a.items))))
        e = asked(pair, few, tmp_path / "arms", EQUAL, random=0)
        assert e.arms["base"].score_means["mine"]["mean"] == k


@pytest.mark.slow
def test_30_another_transplant_task_text_or_model_is_refused(pair, task, tmp_path):
    t, path = pair[2], tmp_path / "arms"
    how = dict(experiments=EQUAL, settings=Settings(random=0, damage=0.5))
    evaluate(t, task, NEUTRAL, path=path, **how)
    before = path.read_bytes()
    turned = ChoiceTask("planted", [i._replace(target=1 - i.target) for i in task.items], task.instruction)
    for what, *wrong in (
        ("transplant", replace(t, direction=-t.direction), task, NEUTRAL),
        ("transplant", replace(t, positions="last"), task, NEUTRAL),
        ("transplant", replace(t, positions=lambda h, mask: mask), task, NEUTRAL),
        ("task", t, task.take(20), NEUTRAL),
        ("task", t, turned, NEUTRAL),
        ("task", t, replace(task, instruction="Do not.\n\n"), NEUTRAL),
        ("neutral", t, task, Corpus("n", NEUTRAL.texts[::-1])),
    ):
        with pytest.raises(ValueError, match=f"arms.*another run: {what} was"):
            evaluate(*wrong, path=path, **how)
        assert path.read_bytes() == before


@pytest.mark.slow
def test_30_a_rerun_reads_no_arm_again_and_a_torn_line_is_forgiven(pair, few, begun, tmp_path, measured):
    path, first = tmp_path / "arms", begun[1]
    shutil.copy(begun[0], path)
    assert asked(pair, few, path, EQUAL, random=2) == first and not measured
    path.write_bytes(path.read_bytes()[:-20])
    assert asked(pair, few, path, EQUAL, random=2) == first and len(measured) == 1
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="damaged"):
        asked(pair, few, path, EQUAL, random=2)


WRONG = [
    {"seed": -1},
    {"seed": 1.5},
    {"seed": "1"},
    {"bootstrap": 0},
    {"bootstrap": 2.5},
    {"random": -1},
    {"random": 2.5},
    {"damage": float("nan")},
    {"damage": float("inf")},
    {"damage": "0.1"},
    {"strengths": (1, float("inf"))},
    {"strengths": "12"},
    {"strengths": 1.0},
    {"off": "emotions/fear"},
    {"off": ["emotions/fear"]},
    {"off": [load_task("emotions/fear")] * 2},
]


@pytest.mark.parametrize("wrong", WRONG)
def test_106_settings_are_checked_at_once(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


def test_106_settings_take_numbers_of_numpy():
    s = Settings(
        random=np.int64(3), strengths=np.linspace(-1, 1, 3), seed=np.int32(1), damage=np.float32(0.5)
    )
    assert (s.random, s.seed, s.damage) == (3, 1, 0.5) and list(s.strengths) == [-1, 0, 1]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("t", "joy.safetensors"),
        ("task", "emotions/fear"),
        ("task", NEUTRAL),
        ("neutral", "neutral"),
        ("neutral", load_task("emotions/fear")),
        ("arms", [ARMS["base"]]),
        ("arms", {k: a for k, a in ARMS.items() if k != "base"}),
        ("arms", {**ARMS, "again": ARMS["random"]}),
        ("experiments", "curves"),
        ("settings", {"seed": 0}),
        ("path", 3),
        ("pairs", "emotions/happiness"),
        ("other", NEUTRAL),
        ("examples", PAIRS),
        ("source", "smollm2-135m-instruct"),
    ],
)
def test_106_arguments_are_checked_before_the_first_text_is_read(pair, task, monkeypatch, name, wrong):
    monkeypatch.setattr(module, "Bench", None)
    with pytest.raises(ValueError, match=name):
        evaluate(**{"t": pair[2], "task": task, "neutral": NEUTRAL, name: wrong})


def test_106_other_functions_check_their_arguments_too(pair, task, monkeypatch):
    monkeypatch.setattr(module, "generate", None)
    monkeypatch.setattr(Bench, "ask", None)
    write = generation_task("n", ("It", "Rain"), len)
    for wrong in {"draws": 0}, {"seed": -1}, {"task": task}, {"arms": [pair[2]]}, {"model": "gpt2"}:
        with pytest.raises(ValueError, match={"draws": "bootstrap"}.get(*wrong, *wrong)):
            evaluate_text(**{"arms": {"base": None}, "task": write, "model": pair[1]} | wrong)
    other = tiny_model("qwen2", 5)
    elsewhere = replace(pair[2], target=model_info(other), model=other)
    for ts, tasks in (([pair[2], elsewhere], [task]), ([], [task]), ([pair[2]], [])):
        with pytest.raises(ValueError, match="transplants of one model"):
            off_target(ts, tasks)
    with pytest.raises(ValueError, match="tasks"):
        off_target([pair[2]], task)


def test_102_logits_that_overflow_behind_the_layer_are_an_error():
    hot = tiny_model("gpt2", n_positions=256)
    hot._module.half().transformer.h[2].mlp.c_proj.weight.data *= 3e4
    t = place(torch.ones(48), hot, 1, norm=1.0)
    with pytest.raises(ValueError, match="finite"):
        evaluate(t, load_task("emotions/happiness").take(4), NEUTRAL, settings=Settings(random=2))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_102_effects_that_are_not_finite_are_an_error(pair, task, monkeypatch, bad):
    def broken(answers):
        return np.array([0.0] * (len(answers.items) - 1) + [bad])

    monkeypatch.setitem(METRICS, "mine", Metric("mine", "mine", broken))
    with pytest.raises(ValueError, match="mine.*finite"):
        asked(pair, task, experiments=EQUAL, random=0)
    with pytest.raises(ValueError, match="'kl', 0, 1.*finite"):
        Run("base", "equal_damage", kl=[[0.0, bad]], lost=[[0.0, 0.0]])
    score = generation_task("n", ("It", "Rain"), lambda text: bad)
    with pytest.raises(ValueError, match="scores 0.*finite"):
        evaluate_text({"base": None}, score, pair[1], 3)


def test_a_metric_does_not_take_the_place_of_a_column(pair, task, monkeypatch):
    monkeypatch.setitem(METRICS, "draw", Metric("draw", "draw", lambda a: np.zeros(len(a.items))))
    with pytest.raises(ValueError, match="cannot be called 'draw'"):
        asked(pair, task, experiments=EQUAL, random=0)


@pytest.fixture(scope="module")
def told(evidence):
    return json.dumps(evidence.data)


def put(*where, value):
    def change(d):
        for k in where[:-1]:
            d = d[k]
        d[where[-1]] = value

    return change


def drop(*where):
    def change(d):
        for k in where[:-1]:
            d = d[k]
        del d[where[-1]]

    return change


def signed(told, change, path):
    "A file of other evidence, with a digest that fits."
    d = json.loads(told)
    del d["digest"]
    change(d)
    path.write_text(json.dumps(d | {"digest": data_hash([json.dumps(d)])}))


HOSTILE = {
    "unknown arm": put("arms", "nobody", value={"reason": None}),
    "a run of nobody": put("runs", 0, "arm", value="nobody"),
    "an arm without runs": drop("arms", "transplanted"),
    "no base model": lambda d: d.update(runs=[r for r in d["runs"] if r["arm"] != "base"]),
    "arms as a list": put("arms", value=[1]),
    "wrong type": put("runs", 0, "draw", value="0"),
    "half a draw": put("runs", 0, "draw", value=0.5),
    "text for a number": put("runs", 0, "answers", "margin", 0, value="1.0"),
    "none for a number": put("runs", 0, "answers", "margin", 0, value=None),
    "not finite": put("runs", 0, "kl", 0, 0, value=float("nan")),
    "endless": put("runs", 0, "dose", value=float("inf")),
    "answers as text": put("runs", 0, "answers", "chosen", value="yes"),
    "a number short": put("runs", 1, "answers", "chosen", value=[1.0]),
    "no margin": drop("runs", 0, "answers", "margin"),
    "no runs": put("runs", value=[]),
    "runs of another kind": put("runs", value={"base": []}),
    "unknown field": put("runs", 0, "more", value=1),
    "more items": put("n", value=7),
    "items as text": put("n", value="many"),
    "a name that is a number": put("transplant", value=5),
    "a seed below zero": put("seed", value=-1),
    "no draws": put("bootstrap", value=0),
    "no task": drop("task"),
    "nobody's groups": put("groups", value="abc"),
    "a bell": put("transplant", value="joy\x07"),
    "an escape in a reason": put("arms", "other_concept", "reason", value="\x1b[2J"),
    "an escape in a score": put("runs", 0, "answers", "\x1b]0;x\x07", value=[0.0]),
    "a column": put("runs", 0, "answers", "arm", value=[0.0]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_84_evidence_that_does_not_fit_is_refused(told, tmp_path, name):
    signed(told, HOSTILE[name], tmp_path / "hostile.json")
    with pytest.raises(ValueError, match=r"hostile\.json"):
        Evidence.load(tmp_path / "hostile.json")


def test_84_evidence_that_fits_is_read(evidence, told, tmp_path):
    signed(told, lambda d: None, tmp_path / "e.json")
    assert Evidence.load(tmp_path / "e.json") == evidence


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{", "[" * 100_000, '{"n": ' + "1" * 5000 + "}", "\0", "caf\xe9"]
)
def test_84_other_files_are_refused(tmp_path, text):
    path = tmp_path / "hostile.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"hostile\.json"):
        Evidence.load(path)


def test_1_a_bit_that_flips_in_evidence_is_found(evidence, tmp_path):
    path = tmp_path / "e.json"
    evidence.save(path)
    raw, rng = path.read_bytes(), np.random.default_rng(0)
    for at in rng.choice(len(raw), 12, replace=False):
        broken = bytearray(raw)
        broken[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"e\.json"):
            Evidence.load(path)


def test_an_arm_of_ones_own_that_holds_a_model_is_kept_by_what_it_is(pair, task, tmp_path):
    mine = {"base": ARMS["base"], "mine": Arm("mine", "another model", lambda trial: [Unsteered(pair[0])])}
    quick = Settings(random=0, damage=0.5)
    e = evaluate(pair[2], task, NEUTRAL, mine, EQUAL, quick, tmp_path / "arms")
    assert evaluate(pair[2], task, NEUTRAL, mine, EQUAL, quick, tmp_path / "arms") == e
    e.save(tmp_path / "e.json")
    assert Evidence.load(tmp_path / "e.json") == e


# a concept, a word, or nothing


@pytest.fixture(scope="module")
def two_words(pushed):
    "One question throughout: of all words, the pair that the twin's own direction turns around most often."
    whole, before, after = pushed
    words = whole.items[0].choices
    turned = ((after[:, :, None] > after[:, None]) & (before[:, :, None] < before[:, None])).mean(0)
    k, j = np.unravel_index(turned.argmax(), turned.shape)
    return ChoiceTask("two", [i._replace(choices=(words[k], words[j])) for i in whole.items], "Say it.\n\n")


@pytest.fixture(scope="module")
def beyond(pair, two_words):
    "Answers that the twin's own direction moves and that the word's direction does not."
    _, t, _ = pair
    words = tuple(f" {w}" for w in WORDS)
    whole = ChoiceTask("beyond", [i._replace(choices=words, target=0) for i in two_words.items])
    bench = Bench(t, 2, two_words, NEUTRAL, 0.5)
    own = bench.place(extract_concept(t, PAIRS)), bench.place(word_direction(t, two_words))
    base, native, word = (
        np.array(a.logp) for a in bench.with_task(whole).ask([None, *bench.at_damage([*own])])
    )
    n, w = ((x - base).mean(0) for x in (native, word))  # (words,)
    ahead = np.minimum(n[:, None] - n, (n[:, None] - n) - (w[:, None] - w))  # (words, words)
    high, low = np.unravel_index(ahead.argmax(), ahead.shape)
    return replace(whole, items=[i._replace(choices=(words[high], words[low])) for i in whole.items])


def found(t, two_words, readouts, **given):
    settings = Settings(damage=0.5, random=20, bootstrap=300, readouts=readouts)
    return evaluate(t, two_words, NEUTRAL, None, ("equal_damage", "readouts"), settings, pairs=PAIRS, **given)


@pytest.mark.slow
def test_a_concept_moves_what_its_word_does_not(pair, task, two_words, beyond):
    e = found(pair[2], two_words, [task, beyond])
    planted, other = e.readouts
    assert e.finding == "concept" and "It is a concept" in verdict(e) and "gradient of the word" in verdict(e)
    assert e.data["verdict"] == {"kind": "concept", "text": "It is a concept"}
    assert planted.task == "planted" and planted.n == len(task) and other.n == len(beyond)
    assert other.shift["native"] == pytest.approx(other.shift["transplanted"], abs=0.05)
    assert all(other.ahead[k][0] > 0 for k in ("unembedding", "logit_bias"))
    asked_again = e.table[(e.table.experiment == "readouts") & (e.table.task == "planted")]
    bias, base = (asked_again[asked_again.arm == k] for k in ("logit_bias", "base"))
    assert planted.shift["logit_bias"] == pytest.approx(bias.margin.mean() - base.margin.mean())
    assert {*bias.group} == {*task.groups}


@pytest.mark.slow
def test_a_promoted_word_is_called_a_word(pair, two_words, beyond):
    t = pair[1]
    word = place(word_direction(t, two_words), t, 2)
    e = found(word, two_words, [beyond])
    assert e.finding == "word" and "It is a word" in verdict(e)


@pytest.mark.slow
def test_noise_is_called_nothing(pair, task, two_words):
    t = pair[1]
    noise = place(torch.randn(48, generator=torch.Generator().manual_seed(5)), t, 2)
    e = found(noise, two_words, [task])
    assert e.finding == "nothing" and "It is nothing" in verdict(e)


def planted(of, rng, mine, word, null, n=40):
    "Evidence whose margins are noise around given means, on the task and on a readout."
    groups = [str(i) for i in range(n)]
    hurt = dict(kl=[[0.1]] * n, lost=[[0.0]] * n)
    base = rng.normal(0, 1, n)

    def run(arm, mean, draw=0, **where):
        margin = (base + mean + rng.normal(0, 0.5, n)).tolist()
        answers = dict(chosen=[float(x > 0) for x in margin], first=[0.0] * n, margin=margin)
        return Run(
            arm,
            draw=draw,
            dose=0.1,
            answers=answers,
            **where,
        )

    runs = []
    for where in (dict(experiment="equal_damage"), dict(experiment="readouts", task="other", groups=groups)):
        on = "task" if "task" not in where else "readout"
        more = hurt if on == "task" else {}
        runs += [run("base", 0, **where, **more), run("transplanted", mine[on], **where, **more)]
        runs += [run(k, word[on], **where, **more) for k in ("unembedding", "logit_bias")]
        for arm, k in (("random", 20), ("covariance", 10), ("permuted", 10)):
            runs += [run(arm, rng.normal(0, null), i, **where, **more) for i in range(k)]
    return Evidence(replace(of, n=n, groups=groups, bootstrap=200), runs)


@pytest.fixture(scope="module")
def plain(pair, task):
    return asked(pair, task, experiments=EQUAL, random=0).provenance


def test_findings_of_planted_numbers(plain):
    rng = np.random.default_rng(0)
    big, none = dict(task=2, readout=2), dict(task=0, readout=0)
    word = dict(task=2, readout=0)
    assert planted(plain, rng, big, word, 0.3).finding == "concept"
    assert planted(plain, rng, word, word, 0.3).finding == "word"
    assert planted(plain, rng, none, word, 0.3).finding == "nothing"
    assert planted(plain, rng, big, word, 3).finding == "nothing"  # any push of this size does as much
    assert planted(plain, rng, word, none, 0.3).finding is None  # neither explains it
    assert planted(plain, rng, big, word, 0.3, n=9).finding is None
    e = planted(plain, rng, big, word, 0.3)
    for less in (
        [r for r in e.runs if r.arm != "logit_bias"],
        [r for r in e.runs if r.arm != "permuted"],
        [r for r in e.runs if r.experiment != "readouts"],
        [replace(r, kl=[[0.01]] * 40) if r.arm == "unembedding" and r.kl else r for r in e.runs],
    ):
        assert replace(e, runs=less).finding is None


@pytest.mark.slow
def test_a_word_and_noise_is_rarely_called_a_concept(plain):
    "Directions that move the word as the word's own does, and the readout by chance as controls do."
    rng = np.random.default_rng(1)
    said = [
        planted(plain, rng, dict(task=2, readout=rng.normal(0, 0.5)), dict(task=2, readout=0), 0.5).finding
        for _ in range(200)
    ]
    assert said.count("concept") <= 10  # 5 % of 200
    assert said.count("word") > 100


@pytest.mark.slow
def test_what_was_not_asked_is_not_found(pair, task, two_words):
    e = asked(pair, task, experiments=EQUAL, random=0)
    assert e.finding is None and "cannot be said" in verdict(e)
    assert {k: e.arms[k].reason for k in ("unembedding", "logit_bias", "covariance")} == {
        "unembedding": ARMS["unembedding"].reason,
        "logit_bias": ARMS["logit_bias"].reason,
        "covariance": "no draws were asked for",
    }


@pytest.mark.slow
def test_controls_stand_where_the_transplant_stands(pair, two_words, monkeypatch):
    seen, real = [], Bench.at_damage

    def noted(self, ts, *a):
        seen.extend(ts if isinstance(ts, list) else [ts])
        return real(self, ts, *a)

    monkeypatch.setattr(Bench, "at_damage", noted)
    found(replace(pair[2], positions="last"), two_words.take(8), [])
    assert len(seen) > 40 and {t.positions for t in seen} == {"last"}


@pytest.mark.slow
def test_what_does_not_belong_to_the_transplant_is_refused_first(pair, two_words):
    m, t, joy = pair
    texts = Corpus("scenes", load_pairs("emotions/fear").texts)
    maps = fit_maps(m, t, texts, [2], [1, 2])
    for given, said in (
        (dict(map=maps[2, 1], source=m), "ends at layer 1"),
        (dict(map=maps[2, 2], source=t), "source side"),
        (dict(map=fit_maps(t, m, texts, [2], [2])[2, 2], source=t), "target side"),
        (dict(native=place(torch.ones(48), m, 1)), "native="),
    ):
        with pytest.raises(ValueError, match=said):
            found(joy, two_words, [], **given)


@pytest.mark.slow
def test_readouts_are_measured_anew_when_they_change(pair, task, two_words, beyond, tmp_path):
    for readout in (task, beyond):
        settings = Settings(damage=0.5, random=0, bootstrap=50, readouts=[replace(readout, name="same")])
        asked_again = [pair[2], two_words, NEUTRAL, None, ("equal_damage", "readouts"), settings]
        e = evaluate(*asked_again, tmp_path / "arms")
        assert e.readouts[0].n == len(readout) and e == evaluate(*asked_again)


@pytest.mark.slow
def test_arms_through_the_map_and_at_another_layer(pair, two_words):
    m, t, joy = pair
    texts = [x for e in ("sadness", "fear", "anger") for x in load_pairs(f"emotions/{e}").texts]
    given = dict(map=fit_maps(m, t, Corpus("scenes", texts), [2], [2])[2, 2], source=m)
    native = place(extract_concept(t, PAIRS), t, 1)
    e = found(joy, two_words, [], other=load_pairs("emotions/fear"), native=native, **given)
    for arm in ("unembedding_mapped", "nearest_concept", "native_best", "prompt_transplanted"):
        assert e.arms[arm].ci and e.arms[arm].kl > 0.1, arm
    assert e.arms["nearest_concept"].choice_rate == pytest.approx(
        e.arms["other_concept"].choice_rate, abs=0.1
    )
    assert e.arms["native_best"].dose != e.arms["native"].dose
    assert e.arms["prompt_transplanted"].kl > e.arms["prompt"].kl
    assert e.effect.p_stronger is not None and len(e.arms["covariance"].draws) == 10


@pytest.mark.slow
def test_an_arm_that_is_always_right_has_an_interval(pair, task):
    runs = [
        Run(a, "equal_damage", answers=dict(chosen=[c] * 20, first=[c] * 20, margin=[c] * 20))
        for a, c in (("base", 0.0), ("transplanted", 1.0), ("native", 1.0))
    ]
    e = asked(pair, task, experiments=EQUAL, random=0)
    e = Evidence(replace(e.provenance, groups=[str(i) for i in range(20)], n=20), runs)
    assert e.arms["transplanted"].ci == pytest.approx([0.839, 1], abs=1e-3)
    assert e.effect.recovery == 1 and e.effect.recovery_ci is None


def test_settings_arms_and_experiments_are_honoured_or_refused(pair, task):
    t = place(torch.ones(48), pair[1], 1, dose=0.5, norm=5.0)
    for damage in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="damage"):
            Settings(damage=damage)
    with pytest.raises(ValueError, match="'base' is needed"):
        evaluate(t, task, arms={})


def test_entries_show_name_and_words():
    for entry in (ARMS["random"], METRICS["margin"]):
        assert repr(entry) == f"{type(entry).__name__}({entry.name!r}: {entry.words})"


# sampled text


BEGUN = ("It rained", "The letter said", "On the way home", "At noon the bell")


def judge(right, score=len):
    "A judge that was right on so many of twenty."
    return Judge("mine", "length", score, right=lambda: [True] * right + [False] * (20 - right))


def texts_of(pair, few, path=None, experiments=("equal_damage", "text"), scorer=len, **settings):
    task = generation_task("free", BEGUN, scorer)
    some = {k: ARMS[k] for k in ("base", "transplanted", *PUSHES, "random", "prompt")}
    chosen = Settings(**({"damage": 0.5, "bootstrap": 500, "random": 0, "text": task} | settings))
    return evaluate(pair[2], few, NEUTRAL, some, experiments, chosen, path)


@pytest.mark.slow
def test_all_arms_go_on_from_the_same_beginnings_with_the_same_seed(pair, two_words):
    e, few = texts_of(pair, two_words.take(8)), two_words.take(8)
    said = {r.arm: r for (r,) in e.of("text").values()}
    (word,) = {*said} - {"base", "transplanted", "prompt"}
    assert word in PUSHES and e.text.n == 4 and e.text.gain["base"] == 0
    options = dict(max_new_tokens=30, do_sample=True, temperature=1.0, top_k=0)
    before = torch.random.get_rng_state()
    for arm, t in ("base", None), ("transplanted", replace(pair[2], dose=said["transplanted"].dose)):
        with seeded(0):
            assert said[arm].texts == (t.generate if t else partial(generate, pair[1]))(BEGUN, **options)
        assert said[arm].answers["score"] == [len(x) for x in said[arm].texts]
    with seeded(0):
        assert said["prompt"].texts == generate(pair[1], [few.instruction + x for x in BEGUN], **options)
    other = texts_of(pair, few, seed=1).of("text")["base"][0]
    assert other.texts != said["base"].texts and (torch.random.get_rng_state() == before).all()


@pytest.mark.slow
def test_text_changes_no_other_number_and_is_kept(pair, few, tmp_path, monkeypatch):
    plain = texts_of(pair, few, tmp_path / "arms", EQUAL, random=2)
    e = texts_of(pair, few, tmp_path / "arms", random=2)
    assert [r for r in e.runs if r.experiment != "text"] == plain.runs and plain.text is None
    assert (e.table[e.table.experiment == "text"].groupby("arm").size() == len(BEGUN)).all()
    other = texts_of(pair, few, tmp_path / "arms", random=2, scorer=lambda text: 0.5)
    assert {*other.text.score.values()} == {0.5} != {*e.text.score.values()}  # lambdas are not all one
    monkeypatch.setattr(module, "written", None)
    assert texts_of(pair, few, tmp_path / "arms", random=2) == e
    e.save(tmp_path / "e.json")
    assert Evidence.load(tmp_path / "e.json") == e
    data = json.loads((tmp_path / "e.json").read_text())["text"]
    assert data["n"] == 4 and data["labelled"] == 0 and data["gain"]["base"] == 0


@pytest.mark.slow
def test_text_is_left_out_with_a_reason(pair, few, tmp_path, monkeypatch):
    def gone(text):
        raise ImportError(name="lingua")

    lost = Judge("mine", "words", gone, right=lambda: [lost("a") > 0])
    for wanted, settings in (
        ("no scorer of 'planted'", dict(text=None)),
        ("needs lingua", dict(scorer=lost)),
    ):
        e = texts_of(pair, few, **settings)
        assert wanted in e.untold and wanted in repr(e) and wanted in verdict(e) and not e.of("text")
        e.save(tmp_path / "e.json")
        assert Evidence.load(tmp_path / "e.json") == e and wanted in e.data["text"]["reason"]
    assert "equal damage" in texts_of(pair, few, experiments=("text",)).untold


def heard(of, gains, right=18):
    "Evidence of sampled text with these gains over the base model."
    groups = [str(i) for i in range(len(gains))]
    runs = [Run("base", "text", answers=dict(right=[1] * right + [0] * (20 - right), chance=[0.5] * 20))]
    runs = [replace(runs[0], groups=[str(i) for i in range(20)])]
    for arm, score in ("base", gains * 0), ("transplanted", gains):
        runs.append(
            Run(arm, "text", answers=dict(score=score.tolist()), groups=groups, texts=["x"] * len(gains))
        )
    return Evidence(replace(of, bootstrap=200), runs)


def test_text_follows_where_the_gain_is_clear_and_the_judge_can_tell(plain):
    gains = np.linspace(0, 0.2, 24)
    assert heard(plain, gains).text.follows and not heard(plain, -gains).text.follows
    assert not heard(plain, gains, right=12).text.follows  # of 20, where guessing gives 10
    assert heard(plain, gains).text.right == 0.9
    big, word = dict(task=2, readout=2), dict(task=2, readout=0)
    e = planted(plain, np.random.default_rng(0), big, word, 0.3)
    for sign, said in (1, "text follows"), (-1, "text is not seen to follow"):
        both = replace(e, runs=e.runs + heard(plain, sign * gains).runs)
        assert both.data["verdict"] == {"kind": "concept", "text": f"It is a concept; sampled {said}"}


@pytest.mark.slow
def test_text_without_a_gain_rarely_follows(plain):
    rng = np.random.default_rng(0)
    skewed = rng.exponential(1, (200, 24, 2)) @ [1, -1]  # scores of two draws of the same
    assert sum(heard(plain, x).text.follows for x in skewed) <= 10  # 5 %


@pytest.mark.slow
def test_text_is_told_with_its_judge(pair, few, tmp_path):
    e = texts_of(pair, few, scorer=judge(18))
    assert "right on 90% of 20 labelled texts, by chance 50%" in verdict(e) and "right on 90%" in repr(e)
    write_report(e, tmp_path / "r.html", {})
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "sampled and scored" in page and "right on 90%" in page and "free, 4 sampled" in e._repr_html_()
    assert "is not known" in verdict(texts_of(pair, few))


# behaviours


@pytest.mark.parametrize("b", BEHAVIOURS)
def test_a_behaviour_is_read_out_on_items_that_neither_ask_nor_tune_nor_say_the_word(b):
    parts = {s: load_task(f"behaviours/{b}", s) for s in ("tune", "test", "fresh")}
    (row,) = [r for r in builtin_rows("words") if r["concept"] == b]
    for task, tuned in (("test", ()), ("test", parts["tune"].prompts), ("tune", ()), ("fresh", ())):
        read = [data_hash([x]) for x in tuned]
        (readout,) = readouts_of(parts[task], read)
        split = readout.name.removeprefix(f"wordless/{b}/")
        assert {*readout.items} <= {*parts[split].items} and len(readout) >= 10
        assert not {*readout.prompts} & {*parts[task].prompts, *tuned}
        for i in readout.items:
            assert not [
                w for w in (row["word"], row["opposite"], *row["others"]) if f" {w} " in " ".join(i.choices)
            ]
    assert [x.name for x in readouts_of(load_task("emotions/fear"))] == ["synonyms/fear", "wordless/fear"]


@pytest.mark.slow
def test_a_behaviour_has_arms_that_push_its_word(pair):
    t, task = pair[2], load_task("behaviours/honesty").take(8)
    settings = Settings(random=0, damage=0.5, bootstrap=50)
    e = evaluate(t, task, NEUTRAL, experiments=("equal_damage", "readouts", "text"), settings=settings)
    (readout,) = e.readouts
    assert readout.task == "wordless/honesty/tune" and {"unembedding", "gradient", "logit_bias"} <= {
        *readout.ahead
    }
    asked_for = word_direction(pair[1], load_task("words/honesty", "tune"))
    (arm,) = ARMS["unembedding"].make(Trial(Bench(pair[1], 2, task, NEUTRAL, 0.5), t, {}))
    assert torch.cosine_similarity(arm.direction, asked_for, dim=0) > 0.999
    assert "no scorer of 'behaviours/honesty'" in e.untold


def test_items_among_the_examples_are_told(pair, few, monkeypatch):
    monkeypatch.setattr("concept_transfer.evidence.Bench", None)
    for examples, told in ((few.take(4), 1), (load_task("knowledge").take(4), 0)):
        with warnings.catch_warnings(record=True) as said, pytest.raises(TypeError):
            warnings.simplefilter("always")
            evaluate(pair[2], few, NEUTRAL, examples=examples)
        assert sum("stand among the examples" in str(w.message) for w in said) == told


def test_a_reducer_that_cannot_be_repeated_is_told(pair, few):
    _, t, push = pair
    trial = Trial(Bench(t, 2, few, NEUTRAL), replace(push, notes=push.notes | {"reducer": "median"}), {})
    with pytest.warns(UserWarning, match="made by 'median', which is not in REDUCERS"):
        native_direction(trial, PAIRS)


@pytest.mark.parametrize("noted", [True, False])
def test_the_concept_itself_is_no_other_one(pair, task, monkeypatch, noted):
    monkeypatch.setattr("concept_transfer.evidence.Bench", None)
    t = pair[2] if noted else replace(pair[2], notes={})
    more = {} if noted else {"pairs": PAIRS}
    with pytest.raises(ValueError, match="other= holds the concept's own texts"):
        evaluate(t, task, NEUTRAL, other=PAIRS, **more)
