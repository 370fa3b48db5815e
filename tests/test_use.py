"A log that shows what was done to it, tests that hold at every look, a monitor that says since when."

import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from concept_transfer.artefacts import fingerprint
from concept_transfer.cli import main
from concept_transfer.models import tiny_model
from concept_transfer.monitor import Monitor, watched, with_reference, write_page
from concept_transfer.rollout import Course, Difference, Rollout, Stop, bucket
from concept_transfer.steering import Transplant, place
from concept_transfer.uselog import Answer, UseLog, answer, audit, read_log, unit_hash, used

OF = dict(artefact="5be1", concept="joy", model="toy", dose=0.07, layers=[2, 2], positions="all")
STOP = Stop("good", "bad", limit=0.2)
DRAWN = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def joy():
    direction = torch.randn(48, generator=torch.Generator().manual_seed(0))
    return place(direction, tiny_model("llama"), 2, dose=0.3, name="joy")


@pytest.fixture
def flags():
    return pytest.importorskip("openfeature", reason="OpenFeature is not installed (extra: rollout)")


def filled(path, n=12, **how):
    "A log of some requests, and the files that it left."
    log = UseLog(path, **how)
    for k in range(n):
        log.request(OF, f"user {k % 5}", "Hello", Answer(f"answer {k}"), arm="on" if k % 3 else "off")
    log.close()
    return log


def files_of(path):
    return {p: p.read_bytes() for p in path.parent.iterdir() if p.name.startswith(path.stem)}


# the log


def test_a_log_is_whole_and_summed_up(tmp_path):
    filled(tmp_path / "use.jsonl")
    found = audit(tmp_path / "use.jsonl")
    assert (found.rows, found.faults, found.torn) == (13, [], "")
    assert found.uses.set_index("arm")["requests"].to_dict() == {"off": 4, "on": 8}
    assert audit(tmp_path / "use.jsonl", unit="user 0").uses["requests"].sum() == 3


@DRAWN
@given(data=some.data(), size=some.sampled_from([900, 1 << 20]))
def test_whatever_is_done_to_lines_shows(tmp_path_factory, data, size):
    "One line changed, removed, doubled, moved, or the end cut off: there is a fault."
    path = tmp_path_factory.mktemp("log") / "use.jsonl"
    filled(path, size=size)
    lines = path.read_bytes().splitlines(keepends=True)
    i, j = (data.draw(some.integers(0, len(lines) - 1)) for _ in range(2))
    kind = data.draw(some.sampled_from(["change", "remove", "double", "move", "cut"]))
    changed = [*lines]
    if kind == "change":
        at, bit = data.draw(some.integers(0, len(lines[i]) - 2)), 1 << data.draw(some.integers(0, 7))
        changed[i] = lines[i][:at] + bytes([lines[i][at] ^ bit]) + lines[i][at + 1 :]
    elif kind == "remove":
        del changed[i]
    elif kind == "double":
        changed.insert(j, lines[i])
    elif kind == "move":
        changed.insert(j, changed.pop(i))
    else:
        del changed[i:]
    path.write_bytes(b"".join(changed))
    found = audit(path)
    assert bool(found.faults) == (changed != lines), (kind, i, j, found)


@DRAWN
@given(cut=some.integers(1, 400))
def test_a_torn_end_is_said_and_gone_on_from(tmp_path_factory, cut):
    "A killed process leaves a piece of its last row, or a row that its head does not know yet."
    path = tmp_path_factory.mktemp("log") / "use.jsonl"
    log = filled(path, 3)
    whole, head = path.read_bytes(), Path(f"{path}.head").read_text()
    log = UseLog(path)
    log.close()
    new = path.read_bytes()[len(whole) :]
    piece = new[: min(cut, len(new))]
    path.write_bytes(whole + piece)
    Path(f"{path}.head").write_text(head)
    found = audit(path)
    assert not found.faults and bool(found.torn) == (piece != new)
    UseLog(path).close()
    found = audit(path)
    assert not found.faults and not found.torn
    opened = [row for row in found.events if row["event"] == "opened"][-1]
    assert opened["torn"] == (0 if piece == new else len(piece))


