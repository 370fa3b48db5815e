"""Planted truths: where the answer is known, the evidence must find it."""

import json
from dataclasses import replace
import nnsight, numpy as np, pytest, torch
from concept_transfer import evaluation
from concept_transfer.alignment import fit_maps, random_map
from concept_transfer.data import (
    EMOTION_PROMPT,
    EMOTIONS,
    ChoiceItem,
    ChoiceTask,
    Corpus,
    load_corpus,
    load_pairs,
    load_task,
)
from concept_transfer.evaluation import (
    ARMS,
    ChoiceProbe,
    Evidence,
    _arm,
    _few_shot,
    _Probes,
    _probes,
    _provenance,
    _raw,
    evaluate,
    off_target,
    steerability,
    summarise,
)
from concept_transfer.extraction import extract_concept
from concept_transfer.injection import graft
from concept_transfer.models import tiny_model, twin
from concept_transfer.selection import choose
from concept_transfer.plots import verdict, write_report, figures
from concept_transfer.tasks import load_knowledge, load_truthfulness

PAIRS = load_pairs("emotions/happiness")
NEUTRAL = Corpus("neutral", load_corpus("neutral").texts[:48])


@pytest.fixture(scope="module")
def pair():
    m = tiny_model("qwen2", max_position_embeddings=256)
    t, Q = twin(m)
    corpus = Corpus(
        "scenes", [x for e in ("sadness", "fear", "anger") for x in load_pairs(f"emotions/{e}").texts]
    )
    return m, t, extract_concept(m, PAIRS), fit_maps(m, t, corpus, [2], [2])


@pytest.fixture(scope="module")
def task(pair):
    "Two answers a scenario: the base model prefers one, the twin's own direction makes it prefer the other."
    m, t, joy, maps = pair
    words = tuple(
        f" {w}"
        for w in "red blue cold warm old new near far open shut soft hard wet dry late early dark light loud calm".split()
    )
    all_of = ChoiceTask(
        "all",
        tuple(
            ChoiceItem(f"{x} It was", words, 0, x)
            for e in ("fear", "anger")
            for x in load_pairs(f"emotions/{e}", "test").positive
        ),
    )
    probe = ChoiceProbe(t, all_of, 2)
    base, pushed = (
        np.array([list(x) for x in a.logp])
        for a in probe.many([None, graft(extract_concept(t, PAIRS), t, 2, dose=0.5)])
    )
    items = []
    for i, b, p in zip(all_of.items, base, pushed):
        gain = (p[:, None] - p) * ((b[:, None] - b) < 0)
        k, j = np.unravel_index(gain.argmax(), gain.shape)  # k overtakes j by most
        if gain[k, j] > 0:
            items.append(i._replace(choices=(words[k], words[j])))
    return ChoiceTask("planted", tuple(items), "Say it.\n\n")


@pytest.fixture(scope="module")
def evidence(pair, task):
    m, t, joy, maps = pair
    return evaluate(
        graft(joy, t, map=maps[2, 2]), task, NEUTRAL, PAIRS, random=20, damage=0.5, knowledge=False
    )


def test_in_a_twin_the_transplant_is_the_native_concept(evidence):
    a, b = (evidence.arms[k] for k in ("transplanted", "native"))
    assert evidence.recovery_ci[0] <= 1 <= evidence.recovery_ci[1] and evidence.gain > 0.2
    assert abs(a["logit_shift"] - b["logit_shift"]) < 0.02 and a["logit_shift"] > 0
    assert (
        abs(evidence.steerability["transplanted"]["slope"] - evidence.steerability["native"]["slope"]) < 0.02
    )


def test_a_random_map_recovers_nothing(pair, task):
    "At a damage so small that every push acts linearly."
    m, t, joy, maps = pair
    probes = _probes(graft(joy, t, map=maps[2, 2]), task, NEUTRAL, 0.02)
    base = probes.choices()
    shift = lambda W: float(
        (
            np.array(probes.run([graft(joy, t, map=replace(maps[2, 2], W=W))])[0]["margins"]) - base.margin
        ).mean()
    )
    native = shift(maps[2, 2].W)
    recovery = np.array([shift(random_map(maps[2, 2].W, seed)) for seed in range(16)]) / native
    half = 2.13 * recovery.std(ddof=1) / 4  # 95 % interval of the mean of 16
    assert native > 0 and abs(recovery.mean()) <= half < 0.6, (recovery.mean(), half)


def test_answers_that_do_not_depend_on_the_model_show_no_effect(pair):
    m, t, joy, maps = pair
    rng = np.random.default_rng(0)
    items = tuple(
        ChoiceItem(f"{x} It was", (" red", " blue"), int(rng.integers(2)), x)
        for e in ("fear", "anger", "disgust")
        for x in load_pairs(f"emotions/{e}", "test").positive
    )
    e = evaluate(
        graft(joy, t, map=maps[2, 2]),
        ChoiceTask("coin", items),
        NEUTRAL,
        random=20,
        damage=0.5,
        strengths=(),
        knowledge=False,
    )
    assert e.gain_ci[0] <= 0 <= e.gain_ci[1] and verdict(e).startswith("No effect") and e.p_mcnemar > 0.01


