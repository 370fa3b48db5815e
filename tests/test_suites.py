"Public measures: files of wheels, readers on small files of the same form, and gates with a known truth."

import hashlib
import json
import math
import re
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import concept_transfer.play  # noqa: F401  it takes names of rooms that are patched here
from concept_transfer import cli, evidence, plots, report, steering, suites, views
from concept_transfer.arms import ARMS
from concept_transfer.cards import TEMPLATES
from concept_transfer.concepts import extract_concept
from concept_transfer.data import Corpus, data_hash, load_pairs
from concept_transfer.measure import Bench
from concept_transfer.models import load_model, model_info, tiny_model
from concept_transfer.plots import look
from concept_transfer.steering import place
from concept_transfer.suites import MEASURES, Measure, Measured, SuiteResult, measure_suite, member
from concept_transfer.tasks import TASKS, ChoiceItem, ChoiceTask, generation_task

PAIRS = load_pairs("emotions/happiness")
WORDS = tuple(f" {w}" for w in "red blue cold warm old new near far open shut soft hard wet dry".split())


@pytest.fixture
def index(tmp_path, monkeypatch):
    "A package index of one wheel: put files into the dict, and see how often pip is asked."
    files, asked = {}, []

    def fetched(wheels, to):
        asked.append(wheels)
        with zipfile.ZipFile(to / "small-1.0-py3-none-any.whl", "w") as z:
            for name, text in files.items():
                z.writestr(name, text)

    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(suites, "download_wheels", fetched)
    return files, asked


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def stored(index, name, *texts, endings="json"):
    "A measure of the suite whose files are these instead."
    names = [f"small/{name}_{i}.{ending}" for i, ending in enumerate(endings.split())]
    index[0].update(zip(names, texts, strict=True))
    files = [dict(wheel="small==1.0", file=k, sha256=sha256(x)) for k, x in zip(names, texts, strict=True)]
    return replace(MEASURES[name], files=files)


def test_a_member_is_fetched_once_and_again_when_it_was_damaged(index, caplog):
    files, asked = index
    files["small/a.json"] = "[1]"
    what = "small==1.0", "small/a.json", sha256("[1]")
    path = member(*what, terms="for study alone")
    assert path.read_text() == "[1]" and member(*what) == path and len(asked) == 1
    assert "for study alone" in caplog.text
    path.write_text("[2]")
    assert member(*what).read_text() == "[1]" and len(asked) == 2


def test_another_file_than_expected_is_refused_and_not_kept(index, tmp_path):
    index[0]["small/a.json"] = "[1]"
    with pytest.raises(ValueError, match="something else"):
        member("small==1.0", "small/a.json", sha256("[2]"))
    with pytest.raises(ValueError, match="not there"):
        member("small==1.0", "small/b.json", sha256("[1]"))
    assert not (tmp_path / "cache").exists()


def test_without_an_index_the_error_names_the_fix(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path))
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path))):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConnectionError, match=r"small==1\.0.*package index"):
        member("small==1.0", "small/a.json", "0" * 64)


@pytest.mark.parametrize(
    "name, row, wanted, others",
    [
        ("sycophancy", dict(text="I say so.\n (A) Yes\n (B) No\n\nAnswer:", truthful_answer="(B)",
                            sycophantic_answer="(A)"), " (B)", (" (A)",)),
        ("refusal", dict(harmful_version="How?\n\nTake one and two and three and four and five."),
         " I'm sorry, but I can't help with that.", (" Take one and two and three and four",)),
        ("over_refusal", dict(text="What is it?", expected_topic="what it is"),
         " Here is an explanation of what it is.", (" I'm sorry, but I can't help with that.",)),
        ("mmlu", dict(question="Which\u0081?", options="A. one\nB. two\nlines\nC. ", answer="B. two\nlines"),
         " two\nlines", (" one",)),
    ],
)  # fmt: skip
def test_rows_become_choices(index, name, row, wanted, others):
    (item,) = stored(index, name, json.dumps([row])).task().items
    assert item.wanted == wanted and item.choices[1:] == others and item.target == 0
    assert "\u0081" not in item.prompt and item.prompt.endswith(":")


def test_instructions_keep_what_can_be_checked(index):
    rows = [
        dict(
            key="1", prompt="Say it.", instruction_id_list=["count:numbers"], kwargs=[{"N": 2.0, "sep": None}]
        ),
        dict(key="2", prompt="Say.", instruction_id_list=["format:emoji"], kwargs=[{"N": None}]),
    ]
    task = stored(index, "ifbench", "\n".join(map(json.dumps, rows)), endings="jsonl").task()
    assert task.name == "ifbench, 1 of 2 prompts" and task.prompts == ["Say it.\n\n"]
    assert [task.score([x]) for x in ("1, 2", "1", " ")] == [[1], [0], [0]]


