"""Planted truths: where the answer is known, the evidence must find it."""
import json
from dataclasses import replace
import numpy as np, pytest, torch
from concept_transfer.alignment import fit_maps, random_map
from concept_transfer.data import ChoiceItem, ChoiceTask, Corpus, load_corpus, load_pairs
from concept_transfer.evaluation import ARMS, ChoiceProbe, Evidence, _arm, _probes, _provenance, evaluate, off_target, steerability, summarise
from concept_transfer.extraction import extract_concept
from concept_transfer.injection import graft
from concept_transfer.models import tiny_model, twin
from concept_transfer.plots import verdict, write_report, figures
from concept_transfer.tasks import load_knowledge, load_truthfulness

PAIRS = load_pairs("emotions/happiness")
NEUTRAL = Corpus("neutral", load_corpus("neutral").texts[:48])


@pytest.fixture(scope="module")
def pair():
    m = tiny_model("qwen2", max_position_embeddings=256); t, Q = twin(m)
    corpus = Corpus("scenes", [x for e in ("sadness", "fear", "anger") for x in load_pairs(f"emotions/{e}").texts])
    return m, t, extract_concept(m, PAIRS), fit_maps(m, t, corpus, [2], [2])

@pytest.fixture(scope="module")
def task(pair):
    "Answers that the twin's own direction moves: whatever it says when pushed hard is the target."
    m, t, joy, maps = pair; words = (" red", " blue", " cold", " old", " near"); native = graft(extract_concept(t, PAIRS), t, 2, dose=.8)
    items = [ChoiceItem(f"{x} It was", words, 0, x) for x in load_pairs("emotions/fear", "test").positive]
    lp = np.array([np.array(a) for a in ChoiceProbe(t, ChoiceTask("probe", tuple(items)), 2)(lambda h: h + native.vector()).logp])
    base = np.array([np.array(a) for a in ChoiceProbe(t, ChoiceTask("probe", tuple(items)), 2)().logp]); k = int((lp - base).mean(0).argmax())
    return ChoiceTask("planted", tuple(i._replace(target=k) for i in items), "Say it.\n\n")

@pytest.fixture(scope="module")
def evidence(pair, task):
    m, t, joy, maps = pair
    return evaluate(graft(joy, t, map=maps[2, 2]), task, NEUTRAL, PAIRS, random=20, damage=.5, knowledge=False)

def test_in_a_twin_the_transplant_is_the_native_concept(evidence):
    a, b = (evidence.arms[k] for k in ("transplanted", "native"))
    assert evidence.items["transplanted"].tolist() == evidence.items["native"].tolist() or evidence.recovery_ci[0] <= 1 <= evidence.recovery_ci[1]
    assert abs(a["logit_shift"] - b["logit_shift"]) < .02 and a["logit_shift"] > 0
    assert abs(evidence.steerability["transplanted"]["slope"] - evidence.steerability["native"]["slope"]) < .02

def test_a_random_map_recovers_nothing(pair, task):
    "At a damage so small that every push acts linearly."
    m, t, joy, maps = pair; probes = _probes(graft(joy, t, map=maps[2, 2]), task, NEUTRAL, .02); base = probes.choices()
    shift = lambda W: float((probes.run(graft(joy, t, map=replace(maps[2, 2], W=W)), .1)["answers"].margin - base.margin).mean())
    native = shift(maps[2, 2].W); recovery = np.array([shift(random_map(maps[2, 2].W, seed)) for seed in range(16)]) / native
    half = 2.13 * recovery.std(ddof=1) / 4                       # 95 % interval of the mean of 16
    assert native > 0 and abs(recovery.mean()) <= half < .6, (recovery.mean(), half)

def test_answers_that_do_not_depend_on_the_model_show_no_effect(pair):
    m, t, joy, maps = pair; rng = np.random.default_rng(0)
    items = tuple(ChoiceItem(f"{x} It was", (" red", " blue"), int(rng.integers(2)), x) for e in ("fear", "anger", "disgust") for x in load_pairs(f"emotions/{e}", "test").positive)
    e = evaluate(graft(joy, t, map=maps[2, 2]), ChoiceTask("coin", items), NEUTRAL, random=20, damage=.5, strengths=(), knowledge=False)
    assert e.gain_ci[0] <= 0 <= e.gain_ci[1] and verdict(e).startswith("No effect") and e.p_mcnemar > .01