def test_every_number_can_be_recomputed_from_the_file(evidence, tmp_path):
    evidence.save(tmp_path / "e.json")
    data = json.loads((tmp_path / "e.json").read_text())
    found = summarise(data)
    for arm, values in found.pop("arms").items():
        for k, v in values.items():
            assert data["arms"][arm][k] == v, (arm, k)
    for k, v in found.items():
        assert data[k] == v, k
    assert steerability(data["curve"]) == data["steerability"]["transplanted"]
    write_report(evidence, tmp_path / "a.html", figures(evidence))
    write_report(Evidence(data), tmp_path / "b.html", figures(Evidence(data)))
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_same_seed_gives_the_same_file(pair, task, evidence, tmp_path):
    m, t, joy, maps = pair
    again = evaluate(
        graft(joy, t, map=maps[2, 2]), task, NEUTRAL, PAIRS, random=20, damage=0.5, knowledge=False
    )
    for e, name in ((evidence, "a"), (again, "b")):
        e.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_arms_stand_at_equal_damage_and_at_equal_norm(evidence):
    steered = [evidence.arms[k] for k in ("transplanted", "native", "random", "shuffled_map")]
    assert max(a["kl"] for a in steered) < 2 * min(a["kl"] for a in steered) and all(
        a["same_norm"]["kl"] > 0 for a in steered
    )


def test_several_true_answers_are_scored_as_truthfulqa_does(pair):
    m, t, joy, maps = pair
    mc = load_truthfulness("tune")
    e = evaluate(graft(joy, t, map=maps[2, 2]), mc, NEUTRAL, random=2, damage=0.5, strengths=(), source=m)
    for a in ("base", "transplanted", "source"):
        assert e.arms[a]["score_means"]["mc1"]["mean"] == pytest.approx(e.arms[a]["choice_rate"])
    for k in ("mc1", "mc2", "mc2_norm"):
        assert e.arms["base"]["scores"][k] == pytest.approx(
            e.arms["source"]["scores"][k], abs=1e-3
        )  # the twin answers as the model does
    assert (
        0 <= e.capability["base"]["knowledge"] <= 1
        and set(e.capability) == {"base", "transplanted"}
        and e.capability["transplanted"]["knowledge_n"] == len(load_knowledge())
    )


def test_a_behaviour_is_moved_by_its_own_transplant_first(pair, task):
    m, t, joy, maps = pair
    own = graft(joy, t, map=maps[2, 2], dose=0.5)
    shift, p = off_target([own, replace(own, direction=-own.direction)], [task])
    assert shift[0, 0] >= shift[1, 0] and p.shape == (2, 1) and (p <= 1).all()


def test_the_verdict_is_rarely_wrong_on_nothing(pair):
    "200 null runs: one random direction is taken for the transplant, twenty others are its controls."
    m, t, joy, maps = pair
    own = replace(graft(joy, t, map=maps[2, 2]), shuffled=None)
    rng = np.random.default_rng(1)
    words = (" red", " blue", " cold", " old", " near")
    items = tuple(
        ChoiceItem(f"{x} It was", words, 0, x) for x in load_pairs("emotions/fear", "test").positive
    )
    task = ChoiceTask("null", items)
    probes = _probes(own, task, Corpus("n", NEUTRAL.texts[:16]), 0.3)
    base = probes.choices()
    g = torch.Generator().manual_seed(0)
    pool = probes.run(
        [replace(own, direction=torch.randn(len(own.direction), generator=g)) for _ in range(80)]
    )
    wrong = 0
    for run in range(200):
        draw = rng.choice(len(pool), 21, replace=False)
        arms = {
            "base": [_raw(base) | dict(dose=0.0)],
            "transplanted": [pool[draw[0]]],
            "random": [pool[i] for i in draw[1:]],
        }
        data = _provenance(own, task, NEUTRAL, 0.3, run) | dict(
            groups=[i.group for i in items],
            arms={k: _arm(v) for k, v in arms.items()}
            | {k: {"reason": "not here"} for k in ARMS if k not in arms},
        )
        found = summarise(data, 200)
        for k, v in found.pop("arms").items():
            data["arms"][k] |= v
        wrong += not verdict(Evidence(data | found)).startswith("No effect")
    assert wrong <= 10, wrong