def test_a_log_that_was_cut_while_nobody_wrote_says_so_for_ever(tmp_path):
    path = tmp_path / "use.jsonl"
    filled(path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    UseLog(path).close()
    assert "cut before row 11" in audit(path).faults[0]
    Path(f"{path}.head").unlink()
    assert "cut at the end" in audit(path).faults[-1]


def test_a_chain_that_was_computed_anew_does_not_hold_a_noted_head(tmp_path):
    path = tmp_path / "use.jsonl"
    filled(path)
    noted = audit(path).head
    for file in [*files_of(path)]:
        file.unlink()
    filled(path, 11)
    assert not audit(path).faults and noted in audit(path, heads=[noted]).faults[0]


def test_files_that_are_full_are_put_aside_and_read_in_order(tmp_path):
    path = tmp_path / "use.jsonl"
    filled(path, 40, size=2000)
    filled(path, 40, size=2000)
    found = audit(path)
    assert len([p for p in files_of(path) if p.suffix == ".jsonl"]) > 5 and not found.faults
    assert [row["n"] for row, _ in read_log(path)] == [*range(82)]
    min(p for p in files_of(path) if re.search(r"\.\d{12}\.", p.name)).unlink()
    assert "are missing" in audit(path).faults[0]


def test_nobody_stands_in_a_log_and_texts_only_where_asked(tmp_path):
    log = UseLog(tmp_path / "use.jsonl")
    log.request(OF, "ann@example.org", "My name is Ann", Answer("Hello, Ann!"))
    log.close()
    assert not any(
        b"nn" in x.replace(b"running", b"") for p, x in files_of(log.path).items() if p == log.path
    )
    log = UseLog(log.path, redact=partial(re.sub, "Ann", "[name]"))
    row = log.request(OF, "ann@example.org", "My name is Ann", Answer("Hello, Ann!"))
    log.close()
    assert (row["prompt"], row["answer"]) == ("My name is [name]", "Hello, [name]!")
    assert row["unit"] == unit_hash(log.path, "ann@example.org") != "ann@example.org"
    assert os.stat(f"{log.path}.salt").st_mode & 0o077 == 0
    Path(f"{log.path}.salt").unlink()
    with pytest.raises(ValueError, match="salt is gone"):
        audit(log.path, unit="ann@example.org")


def test_a_log_has_one_process(tmp_path):
    log = UseLog(tmp_path / "use.jsonl")
    with pytest.raises(ValueError, match="another process"):
        UseLog(log.path)
    log.close()
    UseLog(log.path).close()


def test_threads_share_a_log(tmp_path):
    log = UseLog(tmp_path / "use.jsonl", size=5000)

    def work():
        for _ in range(50):
            log.request(OF, "ann", "Hello", Answer("Hi."))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for x in threads:
        x.start()
    for x in threads:
        x.join()
    log.close()
    assert not audit(log.path).faults and audit(log.path).rows == 301


def test_what_cannot_be_logged_is_an_error_and_leaves_the_log_whole(tmp_path, monkeypatch):
    log = UseLog(tmp_path / "use.jsonl")
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:20]))
    with pytest.raises(OSError, match="Free some space"):
        log.request(OF, "ann", "Hello", Answer("Hi."))
    monkeypatch.undo()
    log.request(OF, "ann", "Hello", Answer("Hi."))
    log.close()
    assert not audit(log.path).faults and not audit(log.path).torn


def test_foreign_files_are_refused_and_stay(tmp_path):
    mine = tmp_path / "notes.txt"
    for text in ("my own notes\n", "my own notes", '{"mine": 1}\n{"mine"'):
        mine.write_text(text)
        with pytest.raises(ValueError, match="does not end in a row"):
            UseLog(mine)
        assert mine.read_text() == text and not Path(f"{mine}.salt").exists()
    with pytest.raises(OSError, match="there is no log"):
        audit(tmp_path / "nothing.jsonl")


def test_names_of_spans_are_those_of_the_conventions():
    flag = pytest.importorskip("opentelemetry.semconv._incubating.attributes.feature_flag_attributes")
    from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as ai

    code = (Path(__file__).parents[1] / "concept_transfer" / "uselog.py").read_text()
    known = {v for m in (flag, ai) for v in vars(m).values() if isinstance(v, str)}
    named = set(re.findall(r'"((?:gen_ai|feature_flag)\.[\w.]+)"', code))
    assert len(named) > 5 and named <= known


