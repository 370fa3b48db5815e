"Planted truths: where the answer is known, the evidence must find it."

import json
from dataclasses import replace

import numpy as np
import pytest

from concept_transfer.concepts import extract_concept
from concept_transfer.data import EMOTION_PROMPT, EMOTIONS, Corpus, load_corpus, load_pairs
from concept_transfer.evidence import (
    ARMS,
    Arm,
    Evidence,
    Settings,
    Words,
    evaluate,
    evaluate_text,
    few_shot,
    off_target,
)
from concept_transfer.maps import fit_maps
from concept_transfer.measure import METRICS, Bench, Metric
from concept_transfer.models import tiny_model, twin
from concept_transfer.report import write_report
from concept_transfer.selection import choose
from concept_transfer.steering import place
from concept_transfer.tasks import ChoiceItem, ChoiceTask, generation_task, load_task

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
def task(pair):
    "Two answers a scenario: the base model prefers one, the twin's own direction makes it prefer the other."
    _, t, _ = pair
    words = tuple(f" {w}" for w in WORDS)
    scenes = [x for e in ("fear", "anger") for x in load_pairs(f"emotions/{e}", "test").positive]
    whole = ChoiceTask("all", [ChoiceItem(f"{x} It was", words, 0, x) for x in scenes])
    native = place(extract_concept(t, PAIRS), t, 2, dose=0.5)
    base, pushed = (np.array(a.logp) for a in Bench(t, 2, whole).ask([None, native]))  # (n, words)
    items = []
    for item, b, p in zip(whole.items, base, pushed, strict=True):
        gain = (p[:, None] - p) * ((b[:, None] - b) < 0)
        k, j = np.unravel_index(gain.argmax(), gain.shape)  # k overtakes j by most
        if gain[k, j] > 0:
            items.append(item._replace(choices=(words[k], words[j])))
    return ChoiceTask("planted", items, "Say it.\n\n")


def asked(pair, task, path=None, experiments=("equal_damage", "equal_norm", "curves"), arms=ARMS, **settings):
    chosen = Settings(**({"damage": 0.5} | settings))
    return evaluate(pair[2], task, NEUTRAL, arms, experiments, chosen, path, pairs=PAIRS)


@pytest.fixture(scope="module")
def evidence(pair, task):
    return asked(pair, task)


def test_in_a_twin_the_transplant_is_the_native_concept(evidence):
    a, b, e = evidence.arms["transplanted"], evidence.arms["native"], evidence.effect
    assert e.recovery_ci[0] <= 1 <= e.recovery_ci[1] and e.gain > 0.2
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


def test_the_same_seed_gives_the_same_file(pair, task, evidence, tmp_path):
    for e, name in ((evidence, "a"), (asked(pair, task), "b")):
        e.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


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


def test_what_else_moves_is_asked_of_the_followed_arms(pair, task):
    e = asked(
        pair, task, experiments=("equal_damage", "knowledge", "texts", "off_target"), off=(task,), random=0
    )
    assert set(e.capability) == {"base", "transplanted", "native"}
    assert e.capability["base"].knowledge_p is None and 0 <= e.capability["native"].knowledge <= 1
    (moved,) = e.off_target
    assert moved.change["transplanted"] == pytest.approx(e.effect.gain, abs=1e-6)


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


def test_evidence_goes_on_behind_the_arms_that_are_done(pair, task, tmp_path, monkeypatch):
    want, real, calls = asked(pair, task, random=6), Bench.at_damage, []

    def fails(self, ts, *a):
        calls.append(len(ts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, ts, *a)

    monkeypatch.setattr(Bench, "at_damage", fails)
    with pytest.raises(KeyboardInterrupt):
        asked(pair, task, tmp_path / "arms", random=6)
    again = asked(pair, task, tmp_path / "arms", random=6)
    assert again == want and len(calls) == 3 + 3  # two draws were kept, then three searches were left
    other = asked(pair, task, tmp_path / "arms", random=6, damage=0.25)  # another question: nothing is used
    assert other.arms["transplanted"].dose < 0.8 * want.arms["transplanted"].dose


def test_few_shot_labels_are_right_and_wrong():
    examples = load_task("emotions", "tune")
    own = {t: e for e in EMOTIONS for t in load_pairs(f"emotions/{e}", "tune").positive}
    for text, good in ((few_shot(examples), True), (few_shot(examples, rotate=True), False)):
        shots = [(s, k) for s in own for k in EMOTIONS if f"{EMOTION_PROMPT.format(s)} {k}\n" in text]
        assert len(shots) == 4 and len({label for _, label in shots}) == 4
        assert all((own[s] == label) == good for s, label in shots)


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
    with pytest.raises(ValueError, match="positive KL"):
        asked(pair, task, damage=0.0)
    with pytest.raises(ValueError, match="number of random"):
        Settings(random=-1)


def test_texts_are_scored_for_every_arm(pair):
    _, target, t = pair
    found = evaluate_text({"base": None, "steered": t}, generation_task("n", ("It", "Rain"), len), target, 6)
    assert found.scores["base"] == [float(len(x)) for x in found.texts["base"]]
    assert found.gain_ci["base"] == [0, 0] and list(found.index) == ["base", "steered"]