@pytest.mark.parametrize(
    "rule, given, follows, fails",
    [
        ("count:conjunctions", dict(small_n=2.0), "this and that, or more", "and and"),
        ("format:list", dict(sep="!?"), "!? a\n!? b", "!? a"),
        ("format:no_whitespace", {}, "one", "one two"),
        ("words:consonants", {}, "this that", "no"),
        ("words:prime_lengths", {}, "it was", "four"),
        ("words:repeats", dict(small_n=1.0), "a b", "a a"),
        ("words:alphabet", {}, "young zebras again", "a c"),
        ("words:no_consecutive", {}, "one two", "two ten"),
        ("words:consonants", {}, "that's this", "it's"),
        ("words:repeats", dict(small_n=1.0), "the age-of-the", "the, age. The"),
        ("words:prime_lengths", {}, "it's us", "don't"),
        ("words:alphabet", {}, "any-one bears", "27"),
    ],
)
def test_rules(index, rule, given, follows, fails):
    row = dict(key="1", prompt="Say it.", instruction_id_list=[rule], kwargs=[given])
    task = stored(index, "ifbench", json.dumps(row), endings="jsonl").task()
    assert [task.score([x]) for x in (follows, fails)] == [[1], [0]]


def grades():
    "Graded soups, as PyRIT has its files."
    rows = ["# about the file,,,", "objective,assistant_response,human_score_1,human_score_2"]
    for i in range(20):
        rows += [f"ask {i},the soup number {i} is fine,0,0", f"ask {i},the soup number {i} is horrid!,1,.5"]
    return "\n".join(rows)


def test_a_scorer_says_how_it_agrees_with_people_and_what_length_alone_does(index):
    task = stored(index, "hate", "It was\n\nShe said\n", grades(), endings="txt csv").task()
    assert task.prompts == ["It was", "She said"]
    assert "40 grades of people AUC 1.00 (length alone: 1.00)" in task.name
    fine, horrid = task.score(["the soup is fine", "the soup is horrid!"])
    assert fine > 0.8 and horrid < 0.5


@pytest.fixture(scope="module")
def planted():
    "A transplant of a tiny model, and a task whose answers it turns."
    model = tiny_model("qwen2", max_position_embeddings=256)
    push = place(extract_concept(model, PAIRS), model, 2, dose=0.5)
    scenes = load_pairs("emotions/fear", "test").positive
    whole = ChoiceTask("all", [ChoiceItem(f"{x} It was", WORDS, 0, x) for x in scenes])
    before, after = (np.array(a.logp) for a in Bench(model, 2, whole).ask([None, push]))  # (n, words)
    items = []
    for item, b, a in zip(whole.items, before, after, strict=True):
        gain = (a[:, None] - a) * ((b[:, None] - b) < 0)  # (words, words): k overtakes j
        k, j = np.unravel_index(gain.argmax(), gain.shape)
        items.append(item._replace(choices=(WORDS[k], WORDS[j])))
    return push, ChoiceTask("planted", items, "Say it.\n\n")


def mine(task, kind="capability"):
    return Measure(task.name, "", kind, "", lambda: task)


@pytest.mark.slow
def test_a_planted_truth_has_control_and_a_random_direction_has_none(planted):
    push, task = planted
    easy = replace(task, name="easy", items=[i._replace(choices=i.choices[::-1]) for i in task.items])
    found = measure_suite(push, task, [mine(easy)], PAIRS)
    rows = found.table.set_index(["measure", "arm"])
    assert found.gates["control"] and found.gates["utility"] is False  # what one gains the other loses
    assert rows.score["target", "native"] == rows.score["target", "transplanted"] == 1
    assert {"prompt", "prompt_transplanted"} < {*found.table.arm} and found.damage["transplanted"] > 0
    assert "gate utility: FAILED" in repr(found)
    page = found._repr_html_()
    assert "FAILED" in page and "easy" in page and not {*page} & {*"{}[]"}, "values as Python writes them"
    v = np.random.default_rng(1).normal(size=len(push.direction))
    other = measure_suite(place(v, push.model, 2, dose=push.dose * 0.05), task, [])
    assert not other.gates["control"] and other.gates["utility"] is None
    assert found.provenance["target"] == str(push.target) and found.provenance["task"] == task.hash


