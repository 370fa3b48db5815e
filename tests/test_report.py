"Pictures and reports: the same file gives the same page, and the verdict says what was found."

import base64
import html
import io
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.text import Text

from concept_transfer.arms import ARMS, Arm, Settings, readouts_of, recorded
from concept_transfer.concepts import extract_concept
from concept_transfer.data import EMOTIONS, Corpus, data_hash, load_corpus, load_pairs
from concept_transfer.evidence import ArmResult, Capability, Effect, Evidence, OffTarget, evaluate
from concept_transfer.maps import fit_maps
from concept_transfer.measure import Bench, prose_damage
from concept_transfer.models import load_model, twin
from concept_transfer.plots import (
    curves,
    figures,
    look,
    plot_grid,
    plot_matrix,
    plot_separation,
    plot_spectrum,
)
from concept_transfer.report import advice, details, verdict, write_report
from concept_transfer.steering import place
from concept_transfer.tasks import ChoiceItem, ChoiceTask, load_task
from concept_transfer.toys import planted_module
from concept_transfer.views import damage_anchors, layer_scores, moved_items

PAIRS = load_pairs("emotions/happiness")
SCENES = Corpus("scenes", [x for e in EMOTIONS[1:4] for x in load_pairs(f"emotions/{e}").texts])
NEUTRAL = Corpus("neutral", load_corpus("neutral").texts[:48])


@pytest.fixture(scope="module")
def pair():
    "A model that answers with emotions, its twin, joy, and maps."
    source = load_model(*planted_module(max_position_embeddings=256))
    target, _ = twin(source)
    concept = extract_concept(source, PAIRS)
    return source, target, concept, fit_maps(source, target, SCENES, [1, 2], [1, 2], template=PAIRS.template)


@pytest.fixture(scope="module")
def joy(pair):
    _, target, concept, maps = pair
    return place(concept, target, map=maps[2, 2], dose=0.3)


@pytest.fixture(scope="module")
def evidence(joy):
    task, off = load_task("emotions/happiness"), [load_task(f"emotions/{e}").take(12) for e in EMOTIONS[1:3]]
    asked = dict(strengths=(-1, 0, 1, 2), off=off, readouts=[x.take(12) for x in readouts_of(task)])
    settings = Settings(random=19, damage=0.1, bootstrap=500, **asked)
    with pytest.MonkeyPatch.context() as m:
        m.setattr("concept_transfer.arms.load_task", lambda *a: load_task(*a).take(24))
        m.setattr("concept_transfer.arms.prose_damage", partial(prose_damage, passages=2))
        return evaluate(joy, task.take(16), NEUTRAL, settings=settings, pairs=PAIRS)


@pytest.fixture(scope="module")
def drawn(evidence):
    return figures(evidence)


def short(joy, settings, task=None, arms=None, **given):
    task = task or load_task("emotions/happiness").take(16)
    return evaluate(joy, task, NEUTRAL, arms, ["equal_damage"], replace(settings, bootstrap=200), **given)


# the page


@pytest.mark.slow
def test_the_same_evidence_gives_the_same_page(evidence, drawn, tmp_path):
    "Also after it was saved and read: all that is shown is in the file."
    evidence.save(tmp_path / "e.json")
    again = Evidence.load(tmp_path / "e.json")
    write_report(evidence, tmp_path / "a.html", drawn)
    write_report(again, tmp_path / "b.html", figures(again))
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