# what an answer shows


def test_an_answer_is_that_of_generate_and_is_measured(joy):
    got = answer(joy, "It rained and", 2.0, twin=True, max_new_tokens=5)
    assert got.text == joy.generate("It rained and", 2.0, 5) and got.kl > 0
    moved = got.projection[1] - got.projection[0]
    assert moved == pytest.approx(2 * joy.dose * joy.norm, rel=1e-3)
    base = answer(joy, "It rained and", 0.0, twin=True, max_new_tokens=5)
    assert base.kl is None and base.norm[0] == base.norm[1]


def test_what_a_log_says_of_a_transplant_is_that_of_its_file(joy, tmp_path):
    joy.save(tmp_path / "joy.safetensors")
    again = Transplant.load(tmp_path / "joy.safetensors", joy.model)
    assert used(again) == used(joy) and used(joy)["artefact"] == fingerprint(joy)
    assert used(replace(joy, dose=0.4))["artefact"] != used(joy)["artefact"]


# the rollout


@DRAWN
@given(unit=some.text(min_size=1), low=some.floats(0, 100), high=some.floats(0, 100))
def test_a_higher_share_only_adds_units(unit, low, high):
    low, high = sorted((low, high))
    at = bucket("joy", unit)
    assert 0 <= at < 10_000 and at == bucket("joy", unit) and (at >= 100 * low or at < 100 * high)


@DRAWN
@given(seed=some.integers(0, 1000), chance=some.floats(0.01, 0.99))
def test_capital_is_never_below_nothing_and_ends_hold_the_mean(seed, chance):
    rng, d = np.random.default_rng(seed), Difference()
    for _ in range(60):
        d.add(float(rng.random()), bool(rng.random() < chance), chance)
    low, high = d.ends()
    assert np.isfinite(d.log).all() and -1 <= low < high <= 1


def test_differences_hold_at_every_look():
    "Of 200 rollouts with a true difference of .2 at most one in twenty ever leaves it out."
    rng, missed = np.random.default_rng(0), 0
    for _ in range(200):
        d, out = Difference(), False
        for _ in range(120):
            on = bool(rng.random() < 0.3)
            d.add(float(rng.random() < (0.6 if on else 0.4)), on, 0.3)
            low, high = d.ends()
            out = out or not low <= 0.2 <= high
        missed += out
    assert missed <= 10


def asked(course, unit, on, good=1.0, bad=0.0):
    row = {"event": "request", "unit": unit, "arm": "on" if on else "off", "share": course.share}
    course.take(row | {"scores": {"good": good, "bad": bad}})


def test_a_unit_counts_once_a_stage_and_by_its_chance():
    course, chances = Course(STOP, (1, 5, 100), 1), []

    def note(x, on, chance):
        chances.append(chance)

    def stage(share):
        course.take({"event": "share", "share": share})
        for test in course.tests.values():
            test.add = note

    stage(1)
    asked(course, "off first", False)
    asked(course, "off first", False)
    asked(course, "on first", True)
    assert chances == [0.01] * 4
    stage(5)
    asked(course, "off first", True)
    asked(course, "on first", True)
    asked(course, "new", False)
    assert chances[4:] == [4 / 99] * 2 + [0.05] * 2
    stage(100)
    asked(course, "new", True)
    assert len(chances) == 8


def rolled(joy, path, texts=("steered", "base"), **how):
    "A rollout whose answers and scores are those of their arm."

    def made(t, prompt, strength, twin):
        return Answer(texts[0] if strength else texts[1])

    scores = {"good": lambda p, x: float(x == "steered"), "bad": lambda p, x: float(x == "broken")}
    return Rollout(joy, UseLog(path), scores, STOP, **{"stages": (20, 60, 100), "answer": made} | how)


def test_a_good_rollout_goes_to_all_and_a_bad_one_to_nobody(joy, tmp_path, flags):
    good, bad = rolled(joy, tmp_path / "good.jsonl"), rolled(joy, tmp_path / "bad.jsonl", ("broken", "base"))
    for k in range(1500):
        good(f"user {k}", "Hello")
        bad(f"user {k}", "Hello")
    assert good.course.share == 100 and good("anybody", "Hello") == "steered"
    assert bad.course.share == 0 and bad("anybody", "Hello") == "base"
    why = [row["why"] for row in audit(bad.log.path).events if row["event"] == "share"]
    assert len(why) == 1 and why[0].startswith("stop")