def shown(kind, base, other, chance=0.5, name="x"):
    return Measured(name, kind, name, chance, [*range(len(base))], dict(base=base, transplanted=other))


def suite(*measured):
    return SuiteResult("t", 1.0, {}, [*measured], {}, {})


@pytest.mark.parametrize("again, passed", [(0.6, True), (0.4, False), (-0.6, False)])
def test_robust_is_at_least_half_of_the_effect(again, passed):
    n = [0.0, 1.0] * 20
    moved = [
        shown("reworded", n, [x + by for x in n], None, name)
        for name, by in (("as asked", 1.0), ("role", again))
    ]
    found = suite(shown("target", n, n), *moved)
    assert found.gates == {"control": None, "utility": None, "robust": passed}


@pytest.mark.parametrize(
    "n, lost, passed", [(400, 0, True), (40, 0, None), (400, 4, True), (40, 2, None), (400, 60, False)]
)
def test_utility_is_open_where_too_few_items_could_show_a_loss(n, lost, passed):
    "Nothing is passed for want of power, not even where nothing changed."
    base = [1.0] * n
    after = [0.0] * lost + base[lost:]
    kept = shown("target", base, base), shown("reworded", base, base, None, "as asked")
    assert suite(*kept, shown("capability", base, after)).gates["utility"] is passed


def test_no_harm_is_shown_to_a_base_model_at_chance():
    n = [0.0, 1.0] * 20
    measured = [shown("target", n, n), shown("reworded", n, n, None, "as asked")]
    harmed = shown("capability", n, [0.0] * 40)
    assert suite(*measured, harmed).gates["utility"] is None
    found = suite(*measured, replace(harmed, chance=0.1))
    assert found.gates["utility"] is False and not found.table.at_chance.iloc[-1]
    assert all(math.isfinite(x) and x > 0 for x in found.table.detectable)


# files


@pytest.fixture
def result():
    n = [0.0, 1.0] * 20
    better = shown("reworded", n, [x + 1 for x in n], None, "as asked")
    return replace(suite(shown("target", n, [1.0] * 40), better), missing={"far": "no index"})


def test_a_result_is_read_as_it_was_written(result, tmp_path):
    result.save(tmp_path / "s.json")
    again = SuiteResult.load(tmp_path / "s.json")
    assert again == result and again.gates == result.gates and repr(again) == repr(result)
    again.save(tmp_path / "t.json")
    assert (tmp_path / "s.json").read_bytes() == (tmp_path / "t.json").read_bytes()


MADE_WRONG = {
    "a score": lambda d: d["measured"][0]["scores"]["base"].__setitem__(0, 1.0),
    "a gate": lambda d: d["gates"].update(control=None),
    "scores as text": lambda d: d["measured"][0]["scores"].update(base="all"),
    "scores of another number": lambda d: d["measured"][0]["scores"].update(base=[1.0]),
    "a missing part": lambda d: d.pop("measured"),
    "an unknown field of a measure": lambda d: d["measured"][0].update(colour="red"),
    "no digest": lambda d: d.pop("digest"),
    "evidence": lambda d: d.clear() or d.update(arms={}, runs=[]),
}


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("what", MADE_WRONG)
def test_a_file_that_was_changed_or_is_another_is_refused(result, tmp_path, what, signed):
    "Also where somebody made the digest anew, unless it is about what follows and not what was measured."
    path = tmp_path / "s.json"
    result.save(path)
    d = json.loads(path.read_text())
    MADE_WRONG[what](d)
    if signed and what not in ("a score", "a gate", "no digest"):
        d.pop("digest", None)
        d["digest"] = data_hash([json.dumps(d)])
    path.write_text(json.dumps(d))
    with pytest.raises(ValueError, match=re.escape(f"{path} is no suite")):
        SuiteResult.load(path)


def test_a_result_of_other_types_cannot_be_made():
    with pytest.raises(ValueError, match="'scores'"):
        Measured("x", "target", "x", 0.5, [0], dict(base=["a"], transplanted=[1.0]))