def test_every_number_can_be_recomputed_from_the_file(evidence, tmp_path):
    evidence.save(tmp_path/"e.json"); data = json.loads((tmp_path/"e.json").read_text()); found = summarise(data)
    for arm, values in found.pop("arms").items():
        for k, v in values.items(): assert data["arms"][arm][k] == v, (arm, k)
    for k, v in found.items(): assert data[k] == v, k
    assert steerability(data["curve"]) == data["steerability"]["transplanted"]
    write_report(evidence, tmp_path/"a.html", figures(evidence)); write_report(Evidence(data), tmp_path/"b.html", figures(Evidence(data)))
    assert (tmp_path/"a.html").read_bytes() == (tmp_path/"b.html").read_bytes()

def test_the_same_seed_gives_the_same_file(pair, task, evidence):
    m, t, joy, maps = pair; again = evaluate(graft(joy, t, map=maps[2, 2]), task, NEUTRAL, PAIRS, random=20, damage=.5, knowledge=False)
    assert again.data == evidence.data

def test_arms_stand_at_equal_damage_and_at_equal_norm(evidence):
    steered = [evidence.arms[k] for k in ("transplanted", "native", "random", "shuffled_map")]
    assert max(a["kl"] for a in steered) < 2 * min(a["kl"] for a in steered) and all(a["same_norm"]["kl"] > 0 for a in steered)

def test_several_true_answers_are_scored_as_truthfulqa_does(pair):
    m, t, joy, maps = pair; mc = load_truthfulness("tune")
    e = evaluate(graft(joy, t, map=maps[2, 2]), mc, NEUTRAL, random=2, damage=.5, strengths=(), source=m)
    for a in ("base", "transplanted", "source"): assert e.arms[a]["score_means"]["mc1"]["mean"] == pytest.approx(e.arms[a]["choice_rate"])
    for k in ("mc1", "mc2", "mc2_norm"): assert e.arms["base"]["scores"][k] == pytest.approx(e.arms["source"]["scores"][k], abs=1e-3)      # the twin answers as the model does
    assert 0 <= e.capability["base"]["knowledge"] <= 1 and set(e.capability) == {"base", "transplanted"} and e.capability["transplanted"]["knowledge_n"] == len(load_knowledge())

def test_a_behaviour_is_moved_by_its_own_transplant_first(pair, task):
    m, t, joy, maps = pair; own = graft(joy, t, map=maps[2, 2], dose=.5); shift, p = off_target([own, replace(own, direction=-own.direction)], [task])
    assert shift[0, 0] >= shift[1, 0] and p.shape == (2, 1) and (p <= 1).all()

def test_the_verdict_is_rarely_wrong_on_nothing(pair):
    "200 null runs: one random direction is taken for the transplant, twenty others are its controls."
    m, t, joy, maps = pair; own = replace(graft(joy, t, map=maps[2, 2]), shuffled=None); rng = np.random.default_rng(1)
    words = (" red", " blue", " cold", " old", " near"); items = tuple(ChoiceItem(f"{x} It was", words, 0, x) for x in load_pairs("emotions/fear", "test").positive)
    task = ChoiceTask("null", items); probes = _probes(own, task, Corpus("n", NEUTRAL.texts[:16]), .3); base = probes.choices()
    g = torch.Generator().manual_seed(0); pool = [probes.run(replace(own, direction=torch.randn(len(own.direction), generator=g))) for _ in range(80)]; wrong = 0
    for run in range(200):
        draw = rng.choice(len(pool), 21, replace=False); arms = {"base": [dict(answers=base, hurt=(0., 0., 1.), dose=0.)], "transplanted": [pool[draw[0]]], "random": [pool[i] for i in draw[1:]]}
        data = _provenance(own, task, NEUTRAL, .3, run) | dict(groups=[i.group for i in items], arms={k: _arm(v, base, task) for k, v in arms.items()} | {k: {"reason": "not here"} for k in ARMS if k not in arms})
        found = summarise(data, 200)
        for k, v in found.pop("arms").items(): data["arms"][k] |= v
        wrong += not verdict(Evidence(data | found)).startswith("No effect")
    assert wrong <= 16, wrong          # 5 % of 200 is 10; 16 or fewer has a chance of .97
