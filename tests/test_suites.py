"Public measures: files of wheels, readers on small files of the same form, and gates with a known truth."

import hashlib
import json
import math
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from concept_transfer import cli, suites
from concept_transfer.concepts import extract_concept
from concept_transfer.data import load_pairs
from concept_transfer.measure import Bench
from concept_transfer.models import tiny_model
from concept_transfer.steering import place
from concept_transfer.suites import MEASURES, Measure, Measured, SuiteResult, measure_suite, member
from concept_transfer.tasks import ChoiceItem, ChoiceTask, generation_task

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
    names = [f"small/{i}.{ending}" for i, ending in enumerate(endings.split())]
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
        ("count:word_count_range", dict(min_words=2.0, max_words=3.0), "two words", "one"),
        ("count:unique_word_count", dict(N=3.0), "a B c", "a A a"),
        ("count:conjunctions", dict(small_n=2.0), "this and that, or more", "and and"),
        ("format:list", dict(sep="!?"), "!? a\n!? b", "!? a"),
        ("format:no_whitespace", {}, "one", "one two"),
        ("words:consonants", {}, "this that", "no"),
        ("words:palindrome", {}, "level " * 10, "level " * 9),
        ("words:prime_lengths", {}, "it was", "four"),
        ("words:repeats", dict(small_n=1.0), "a b", "a a"),
        ("words:alphabet", {}, "young zebras again", "a c"),
        ("words:no_consecutive", {}, "one two", "two ten"),
    ],
)
def test_rules(index, rule, given, follows, fails):
    row = dict(key="1", prompt="Say it.", instruction_id_list=[rule], kwargs=[given])
    task = stored(index, "ifbench", json.dumps(row), endings="jsonl").task()
    assert [task.score([x]) for x in (follows, fails)] == [[1], [0]]


def test_a_scorer_says_how_it_agrees_with_people(index):
    rows = ["# about the file,,,", "objective,assistant_response,human_score_1,human_score_2"]
    for i in range(20):
        rows += [f"ask {i},the soup number {i} is fine,0,0", f"ask {i},the soup number {i} is horrid!,1,.5"]
    task = stored(index, "hate", "It was\n\nShe said\n", "\n".join(rows), endings="txt csv").task()
    assert task.prompts == ["It was", "She said"] and "40 grades of people AUC 1.00" in task.name
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


def test_a_planted_truth_has_control_and_a_random_direction_has_none(planted):
    push, task = planted
    easy = replace(task, name="easy", items=[i._replace(choices=i.choices[::-1]) for i in task.items])
    found = measure_suite(push, task, [mine(easy)], PAIRS)
    rows = found.table.set_index(["measure", "arm"])
    assert found.gates["control"] and found.gates["utility"] is False  # what one gains the other loses
    assert rows.score["target", "native"] == rows.score["target", "transplanted"] == 1
    assert {"prompt", "prompt_transplanted"} < {*found.table.arm} and found.damage["transplanted"] > 0
    assert "gate utility: FAILED" in repr(found) and "easy" in found._repr_html_()
    v = np.random.default_rng(1).normal(size=len(push.direction))
    other = measure_suite(place(v, push.model, 2, dose=push.dose * 0.05), task, [])
    assert not other.gates["control"] and other.gates["utility"] is None


def shown(kind, base, other, chance=0.5, name="x"):
    return Measured(name, kind, name, chance, [*range(len(base))], dict(base=base, transplanted=other))


@pytest.mark.parametrize("again, passed", [(0.6, True), (0.4, False), (-0.6, False)])
def test_robust_is_at_least_half_of_the_effect(again, passed):
    n = [0.0, 1.0] * 20
    moved = [shown("reworded", n, [x + by for x in n], None, str(by)) for by in (1.0, again)]
    found = SuiteResult("t", 1.0, {}, [shown("target", n, n), *moved], {})
    assert found.gates == {"control": False, "utility": None, "robust": passed}


def test_no_harm_is_shown_to_a_base_model_at_chance():
    n = [0.0, 1.0] * 20
    measured = [shown("target", n, n), shown("reworded", n, n, None), shown("capability", n, [0.0] * 40)]
    assert SuiteResult("t", 1.0, {}, measured, {}).gates["utility"] is None
    measured[-1] = replace(measured[-1], chance=0.1)
    found = SuiteResult("t", 1.0, {}, measured, {})
    assert found.gates["utility"] is False and not found.table.at_chance.iloc[-1]
    assert all(math.isfinite(x) and x > 0 for x in found.table.detectable)


def test_a_rerun_goes_on_and_no_text_is_kept(planted, tmp_path, monkeypatch):
    push, task = planted
    secret = generation_task("secret", ["A vile beginning", "Another one"], lambda text: 0.25)
    path, real = tmp_path / "suite.jsonl", suites.written
    monkeypatch.setattr(suites, "written", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        measure_suite(push, task, [mine(secret, "alignment")], tokens=3, path=path)
    monkeypatch.setattr(suites, "written", real)
    monkeypatch.setattr(Bench, "behind", lambda *a: pytest.fail("asked again"))
    found = measure_suite(push, task, [mine(secret, "alignment")], tokens=3, path=path)
    found.save(tmp_path / "suite.json")
    kept = (tmp_path / "suite.json").read_text()
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


def test_from_a_shell(planted, index, tmp_path, monkeypatch, capsys):
    push, task = planted
    row = dict(harmful_version="How?\n\nTake one and two and three and four.")
    monkeypatch.setattr(cli, "MEASURES", {"refusal": stored(index, "refusal", json.dumps([row]))})
    monkeypatch.setitem(suites.MEASURES, "refusal", cli.MEASURES["refusal"])
    monkeypatch.setattr(cli, "Transplant", SimpleNamespace(load=lambda file, model: push))
    monkeypatch.setattr(cli, "evaluate", lambda *a, **k: SimpleNamespace(save=lambda path: None, data={}))
    for name in ("write_report", "figures", "verdict", "details"):
        monkeypatch.setattr(cli, name, lambda *a: {})
    items = [i._asdict() for i in task.items]
    (tmp_path / "task.json").write_text(json.dumps(dict(name="planted", instruction="Say it. ", items=items)))
    argv = ["evaluate", "--transplant", "t", "--neutral", "neutral", "--task", tmp_path / "task.json"]
    argv = [*map(str, argv), "--out", str(tmp_path), "--json", "--suite"]
    assert cli.main([*argv, "standard"]) == 0
    said = json.loads(capsys.readouterr().out)["suite"]
    assert said == json.loads((tmp_path / "suite.json").read_text()) and said["gates"]["control"]
    assert {r["measure"] for r in said["table"]} == {"target", *suites.REWORDED, "refusal"}
    assert cli.main([*argv, "standart"]) == 1
    assert "standart" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.real
def test_a_real_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path))
    assert len(MEASURES["over_refusal"].task()) == 150