@pytest.mark.slow
def test_a_page_holds_all_that_it_shows(evidence, drawn, tmp_path):
    write_report(evidence, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "http" not in page and not re.search(r"<(script|link)\b", page)
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == len(drawn) and all(s.startswith("data:image/png;base64,") for s in sources)
    for s in sources:
        assert matplotlib.image.imread(io.BytesIO(base64.b64decode(s.split(",")[1]))).std() > 0
    of = evidence.provenance
    for words in (of.task_hash, of.neutral_hash, of.target, of.versions["torch"], of.notes["texts_hash"]):
        assert words in page
    top, folded = page.split("<details>")
    assert re.findall(r"<h2>(.*)</h2>", top) == [
        "How often the wanted answer is chosen",
        "What it breaks",
        "What to do next",
        "What this does not show",
    ]
    assert re.findall(r"<h2>(.*)</h2>", folded) == [
        "Effect",
        "Dose",
        "Cost",
        "Off target",
        "All arms at equal damage",
        "Asked in other words, and in none",
        "What else breaks",
        "Side by side, greedy, at strength 1",
        "Provenance",
    ]
    for name, a in evidence.arms.items():
        assert ARMS[name].words in page and (not a.reason or a.reason in page)


@pytest.mark.slow
def test_the_top_of_a_page_is_for_those_who_know_none_of_it(evidence, joy, tmp_path):
    "One question before and after, as the evidence asked it, other ways, damage beside what everybody knows."
    asked = moved_items(
        replace(joy, dose=evidence.arms["transplanted"].dose), load_task("emotions/happiness").take(16)
    )
    (run,) = evidence.of("equal_damage")["transplanted"]
    np.testing.assert_allclose(asked.after.margin, run.answers["margin"], atol=1e-4)
    anchors = damage_anchors(joy.model, NEUTRAL)
    write_report(evidence, tmp_path / "a.html", items=asked, anchors=anchors)
    top, folded = (tmp_path / "a.html").read_text(encoding="utf-8").split("<details>")
    item, found = asked.task.items[asked.typical], html.unescape(top)
    for words in (item.prompt, asked.task.instruction.strip(), *item.choices, *anchors, *advice(evidence)):
        assert words.strip() in found
    nearest = min(anchors, key=lambda k: abs(np.log(anchors[k] / evidence.arms["transplanted"].kl)))
    assert f"{nearest} comes closest" in found
    said = {"concept": "It is a concept", "word": "It is a word", "nothing": "It is nothing"}
    assert said.get(evidence.finding, "cannot be said") in found
    assert "<h2>Which questions moved" in top and "<h2>Effect" in folded
    pictures = re.findall(r'<img alt="([^"]+)" src=.*?<figcaption>([^<]+)</figcaption>', top + folded, re.S)
    assert len(pictures) == (top + folded).count("<img") == 5


@pytest.mark.slow
def test_texts_are_escaped(evidence, joy, tmp_path):
    "Names and texts of others may hold anything."
    name = "<script>alert(1)</script> & more"
    e = replace(evidence, provenance=replace(evidence.provenance, transplant=name))
    texts = ["</td><b>bold</b>"] * 8
    e = replace(e, runs=[replace(r, texts=texts) if r.texts else r for r in e.runs])
    some = [ChoiceItem(f"It was {HOSTILE}", (f"{HOSTILE} a", f"{HOSTILE} b"), 0, "one")] * 3
    asked = moved_items(joy, ChoiceTask(name, some, HOSTILE))
    write_report(e, tmp_path / "a.html", {}, items=asked, anchors={HOSTILE: 0.1})
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<b>" not in page and "&lt;script&gt;" in page


HOSTILE = "<script>alert(1)</script>"


@pytest.mark.slow
def test_82_names_of_scores_arms_and_tasks_are_escaped(evidence, tmp_path):
    "Whatever a file of others says stays text: on the page, and on the card of a notebook."
    named = {"random": HOSTILE}
    runs = [
        replace(
            r,
            arm=named.get(r.arm, r.arm),
            task=r.task and HOSTILE + r.task,
            texts=r.texts and [HOSTILE] * len(r.texts),
            answers=r.answers | ({} if r.task else {HOSTILE: r.answers.get("margin", [])}),
        )
        for r in evidence.runs
    ]
    of = replace(
        evidence.provenance, task=HOSTILE, source=HOSTILE, target=HOSTILE, versions={HOSTILE: HOSTILE}
    )
    e = Evidence(of, runs, {HOSTILE * 2: HOSTILE})
    write_report(e, tmp_path / "a.html", {HOSTILE: e.show(metric=HOSTILE)})
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    for shown in (page, e._repr_html_()):
        assert "<script" not in shown and html.escape(HOSTILE) in shown


@pytest.mark.slow
def test_84_an_arm_that_no_table_knows_is_drawn_plainly(evidence, tmp_path):
    "An arm of somebody's own is no fault of the file."
    runs = [replace(r, arm="their_own" if r.arm == "random" else r.arm) for r in evidence.runs]
    replace(evidence, runs=runs).save(tmp_path / "e.json")
    e = Evidence.load(tmp_path / "e.json")
    write_report(e, tmp_path / "a.html", {"Effect": e.show()})
    assert "their own" in (tmp_path / "a.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["price_$5_to_$9", r"$\frac{$ {} %s _of_ ^it^"])
@pytest.mark.slow
def test_85_names_are_drawn_as_they_are(evidence, pair, name):
    runs = [replace(r, task=r.task and name + r.task) for r in evidence.runs]
    named = replace(evidence.provenance, transplant=name, task=name, bootstrap=50)
    e, concept, maps = replace(evidence, provenance=named, runs=runs), *pair[2:]
    drawn = [*figures(e).values(), plot_separation(replace(concept, name=name)), plot_spectrum(maps[1, 2])]
    shown = ""
    for picture in drawn:
        picture.savefig(io.BytesIO(), dpi=20)
        shown += "\n".join(text.get_text() for text in picture.findobj(Text) if not text.get_parse_math())
        shown += "\n".join(text.get_text() for text in picture.findobj(Text) if "$" not in text.get_text())
    assert shown.count(name) >= 3


def test_scores_of_several_true_answers_are_in_the_page(joy, tmp_path):
    e = short(joy, Settings(random=0, damage=0.1), load_task("truthfulness").take(8))
    write_report(e, tmp_path / "a.html", {})
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert all(f">{k}<" in page for k in ("MC1", "MC2", "MC1 per token", "MC2 per token"))


@pytest.mark.slow
def test_a_report_is_whole_or_not_there(evidence, tmp_path):
    with pytest.raises(AttributeError):
        write_report(evidence, tmp_path / "a.html", {"Effect": "no picture"})
    assert not list(tmp_path.iterdir())


# what to do next


def case(finding="concept", **parts):
    "A result of which nothing is to be complained about, but for what is given."
    arms = {
        "base": ArmResult(choice_rate=0.1, ci=[0.0, 0.2], kl=0.0),
        "transplanted": ArmResult(choice_rate=0.6, ci=[0.4, 0.8], kl=0.1, logit_shift=2.0),
        "random": ArmResult(choice_rate=0.1, ci=[0.0, 0.2], kl=0.1, draws=[0.1] * 20),
    } | parts.pop("arms", {})
    effect = Effect(gain=0.5, gain_ci=[0.3, 0.7], smallest_effect=0.2)
    given = (
        dict(capability={}, off_target=[], readouts=["one"], groups=range(20), notes={}, effect=effect)
        | parts
    )
    of = SimpleNamespace(groups=given.pop("groups"), notes=given.pop("notes"))
    return SimpleNamespace(finding=finding, arms=arms, provenance=of, **given)


def native(low, high):
    return {"native": ArmResult(choice_rate=(low + high) / 2, ci=[low, high], kl=0.1)}


WRONG_WAY = Effect(gain=-0.5, gain_ci=[-0.7, -0.3])
MOVED = [OffTarget("behaviours/refusal", 0.5, {"transplanted": 0.3}, {"transplanted": 0.01})]


@pytest.mark.parametrize(
    "finding, parts, words",
    [
        ("concept", {}, "Try it on questions of your own"),
        ("word", {}, "push the bare word"),
        ("nothing", dict(arms=native(0.5, 0.9)), "Fit the map on more text"),
        ("nothing", dict(arms=native(0.0, 0.2)), "does not do it here either"),
        ("nothing", dict(effect=WRONG_WAY), "sides of the pairs were mixed up"),
        ("nothing", dict(effect=Effect(gain=0.1, gain_ci=[-0.1, 0.3])), "four times as many"),
        (None, {}, "Ask more questions in other words"),
        (None, dict(notes={"reused": 4}), "did not choose layers and dose: 4 of these did"),
        (None, dict(groups=range(4)), "at least 10 scenarios; 4 are too few"),
        (None, dict(arms={"random": ArmResult(draws=[0.1] * 3)}), "19 random directions or more; with 3"),
        ("nothing", dict(arms={"base": ArmResult(choice_rate=0.9, ci=[0.8, 1])}), "answer to 90% already"),
        (
            "concept",
            dict(capability=dict(base=Capability(0.9), transplanted=Capability(0.6, None, 120, 0.01))),
            "60% of the easy questions are right, 90% before",
        ),
        (
            "concept",
            dict(capability=dict(base=Capability(repetition=0.1), transplanted=Capability(repetition=0.3))),
            "30% of what it writes repeats itself",
        ),
        ("concept", dict(off_target=MOVED), "Look at refusal before any use"),
        (
            "concept",
            dict(arms={"prompt": ArmResult(choice_rate=0.5, ci=[0.3, 0.7], kl=0.05)}),
            "Where a prompt",
        ),
        (None, dict(effect=Effect()), "nothing was judged"),
    ],
)
def test_what_to_do_next_follows_from_what_was_found(finding, parts, words):
    said = advice(case(finding, **parts))
    assert sum(words in x for x in said) == 1, said
    assert parts == {} or not any(words in x for x in advice(case()))


@pytest.mark.parametrize(
    "share, ci, words, does",
    [
        (1.0, [0.94, 1 - 1e-9], 1.0, "as much"),
        (0.5, [0.3, 0.7], 0.6, "as much"),
        (0.5, [0.3, 0.7], 0.8, "more"),
        (0.5, [0.3, 0.7], 0.2, "less"),
    ],
)
@pytest.mark.slow
def test_whether_words_do_as_well(evidence, tmp_path, share, ci, words, does):
    mine, prompt = (evidence.arms[k] for k in ("transplanted", "prompt"))
    arms = {"transplanted": replace(mine, choice_rate=share, ci=ci)}
    arms["prompt"] = replace(prompt, choice_rate=words)
    e = replace(evidence)
    vars(e)["arms"] = evidence.arms | arms
    write_report(e, tmp_path / "a.html", {})
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert f"Asking for it in words does {does}: then {words:.0%}" in page


def test_nothing_is_advised_against_that_does_no_harm():
    assert len(advice(case())) == 1


# the verdict


@pytest.mark.slow
def test_the_verdict_names_an_effect(evidence):
    said = verdict(evidence)
    assert said.startswith("An effect: the transplanted concept moves the share of answers")
    assert (
        f"{100 * evidence.effect.gain:+.0f} points" in said and f"p = {evidence.effect.p_value:.3f}" in said
    )
    more = " ".join(details(evidence))
    for words in (
        "McNemar",
        "of the native effect",
        "move the wrong way",
        "questions right",
        "2 other behaviours",
    ):
        assert words in more


@pytest.mark.slow
def test_answers_that_do_not_depend_on_the_model_show_no_effect(joy):
    rng = np.random.default_rng(0)
    scenes = [x for e in ("fear", "anger", "disgust") for x in load_pairs(f"emotions/{e}", "test").positive]
    items = [ChoiceItem(f"{x} It was", (" red", " blue"), int(rng.integers(2)), x) for x in scenes]
    e = short(joy, Settings(random=20, damage=0.1), ChoiceTask("coin", tuple(items)))
    assert e.effect.gain_ci[0] <= 0 <= e.effect.gain_ci[1] and e.effect.p_mcnemar > 0.01
    assert verdict(e).startswith("No effect")


@pytest.mark.slow
def test_the_verdict_is_rarely_wrong_on_nothing(joy):
    "200 null runs: one random direction is taken for the transplant, twenty others are its controls."
    scenes = load_pairs("emotions/fear", "test").positive
    words = (" red", " blue", " cold", " old", " near")
    task = ChoiceTask("null", tuple(ChoiceItem(f"{x} It was", words, 0, x) for x in scenes))
    bench = Bench(joy.model, joy.layer, task, Corpus("n", NEUTRAL.texts[:16]), 0.1)
    g = torch.Generator().manual_seed(0)
    directions = [torch.randn(len(joy.direction), generator=g) for _ in range(80)]
    ts = bench.at_damage([replace(joy, direction=v, shuffled=None) for v in directions])
    pool = [
        recorded("random", "equal_damage", a, d, dose=t.dose)
        for t, a, d in zip(ts, bench.ask(ts), bench.hurt(ts), strict=True)
    ]
    plain = evaluate(joy, task, NEUTRAL, experiments=[], settings=Settings(damage=0.1))
    rng = np.random.default_rng(1)
    wrong = 0
    for seed in range(200):
        first, *others = (pool[i] for i in rng.choice(len(pool), 21, replace=False))
        runs = [*plain.runs, replace(first, arm="transplanted"), *others]
        e = Evidence(replace(plain.provenance, seed=seed, bootstrap=200), runs)
        wrong += not verdict(e).startswith("No effect")
    assert wrong <= 10, wrong


@pytest.mark.slow
def test_the_verdict_says_what_was_not_tested(joy):
    alone, few = (short(joy, Settings(random=n, damage=0.1)) for n in (0, 5))
    assert verdict(alone).startswith(
        "An effect, not tested"
    ) and "no random directions were asked" in verdict(alone)
    assert verdict(few).startswith("An effect, not tested") and "too few for a test" in verdict(few)
    away = short(replace(joy, direction=-joy.direction), Settings(random=0, damage=0.1))
    assert verdict(away).startswith(("The opposite", "No effect"))


def test_nothing_transplanted_is_no_verdict(joy, tmp_path):
    e = evaluate(joy, load_task("emotions/happiness").take(4), NEUTRAL, experiments=[])
    assert e.effect.gain is None and verdict(e).startswith("No verdict") and details(e) == []
    write_report(e, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "No verdict" in page and "equal damage was not asked for" in page


def test_items_that_chose_the_layers_are_counted(joy):
    task = load_task("emotions/happiness").take(4)
    chose = [data_hash([prompt]) for prompt in task.prompts[:2]]
    with pytest.warns(UserWarning, match="2 of these items chose layers"):
        e = evaluate(replace(joy, notes=joy.notes | {"tuning_items": chose}), task, NEUTRAL, experiments=[])
    assert e.provenance.notes["reused"] == 2


@pytest.mark.slow
def test_a_search_is_reported(evidence):
    tried = [{"layers": [1, 2]}, {"layers": [2, 2]}, {"layers": [1, 2]}]
    notes = evidence.provenance.notes | {"search": tried, "search_p": 0.0123, "texts_read": 792}
    of = replace(evidence.provenance, notes=notes)
    said = details(replace(evidence, provenance=of))[-1]
    assert said.startswith("2 layer pairs were tried on tuning items (792 texts read, p of the best 0.012)")
    assert said.endswith("from other items.")
    of = replace(of, notes=notes | {"reused": 4})
    assert details(replace(evidence, provenance=of))[-1].endswith(
        "4 of the items here are among these, so the result is too good."
    )


# pictures


@pytest.mark.slow
def test_pictures_are_shown_once_and_in_one_style(evidence, pair):
    plt.close("all")
    with plt.style.context("dark_background"):
        pictures = [
            *figures(evidence).values(),
            plot_separation(pair[2]),
            plot_grid(pair[3], "cosine"),
            evidence.show(),
        ]
    assert not plt.get_fignums() and all(p.get_facecolor() == (1, 1, 1, 1) for p in pictures)


@pytest.mark.slow
def test_an_arm_of_your_own_is_drawn(joy, tmp_path):
    mine = Arm(
        "opposite", "the other way", lambda x: [replace(x.t, direction=-x.t.direction)], colour="#56b4e9"
    )
    arms = {**ARMS, "opposite": mine}
    e = short(joy, Settings(random=0, damage=0.1), arms=arms)
    for known, words in ((arms, "the other way"), (ARMS, "opposite")):
        labels = [t.get_text() for t in figures(e, known)["Effect"].axes[0].get_yticklabels()]
        assert words in labels and look("opposite", known).words == words
        write_report(e, tmp_path / "a.html", arms=known)
        assert words in (tmp_path / "a.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_curves_are_those_of_the_file(evidence):
    for arm in ("transplanted", "native"):
        runs = [r for r in evidence.data["runs"] if (r["experiment"], r["arm"]) == ("curves", arm)]
        points = [(r["strength"], r["dose"], np.mean(r["answers"]["chosen"]), np.mean(r["kl"])) for r in runs]
        np.testing.assert_allclose(curves(evidence)[arm], points)


def test_the_best_of_many_layers_says_so(pair):
    *_, concept, maps = pair
    assert f"the best of {len(concept.layers)}<" in concept._repr_html_()
    assert "best of many layers is chosen by its AUC" in plot_separation(concept).get_label()
    assert "best of 4 cells is chosen by its number" in layer_scores(maps, concept).show().get_label()


def test_a_grid_wants_a_value_for_each_layer_pair(pair):
    with pytest.raises(ValueError, match="2 x 2 layer pairs"):
        plot_grid(pair[3], np.zeros((2, 3)), "something")


def test_scores_that_nobody_measured_are_refused_by_name(pair, evidence):
    with pytest.raises(ValueError, match="values 'R2' is not known; use r2, cosine"):
        plot_grid(pair[3], "R2")
    with pytest.raises(ValueError, match="metric 'mood' is not known; use "):
        evidence.show(metric="mood")


@pytest.mark.slow
def test_a_shift_that_changes_no_choice_is_said(evidence, tmp_path):
    base, mine = (evidence.of("equal_damage")[k][0] for k in ("base", "transplanted"))
    likelier = base.answers | {"margin": [x + 1 + i / 100 for i, x in enumerate(base.answers["margin"])]}
    e = Evidence(evidence.provenance, [base, replace(mine, answers=likelier)])
    assert verdict(e).startswith("No effect") and "in all items alike" in verdict(e)
    assert "becomes likelier, by +1.0" in verdict(e)
    notes = evidence.provenance.notes | {"reused": 3}
    again = replace(e, provenance=replace(evidence.provenance, notes=notes))
    assert "3 of these items chose layers and dose" in verdict(again)
    write_report(e, tmp_path / "a.html", pictures={})
    assert "What was carried over? No effect shown." in (tmp_path / "a.html").read_text()


def test_a_matrix_has_a_name_for_each_row():
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        plot_matrix(np.zeros((2, 2)), np.ones((2, 2)), ["one"], ["a", "b"])