def test_evidence_goes_on_behind_the_arms_that_are_done(pair, task, tmp_path, monkeypatch):
    m, t, joy, maps = pair
    run = lambda path: evaluate(
        graft(joy, t, map=maps[2, 2]),
        task,
        NEUTRAL,
        PAIRS,
        random=6,
        damage=0.5,
        knowledge=False,
        off=(),
        path=path,
    )
    want, real, calls = run(None), _Probes._measured, []

    def fails(self, ts):
        calls.append(len(ts))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, ts)

    monkeypatch.setattr(_Probes, "_measured", fails)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "arms")
    with open(tmp_path / "arms", "a") as f:
        f.write('{"mark": "half a li')  # as a killed run may leave it
    before = len(calls)
    again = run(tmp_path / "arms")
    rest = len(calls) - before
    assert again.data == want.data
    run(None)
    assert rest < len(calls) - before - rest  # fewer passes than from the start
    other = evaluate(
        graft(joy, t, map=maps[2, 2]),
        task,
        NEUTRAL,
        PAIRS,
        random=6,
        damage=0.25,
        knowledge=False,
        off=(),
        path=tmp_path / "arms",
    )
    assert (
        other.arms["transplanted"]["dose"] < 0.8 * want.arms["transplanted"]["dose"]
    )  # another question: nothing of the file is used


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma3_text"])
def test_answers_read_in_one_pass_are_those_of_each_alone(family, monkeypatch):
    m = tiny_model(family)
    task = load_knowledge()
    task = (
        replace(task, **{k: getattr(task, k)[:12] for k in ("questions", "true", "false", "topics")})
        if hasattr(task, "topics")
        else task
    )
    v = graft(torch.ones(48), m, 1, dose=0.4)
    together = ChoiceProbe(m, task, 1)
    assert len(together.rows) == len(task)
    monkeypatch.setattr(evaluation, "shares_prompts", lambda model: False)
    alone = ChoiceProbe(m, task, 1)
    assert len(alone.rows) > 2 * len(task)
    for change in (None, v, replace(v, positions="last")):
        a, b = together(change), alone(change)
        for x, y in zip(a.logp, b.logp):
            np.testing.assert_allclose(x, y, atol=1e-4)
        assert (a.first == b.first).all() and (a.chosen == b.chosen).all()


def test_the_last_position_is_every_step_of_decoding(pair):
    "A choice of several tokens gets the probability that decoding step by step gives it."
    m, t, joy, maps = pair
    v = replace(graft(joy, t, map=maps[2, 2], dose=0.6), positions="last")
    item = ChoiceItem(
        "The kettle sang and", (" nobody listened to it", " the door opened at last"), 0, "kettle"
    )
    got = ChoiceProbe(t, ChoiceTask("one", (item,)), 2)(v)
    prompt = t.tokenizer(item.prompt).input_ids
    for choice, score in zip(item.choices, got.logp[0]):
        whole = t.tokenizer(item.prompt + choice).input_ids
        past, want = None, 0.0
        assert whole[: len(prompt)] == prompt
        with torch.no_grad(), v():
            for j in range(len(prompt) - 1, len(whole) - 1):
                ids = torch.tensor([whole[: len(prompt)] if past is None else [whole[j]]])
                with t.trace(
                    input_ids=ids,
                    attention_mask=torch.ones(1, j + 1, dtype=torch.long),
                    past_key_values=past,
                    use_cache=True,
                ):
                    out = nnsight.save(t.output)
                past = out.past_key_values
                want += float(out.logits[0, -1].log_softmax(-1)[whole[j + 1]])
        assert score == pytest.approx(want, abs=1e-3)


def test_few_shot_labels_are_right_and_wrong():
    examples = load_task("emotions", "tune")
    right, wrong = (_few_shot(examples, r) for r in (False, True))
    own = {t: e for e in EMOTIONS for t in load_pairs(f"emotions/{e}", "tune").positive}
    for text, good in ((right, True), (wrong, False)):
        shots = [
            (s, label)
            for s, e in own.items()
            for label in EMOTIONS
            if f"{EMOTION_PROMPT.format(s)} {label}\n" in text
        ]
        assert (
            len(shots) == 4
            and len({label for _, label in shots}) == 4
            and all((own[s] == label) == good for s, label in shots)
        )


def test_items_that_chose_the_layers_are_noticed_again(pair, task):
    m, t, joy, maps = pair
    a, b = (choose(joy, maps, t, task.take(8), Corpus("n", NEUTRAL.texts[:16]), 0.5) for _ in range(2))
    assert (
        a.notes == b.notes
        and torch.equal(a.direction, b.direction)
        and 0 < a.notes["search_p"] <= 1
        and a.notes["texts_read"] > 0
    )
    with pytest.warns(UserWarning, match="8 of these items"):
        e = evaluate(a, task, NEUTRAL, random=0, strengths=(), knowledge=False, off=())
    assert e.texts_read == a.notes["texts_read"] and "no random directions" in verdict(e)
    with pytest.raises(ValueError, match="positive KL"):
        evaluate(a, task, NEUTRAL, damage=0.0)