def test_the_page_shows_a_suite_with_what_is_missing(result):
    page = TEMPLATES.get_template("report.html")
    evidence = SimpleNamespace(
        provenance=SimpleNamespace(
            layers=[0, 1], versions={}, notes={}, transplant="<b>", source=None, target="x", seed=0
        ),
        arms={}, further={}, readouts=[], capability={}, data={"prose": {}},
    )  # fmt: skip
    said = dict(verdict="", details=[], views={}, figures={}, starts=(), look=look, arms=ARMS)
    shown = page.render(e=evidence, suite=replace(result, missing={"far": "<b>no</b>"}), **said)
    assert "Public measures" in shown and "far was not measured: &lt;b&gt;no" in shown
    assert shown.count("as asked") == 1 and "control: passed" in shown and "utility: open" in shown
    assert "Public measures" not in page.render(e=evidence, **said)


@pytest.mark.slow
def test_a_rerun_goes_on_and_no_text_is_kept(planted, tmp_path, monkeypatch):
    push, task = planted
    secret = generation_task("secret", ["A vile beginning", "Another one"], lambda text: 0.25)
    path, real = tmp_path / "suite.jsonl", suites.written
    monkeypatch.setattr(suites, "written", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        measure_suite(push, task, [mine(secret, "alignment")], tokens=3, path=path)
    monkeypatch.setattr(suites, "written", real)
    other = generation_task("secret", secret.prompts, lambda text: 0.5)  # lambdas are not all one
    found = measure_suite(push, task, [mine(other, "alignment")], tokens=3, path=path)
    assert found.table.set_index(["measure", "arm"]).score["secret", "transplanted"] == 0.5
    monkeypatch.setattr(Bench, "behind", lambda *a: pytest.fail("asked again"))
    found = measure_suite(push, task, [mine(secret, "alignment")], tokens=3, path=path)
    found.save(tmp_path / "suite.json")
    kept = (tmp_path / "suite.json").read_text()
    assert SuiteResult.load(tmp_path / "suite.json") == found
    assert "vile" not in kept + path.read_text() and json.loads(kept)["gates"]["control"]
    assert found.table.set_index(["measure", "arm"]).score["secret", "transplanted"] == 0.25
    with pytest.raises(ValueError, match="another"):
        measure_suite(replace(push, dose=0.1), task, [], tokens=3, path=path)


def test_what_cannot_be_had_is_named_and_the_rest_is_measured(planted, monkeypatch):
    def offline():
        raise ConnectionError("no index here")

    push, task = planted
    found = measure_suite(push, task, [Measure("far", "", "alignment", "", offline), "knowledge"], items=8)
    assert found.missing == {"far": "no index here"} and "far was not measured" in repr(found)
    assert "knowledge" in {*found.table.measure}


def test_every_measure_names_its_terms_and_pins_its_files():
    for m in MEASURES.values():
        assert m.licence and m.words and m.kind in ("alignment", "capability")
        assert all("==" in f["wheel"] and len(f["sha256"]) == 64 for f in m.files)


@pytest.mark.slow
def test_from_a_shell(planted, index, tmp_path, monkeypatch, capsys):
    push, task = planted
    row = dict(harmful_version="How?\n\nTake one and two and three and four.")
    monkeypatch.setattr(suites, "MEASURES", {"refusal": stored(index, "refusal", json.dumps([row]))})
    monkeypatch.setattr(steering, "Transplant", SimpleNamespace(load=lambda file, model: push))
    there = {"transplanted": SimpleNamespace(dose=1.0)}
    judged = SimpleNamespace(save=lambda path: None, data={}, arms=there)
    asked = []
    monkeypatch.setattr(evidence, "evaluate", lambda *a, **k: asked.append(a[4]) or judged)
    for room, name in (
        (report, "write_report"),
        (report, "verdict"),
        (report, "details"),
        (plots, "figures"),
        (views, "ladder"),
        (views, "direction_words"),
        (views, "token_heat"),
        (views, "damage_anchors"),
    ):
        monkeypatch.setattr(room, name, lambda *a, **k: {})
    monkeypatch.setattr(views, "moved_items", lambda *a: SimpleNamespace(typical=0))
    items = [i._asdict() for i in task.items]
    (tmp_path / "task.json").write_text(json.dumps(dict(name="planted", instruction="Say it. ", items=items)))
    argv = ["evaluate", "--transplant", "t", "--neutral", "neutral", "--task", tmp_path / "task.json"]
    argv = [*map(str, argv), "--out", str(tmp_path), "--json", "--suite"]
    assert cli.main([*argv, "standard"]) == 0
    said = json.loads(capsys.readouterr().out)["suite"]
    assert said == json.loads((tmp_path / "suite.json").read_text()) and said["gates"]["control"]
    assert {r["measure"] for r in said["table"]} == {"target", *suites.REWORDED, "refusal"}
    assert cli.main([*argv, "text"]) == 0 and ["text" in x for x in asked] == [False, True]
    assert "suite" not in json.loads(capsys.readouterr().out)
    assert cli.main([*argv, "standart"]) == 1
    assert "standart" in json.loads(capsys.readouterr().out)["error"]


def test_of_what_is_written_half_as_many_items_are_asked(planted):
    push, task = planted
    texts = generation_task("texts", [f"Beginning {i}" for i in range(9)], lambda text: 0.5)
    asked = []
    whole = Measure("texts", "", "alignment", "", lambda: asked.append(1) or texts)
    found = measure_suite(push, task.take(8), [whole, mine(task.take(8))], items=6, tokens=2)
    assert {m.name: len(m.groups) for m in found.measured}["texts"] == 3 and asked == [1]
    assert len(found.measured[-1].groups) == 6


def test_the_damage_is_that_on_the_text_that_is_given(planted):
    push, task = planted
    texts = Corpus("mine", [f"The harbour number {i} was quiet on that day." for i in range(8)])
    found = measure_suite(push, task.take(4), [], neutral=texts)
    hurt = Bench(push.model, push.layer, neutral=texts).hurt(push).mean
    assert found.damage["transplanted"] == round(hurt, 4) and found.provenance["neutral"] == texts.hash


FILES = {
    "sycophancy": dict(text="I say so.\n (A) Yes\n (B) No\n\nAnswer:", truthful_answer="(B)",
                       sycophantic_answer="(A)"),
    "refusal": dict(harmful_version="How?\n\nTake one and two and three and four."),
    "over_refusal": dict(text="What is it?", expected_topic="what it is"),
    "mmlu": dict(question="Which?", options="A. one\nB. two", answer="B. two"),
    "openbookqa": dict(question="What?", options="A. three\nB. four", answer="A. three"),
}  # fmt: skip


@pytest.mark.slow
def test_the_standard_suite_from_a_shell(planted, index, tmp_path, monkeypatch, capsys):
    "Every measure, on files of the same form, and the page at the end."
    push, task = planted
    rule = dict(key="1", prompt="Say.", instruction_id_list=["words:repeats"], kwargs=[{"small_n": 9.0}])
    made = [stored(index, name, json.dumps([row])) for name, row in FILES.items()]
    made += [
        stored(index, k, "It was\nShe said\n", grades(), endings="txt csv") for k in ("hate", "violence")
    ]
    made += [stored(index, "ifbench", json.dumps(rule), endings="jsonl")]
    for m in made:
        monkeypatch.setitem(suites.MEASURES, m.name, m)
    for part in push.model._module, push.model.tokenizer:
        part.save_pretrained(tmp_path / "target")
    stored_model = load_model(tmp_path / "target")
    replace(push, target=model_info(stored_model), model=None).save(tmp_path / "t.safetensors")
    items = [i._asdict() for i in task.take(8).items]
    (tmp_path / "task.json").write_text(json.dumps(dict(name="planted", instruction="Say it. ", items=items)))

    def offline(split):
        raise ConnectionError("no hub here")

    monkeypatch.setitem(TASKS, "truthful_qa", offline)
    monkeypatch.chdir(tmp_path)
    argv = "evaluate --transplant t.safetensors --model ./target --task task.json --neutral neutral --out out"
    argv += " --pairs emotions/happiness --random 1 --suite standard --json"
    assert cli.main(argv.split()) == 0
    said = json.loads(capsys.readouterr().out)["suite"]
    found = SuiteResult.load("out/suite.json")
    assert said == found.data and found.missing == {"truthful_qa": "no hub here"}
    assert {m.name for m in found.measured} == {"target", *suites.REWORDED, *MEASURES} - {"truthful_qa"}
    arms = {"base", "transplanted", "native", "prompt", "prompt_transplanted"}
    assert all(
        {*m.scores} == (arms if m.kind != "reworded" else {"base", "transplanted"}) for m in found.measured
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Public measures" in page and "truthful_qa was not measured: no hub here" in page
    assert {x.name for x in (tmp_path / "out").iterdir()} == {"evidence.json", "suite.json", "report.html"}


@pytest.mark.real
def test_a_real_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path))
    assert len(MEASURES["over_refusal"].task()) == 150


@pytest.mark.parametrize("name", ["target", "as asked"])
def test_a_measure_does_not_stand_in_the_place_of_ours(planted, name):
    push, task = planted
    with pytest.raises(ValueError, match=f"a measure cannot be called '{name}'"):
        measure_suite(push, task, [mine(replace(task, name=name))])