def test_a_rollout_goes_on_from_its_log(joy, tmp_path, flags):
    first = rolled(joy, tmp_path / "use.jsonl")
    for k in range(60):
        first(f"user {k}", "Hello")
    first.to(60, "by hand")
    for k in range(30):
        first(f"user {k}", "Hello")
    first.log.close()
    again = rolled(joy, tmp_path / "use.jsonl")
    assert again.course.look() == first.course.look() and again.course.seen == first.course.seen
    again.log.close()
    with pytest.raises(ValueError, match="another plan"):
        rolled(joy, tmp_path / "use.jsonl", stages=(20, 100))


def test_a_rollout_does_not_go_on_from_a_changed_log(joy, tmp_path, flags):
    rollout = rolled(joy, tmp_path / "use.jsonl")
    rollout("ann", "Hello")
    rollout("bob", "Hello")
    rollout.log.close()
    lines = rollout.log.path.read_bytes().splitlines(keepends=True)
    rollout.log.path.write_bytes(b"".join(lines[:-2] + lines[-1:]))
    with pytest.raises(ValueError, match="are missing"):
        rolled(joy, tmp_path / "use.jsonl")


def test_switched_off_from_inside_and_outside(joy, tmp_path, flags):
    rollout = rolled(joy, tmp_path / "use.jsonl", share=100)
    assert rollout("ann", "Hello") == "steered"
    Path(f"{rollout.log.path}.off").touch()
    assert rollout("ann", "Hello") == "base" and rollout.course.share == 0
    Path(f"{rollout.log.path}.off").unlink()
    rollout.to(100, "on again")
    assert rollout("ann", "Hello") == "steered"
    rollout.to(0, "off")
    assert rollout("ann", "Hello") == "base"


def test_in_the_shadow_nobody_gets_what_is_logged(joy, tmp_path, flags):
    rollout = rolled(joy, tmp_path / "use.jsonl", shadow=True, stages=(50,))
    assert {rollout(f"user {k}", "Hello") for k in range(40)} == {"base"}
    uses = audit(rollout.log.path).uses.set_index("arm")["requests"]
    assert uses["shadow"] > 10 and uses["off"] > 10
    assert rollout.course.look()["effect"][0] > 0


def test_an_answer_that_fails_is_given_without_steering_and_counts(joy, tmp_path, flags):
    def made(t, prompt, strength, twin):
        if strength:
            raise MemoryError("a prompt of a person stands here")
        return Answer("base")

    rollout = rolled(joy, tmp_path / "use.jsonl", answer=made, stages=(50,))
    assert {rollout(f"user {k}", "Hello") for k in range(20)} == {"base"}
    assert rollout.course.look()["units_on"] > 3
    assert "stands here" not in rollout.log.path.read_text()


def test_scores_outside_of_0_and_1_are_refused(joy, tmp_path, flags):
    scores = {"good": lambda p, x: 7.0, "bad": lambda p, x: 0.0}
    rollout = Rollout(joy, UseLog(tmp_path / "use.jsonl"), scores, STOP, answer=lambda *a: Answer("x"))
    with pytest.raises(ValueError, match="from 0 to 1"):
        rollout("ann", "Hello")


SCRIPT = """
import sys, torch
from concept_transfer.models import tiny_model
from concept_transfer.rollout import Rollout, Stop
from concept_transfer.steering import place
from concept_transfer.uselog import Answer, UseLog
joy = place(torch.ones(48), tiny_model("llama"), 2, norm=5.0)
scores = {"good": lambda p, x: 1.0, "bad": lambda p, x: 0.0}
log = UseLog(sys.argv[1], size=20_000)
rollout = Rollout(joy, log, scores, Stop("good", "bad"), stages=(50,), answer=lambda *a: Answer("x"))
while True:
    rollout("user", "Hello")
    print(log.rows - 1, flush=True)
"""


@pytest.mark.slow
def test_kill_loses_nothing_that_was_answered(tmp_path, flags):
    path, answered = tmp_path / "use.jsonl", []
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for lines in (1, 40, 200):
        command = [sys.executable, "-c", SCRIPT, str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        answered += [int(process.stdout.readline()) for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
        answered += map(int, process.communicate()[0].split())
    assert not audit(path).faults
    assert {*answered} <= {row["n"] for row, _ in read_log(path)} and len({*answered}) == len(answered)


# the monitor


def row(n, rng, **move):
    known = {"norm": 6.0, "kl": 0.1} | move
    scores = {"good": float(rng.random() < move.get("good", 0.7))}
    about = {"event": "request", "n": n, "time": f"day {n}", "strength": 1.0, "repetition": 0.0}
    drawn = {"norm": [rng.normal(known["norm"], 0.3)] * 2, "projection": [rng.normal(0, 1)] * 2}
    return about | drawn | {"kl": rng.gamma(4, known["kl"] / 4), "scores": scores}


@pytest.fixture
def known(joy):
    pytest.importorskip("river", reason="river is not installed (extra: rollout)")
    rng, seen = np.random.default_rng(0), {}
    for n in range(200):
        for name, x in watched(row(n, rng)).items():
            seen.setdefault(name, []).append(x)
    return replace(joy, notes={"reference": {k: sorted(x) for k, x in seen.items()}})


@pytest.mark.parametrize(
    "name, move", [("kl", {"kl": 0.25}), ("norm", {"norm": 7.0}), ("good", {"good": 0.2})]
)
def test_what_moves_is_named_with_its_beginning(known, name, move):
    rng, monitor = np.random.default_rng(1), Monitor(known)
    found = [a for n in range(700) for a in monitor(row(n, rng, **(move if n >= 400 else {})))]
    assert [a.number for a in found] == [name] and abs(found[0].since - 400) < 40
    assert (found[0].now > found[0].usual) == (name != "good") and found[0].advice


def test_what_is_other_from_the_first_day_is_a_change_from_the_reference(known):
    rng, monitor = np.random.default_rng(1), Monitor(known)
    found = [a for n in range(200) for a in monitor(row(n, rng, norm=8.0))]
    assert [a.number for a in found] == ["norm"] and found[0].since < 10


def test_a_reference_travels_in_the_file(joy, tmp_path):
    made = with_reference(joy, ["It rained", "The bank"], {"long": lambda p, x: 0.5})
    made.save(tmp_path / "joy.safetensors")
    again = Transplant.load(tmp_path / "joy.safetensors", joy.model)
    assert again.notes == made.notes
    assert {*made.notes["reference"]} == {"norm", "projection", "kl", "repetition", "long"}
    with pytest.raises(ValueError, match="does not know what is usual"):
        Monitor(joy)


def test_alarms_are_logged_once_also_after_a_restart(joy, known, tmp_path, flags):
    rng = np.random.default_rng(2)

    def made(t, prompt, strength, twin):
        drawn = row(0, rng, norm=6.0 if len(count) < 300 else 8.0)
        count.append(0)
        return Answer("steered" if strength else "base", norm=drawn["norm"], projection=drawn["projection"])

    count, path, how = [], tmp_path / "use.jsonl", dict(stages=(50,), share=50)
    for _ in range(2):
        rollout = rolled(known, path, answer=made, watch=Monitor(known), **how)
        for k in range(350):
            rollout(f"user {k}", "Hello")
        rollout.log.close()
    alarms = [row["number"] for row in audit(path).events if row["event"] == "alarm"]
    assert alarms.count("norm") == 1 and len({*alarms}) == len(alarms)
    write_page(path, tmp_path / "use.html")
    page = (tmp_path / "use.html").read_text()
    assert "norm" in page and "check" in page and "http" not in page


# the shell


def test_audit_from_the_shell(tmp_path, capsys):
    path = tmp_path / "use.jsonl"
    filled(path)
    head = audit(path).head
    assert main(["audit", str(path), "--head", head, "--out", str(tmp_path / "use.html"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["faults"] == [] and said["head"] == head
    assert {u["arm"]: u["requests"] for u in said["uses"]} == {"off": 4, "on": 8}
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert main(["audit", str(path), "--json"]) == 1
    assert "cut at the end" in json.loads(capsys.readouterr().out)["error"]
