"A log that shows what was done to it, tests that hold at every look, a monitor that says since when."

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from concept_transfer import rollout as rollout_room
from concept_transfer import uselog
from concept_transfer.artefacts import fingerprint, linked
from concept_transfer.cli import main
from concept_transfer.models import load_model, tiny_model
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


def test_a_noted_head_may_be_given_alone(tmp_path):
    path = tmp_path / "use.jsonl"
    filled(path)
    assert not audit(path, heads=audit(path).head).faults
    assert audit(path, heads="0a").faults == ["cut at the end: the head '0a' is not there"]
    with pytest.raises(ValueError, match="heads: a list is needed"):
        audit(path, heads=5)


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
    for _ in range(2):  # units would count twice under another salt; the refused log is not held
        with pytest.raises(ValueError, match="Begin another log"):
            UseLog(log.path)
    assert not audit(log.path).faults


def test_a_salt_that_is_lost_while_a_log_is_written_does_no_harm(tmp_path):
    log = UseLog(tmp_path / "use.jsonl")
    first = log.request(OF, "ann", "Hello", Answer("Hi."))
    Path(f"{log.path}.salt").unlink()
    assert log.request(OF, "ann", "Hello", Answer("Hi."))["unit"] == first["unit"]


@DRAWN
@given(unit=some.text(some.characters(exclude_categories=[])))
def test_units_may_have_any_name(tmp_path_factory, unit):
    log = UseLog(tmp_path_factory.mktemp("log") / "use.jsonl", redact=str)
    row = log.request(OF, unit, unit, Answer(unit))
    log.close()
    assert row["unit"] == unit_hash(log.path, unit) and row["prompt"] == unit
    found = audit(log.path, unit=unit)
    assert (found.rows, found.faults, found.uses["requests"].sum()) == (2, [], 1)


def test_a_hook_that_fails_leaves_nothing_in_the_log(tmp_path):
    log = UseLog(tmp_path / "use.jsonl", redact=lambda text: 1 / len(text.strip("x")))
    with pytest.raises(ZeroDivisionError):
        log.request(OF, "ann", "Hello", Answer("xx"))
    log.close()
    assert "Hello" not in log.path.read_text() and audit(log.path).rows == 1


def test_a_hook_sees_a_chat_as_it_is_written(tmp_path):
    log = UseLog(tmp_path / "use.jsonl", redact=partial(re.sub, "André", "[name]"))
    row = log.request(OF, "ann", [{"role": "user", "content": "I am André"}], Answer("André!"))
    assert "[name]" in row["prompt"] and "Andr" not in row["prompt"] + row["answer"]


def test_a_log_has_one_process(tmp_path):
    log = UseLog(tmp_path / "use.jsonl")
    with pytest.raises(ValueError, match="another process"):
        UseLog(log.path)
    log.close()
    UseLog(log.path).close()


def test_another_thread_may_close(tmp_path):
    log = UseLog(tmp_path / "use.jsonl")
    closing = threading.Thread(target=log.close)
    closing.start()
    closing.join()
    UseLog(log.path).close()


def test_a_fork_does_not_write_into_the_log_of_its_parent(tmp_path):
    log = UseLog(tmp_path / "use.jsonl")
    if not (child := os.fork()):
        try:
            log.write("note")
        except OSError as e:
            os._exit(7 if "forked" in str(e) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    log.write("note")
    log.close()
    assert not audit(log.path).faults and audit(log.path).rows == 2


@pytest.mark.parametrize("what", ["moved", "removed", "cut", "added to", "closed"])
def test_nothing_is_written_behind_what_others_did(tmp_path, what):
    log = UseLog(tmp_path / "use.jsonl")
    log.write("note")
    whole = log.path.read_bytes()
    if what == "moved":
        log.path.rename(tmp_path / "old.jsonl")
    elif what == "removed":
        log.path.unlink()
    elif what == "closed":
        log.close()
    else:
        log.path.write_bytes(whole[:-9] if what == "cut" else whole + whole)
    there = files_of(log.path)
    with pytest.raises(OSError, match="open it anew"):
        log.request(OF, "ann", "Hello", Answer("Hi."))
    assert files_of(log.path) == there


def test_a_row_has_names_of_its_own(tmp_path):
    log = UseLog(tmp_path / "use.jsonl")
    with pytest.raises(ValueError, match="another name"):
        log.request(OF, "ann", "Hello", Answer("Hi."), time="noon")
    assert not audit(log.path).faults


@pytest.mark.parametrize(
    "event, value, say",
    [
        (None, 1, "event None: say in a word"),
        ({"mine": 1}, 1, "say in a word"),
        ("note", object(), "cannot be kept in a file"),
        ("note", {(1, 2): 3}, "the row 'note' cannot be kept as JSON"),
        ("request", 1, "write them with `request`"),
    ],
)
def test_what_is_no_row_is_not_written(tmp_path, event, value, say):
    log = UseLog(tmp_path / "use.jsonl")
    with pytest.raises(ValueError, match=say):
        log.write(event, value=value)
    log.write("note", value=1)
    log.close()
    UseLog(log.path).close()
    assert audit(log.path).rows == 3 and not audit(log.path).faults


@pytest.mark.parametrize("wrong", [{"path": 5}, {"redact": "x"}, {"size": "5"}, {"size": 0}])
def test_a_log_of_something_else_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=f"UseLog '{next(iter(wrong))}'"):
        UseLog(**{"path": tmp_path / "use.jsonl"} | wrong)
    assert not [*tmp_path.iterdir()]


def test_a_unit_of_a_log_is_a_text(tmp_path):
    log = filled(tmp_path / "use.jsonl")
    for ask in (partial(audit, log.path), partial(unit_hash, log.path)):
        with pytest.raises(ValueError, match="unit 5: give a text, such as '5'"):
            ask(5)


@pytest.mark.parametrize("name", ["use.jsonl", "link", "use.jsonl.salt", "use.jsonl.head", "use.jsonl.off"])
def test_a_page_does_not_take_the_place_of_its_log(tmp_path, name, capsys):
    log, out = filled(tmp_path / "use.jsonl", size=2000), tmp_path / name
    (tmp_path / "link").symlink_to("use.jsonl")
    before = files_of(log.path)
    with pytest.raises(ValueError, match="is a file of the log .*give another path"):
        write_page(log.path, out)
    assert main(["audit", str(log.path), "--out", str(out)]) == 1
    assert re.search("is a file of the log|would write over", capsys.readouterr().err)
    with pytest.raises(ValueError, match="is a file of the log"):
        write_page(log.path, min(files_of(log.path)))  # one that was put aside
    assert files_of(log.path) == before


def test_a_log_that_grows_can_be_audited(tmp_path):
    log, stop = UseLog(tmp_path / "use.jsonl", size=1500), threading.Event()

    def work():
        while not stop.is_set():
            log.request(OF, "ann", "Hello", Answer("Hi."))
            time.sleep(0.002)

    writing = threading.Thread(target=work)
    writing.start()
    try:
        found = [audit(log.path) for _ in range(8)]
    finally:
        stop.set()
        writing.join()
    assert not any(x.faults for x in found) and found[-1].rows > found[0].rows


def test_clocks_may_go_back(tmp_path, monkeypatch):
    class Back:
        at = datetime(2030, 1, 1, tzinfo=UTC)

        @classmethod
        def now(cls, zone):
            cls.at -= timedelta(hours=1)
            return cls.at

    monkeypatch.setattr(uselog, "datetime", Back)
    filled(tmp_path / "use.jsonl")
    found = audit(tmp_path / "use.jsonl")
    assert not found.faults and (found.uses["since"] < found.uses["until"]).all()
    write_page(tmp_path / "use.jsonl", tmp_path / "use.html")


def test_logs_of_other_versions(tmp_path):
    "Rows of 0.1 had no format; what comes after us is not guessed at."
    digest, line = linked("", {"n": 0, "time": "2030-01-01", "event": "opened", "head": "", "torn": 0})
    Path(tmp_path, "old.jsonl").write_bytes(line)
    Path(tmp_path, "old.jsonl.head").write_text(f"{0:012d}:{digest}\n")
    Path(tmp_path, "old.jsonl.salt").write_text("0a")
    filled(tmp_path / "old.jsonl")
    assert not audit(tmp_path / "old.jsonl").faults and audit(tmp_path / "old.jsonl").rows == 14
    _, line = linked("", {"n": 0, "time": "2030-01-01", "event": "opened", "format": 99, "package": "9.0"})
    Path(tmp_path, "new.jsonl").write_bytes(line)
    with pytest.raises(ValueError, match="newer version"):
        audit(tmp_path / "new.jsonl")


def test_what_a_row_lacks_is_summed_up_as_well(tmp_path):
    log = UseLog(tmp_path / "use.jsonl")
    row = log.request(OF | {"dose": None}, "ann", "Hello", Answer("Hi."))
    log.write(**{k: x for k, x in row.items() if k not in ("n", "time", "digest")} | {"strength": None})
    assert audit(log.path).uses["requests"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "given", [{"strength": float("nan")}, {"strength": "1"}, {"got": "Hi."}, {"prompt": None}, {"of": ()}]
)
def test_a_request_that_cannot_be_is_not_written(given, tmp_path):
    log = UseLog(tmp_path / "use.jsonl")
    with pytest.raises(ValueError, match=f"request '{[*given][0]}'"):
        log.request(**{"of": OF, "unit": "ann", "prompt": "Hello", "got": Answer("Hi.")} | given)
    assert log.rows == 1


def test_events_of_your_own_do_not_spoil_the_page(tmp_path):
    log = UseLog(tmp_path / "use.jsonl")
    for event in ("plan", "share", "alarm", "failed"):
        log.write(event, mine=1)
    write_page(log.path, tmp_path / "page.html")
    assert "no" in (tmp_path / "page.html").read_text()


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


def test_closing_again_does_not_close_the_files_of_others(tmp_path):
    log = UseLog(tmp_path / "use.jsonl")
    log.close()
    with open(log.path) as one, open(log.path) as two:
        log.close()
        assert one.read() == two.read() != ""


def test_faults_without_number_are_said_in_a_line(tmp_path):
    path = tmp_path / "use.jsonl"
    filled(path, 40)
    path.write_bytes(path.read_bytes().replace(b'"joy"', b'"sad"'))
    found = audit(path)
    assert len(found.faults) == 40
    assert repr(found).endswith("row 8 was changed, or one before it; and 32 more)")


def test_a_log_without_its_head_may_be_cut(tmp_path):
    path = tmp_path / "use.jsonl"
    filled(path)
    Path(f"{path}.head").unlink()
    assert audit(path).faults == ["perhaps cut at the end: there is no head to tell by"]


def test_foreign_files_are_refused_and_stay(tmp_path):
    mine = tmp_path / "notes.txt"
    for text in ("my own notes\n", "my own notes", '{"mine": 1}\n{"mine"'):
        mine.write_text(text)
        with pytest.raises(ValueError, match="does not end in a row"):
            UseLog(mine)
        assert mine.read_text() == text and not Path(f"{mine}.salt").exists()
    with pytest.raises(OSError, match="there is no log"):
        audit(tmp_path / "nothing.jsonl")


def test_28_a_file_in_the_place_of_a_head_is_refused_and_stays(tmp_path):
    (tmp_path / "use.jsonl.head").write_text("mine")
    with pytest.raises(ValueError, match="use.jsonl.head is no head of a log"):
        UseLog(tmp_path / "use.jsonl")
    assert (tmp_path / "use.jsonl.head").read_text() == "mine" and not (tmp_path / "use.jsonl").exists()


def test_names_of_spans_are_those_of_the_conventions():
    flag = pytest.importorskip("opentelemetry.semconv._incubating.attributes.feature_flag_attributes")
    from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as ai

    code = (Path(__file__).parents[1] / "concept_transfer" / "uselog.py").read_text()
    known = {v for m in (flag, ai) for v in vars(m).values() if isinstance(v, str)}
    named = set(re.findall(r'"((?:gen_ai|feature_flag)\.[\w.]+)"', code))
    assert len(named) > 5 and named <= known


def test_nobody_of_a_log_is_no_error(tmp_path, capsys):
    filled(tmp_path / "use.jsonl")
    assert main(["audit", str(tmp_path / "use.jsonl"), "--unit", "nobody"]) == 0
    assert "no requests" in capsys.readouterr().out


# what an answer shows


def test_an_answer_is_that_of_generate_and_is_measured(joy):
    got = answer(joy, "It rained and", 2.0, twin=True, max_new_tokens=5)
    assert got.text == joy.generate("It rained and", 2.0, 5) and got.kl > 0
    moved = got.projection[1] - got.projection[0]
    assert moved == pytest.approx(2 * joy.dose * joy.norm, rel=1e-3)
    base = answer(joy, "It rained and", 0.0, twin=True, max_new_tokens=5)
    assert base.kl is None and base.norm[0] == base.norm[1]


SAID = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
CHAT = [{"role": "user", "content": "It rained"}, {"role": "assistant", "content": "Yes, it"}]


@pytest.mark.parametrize("chat, end", [(CHAT, ""), (CHAT[:1], " [assistant]")])
def test_a_chat_is_measured_as_the_model_reads_it(joy, chat, end):
    "One that ends with an answer goes on with it."
    model = tiny_model("llama")
    model.tokenizer.chat_template = SAID + "{% if add_generation_prompt %}[assistant]{% endif %}"
    text = " ".join(f"[{x['role']}] {x['content']}" for x in chat) + end
    a, b = (answer(replace(joy, model=model), x, twin=True, max_new_tokens=6) for x in (chat, text))
    assert replace(a, seconds=0) == replace(b, seconds=0) and a.kl > 0


def test_an_answer_that_is_made_elsewhere_is_the_same_and_says_nothing_of_the_stream(joy):
    far = replace(joy, model=load_model(joy.model, remote="local"))
    here, there = (answer(t, "It rained and", twin=True, max_new_tokens=5) for t in (joy, far))
    assert (there.text, there.tokens) == (here.text, here.tokens) and there.kl == pytest.approx(here.kl)
    assert there.norm is there.projection is None and here.norm[1] != here.norm[0]


def test_without_its_model_a_transplant_answers_nothing(joy):
    bare = replace(joy, model=None)
    for ask in (lambda: answer(bare, "It rained"), lambda: with_reference(bare, ["It rained"])):
        with pytest.raises(ValueError, match="'joy' has no model: load it with"):
            ask()


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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "wrong", [{"limit": 5}, {"least": 2}, {"alpha": 0}, {"alpha": 1}, {"damage": "good"}]
)
def test_a_stop_that_would_never_or_always_stop_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(STOP, **wrong)


def asked(course, unit, on, good=1.0, bad=0.0):
    row = {"event": "request", "unit": unit, "arm": "on" if on else "off", "share": course.share}
    return course.take(row | {"scores": {"good": good, "bad": bad}})


def test_a_unit_counts_once_a_stage_and_by_its_chance():
    course, chances = Course(STOP), []

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
    assert not asked(course, "new", True) and len(chances) == 8


def test_tests_that_are_begun_anew_are_harder_to_please():
    "So that all together, however many, are wrong with the chance that was planned."
    ends = []
    for begun in range(1, 4):
        course = Course(STOP)
        for _ in range(begun):
            course.take({"event": "share", "share": 0})
            course.take({"event": "share", "share": 50})
        for k in range(200):
            asked(course, f"user {k}", k % 2 == 0, good=float(k % 2 == 0))
        ends.append(course.look()["effect"])
    assert ends[0][0] > ends[1][0] > ends[2][0] > 0
    spent = [STOP.alpha / (k * (k + 1)) for k in range(1, 10_000)]
    assert sum(spent) <= STOP.alpha


def test_a_score_that_cannot_be_had_counts_against_the_concept():
    course, worst = Course(STOP), Course(STOP)
    for x in (course, worst):
        x.take({"event": "plan", "share": 50})
    for k in range(40):
        on = k % 3 == 0
        assert asked(course, k, on, None, None) and asked(worst, k, on, float(not on), float(on))
    assert course.look() == worst.look()


@pytest.mark.parametrize("share", [0, 0.01, 1.1, 25, 99.99, 100])
def test_a_share_is_what_it_says(share, tmp_path, joy, flags):
    from openfeature.evaluation_context import EvaluationContext

    rollout = rolled(joy, tmp_path / "use.jsonl", share=share)
    units = {str(k): k for k in range(10_000)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout_room, "bucket", lambda flag, unit: units[unit])
        ask = partial(rollout.client.get_float_value, rollout.flag, 0.0)
        on = sum(ask(EvaluationContext(unit)) == 1 for unit in units)
    assert on == round(100 * share)


def test_shares_that_are_none_are_refused(joy, tmp_path, flags):
    rollout = rolled(joy, tmp_path / "use.jsonl")
    for share in (-1, 101, float("nan"), 0.001):
        with pytest.raises(ValueError, match="percents of units"):
            rollout.to(share, "why not")
    rollout.log.close()
    for stages in ((), (5, 1), (5, 5), (1, 200)):
        with pytest.raises(ValueError, match="give percents"):
            rolled(joy, tmp_path / f"{stages}.jsonl", stages=stages)


@pytest.mark.parametrize("share", ["5", True, None])
def test_a_share_is_a_number(joy, tmp_path, flags, share):
    rollout = rolled(joy, tmp_path / "use.jsonl")
    with pytest.raises(ValueError, match=f"a share of {share!r}; give percents"):
        rollout.to(share, "why not")
    assert rollout.course.share == 20


@pytest.mark.parametrize(
    "wrong",
    [
        {"log": "use.jsonl"},
        {"twin": 5},
        {"stages": ("1",)},
        {"share": True},
        {"stop": None},
        {"scores": {"good": 1, "bad": 2}},
    ],
)
def test_a_rollout_of_something_else_is_refused(joy, tmp_path, flags, wrong):
    rollout = rolled(joy, tmp_path / "use.jsonl")
    with pytest.raises(ValueError, match=f"Rollout '{next(iter(wrong))}'"):
        replace(rollout, **wrong)
    assert rollout.log.rows == 2


def rolled(joy, path, texts=("steered", "base"), **how):
    "A rollout whose answers and scores are those of their arm."

    def made(t, prompt, strength, twin):
        return Answer(texts[0] if strength else texts[1])

    scores = {"good": lambda p, x: float(x == "steered"), "bad": lambda p, x: float(x == "broken")}
    usual = {"scores": scores, "stages": (20, 60, 100), "answer": made}
    return Rollout(joy, UseLog(path), stop=STOP, **usual | how)


def test_a_watch_may_say_nothing(joy, tmp_path, flags):
    seen: list = []
    assert rolled(joy, tmp_path / "use.jsonl", watch=seen.append)("ann", "Hello") in ("steered", "base")
    assert seen[-1]["event"] == "request"


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
    other = dict.fromkeys(first.scores, lambda prompt, text: 0.5)
    with pytest.raises(ValueError, match="another plan"):
        rolled(joy, tmp_path / "use.jsonl", scores=other)


def test_what_a_monitor_measures_has_its_own_names(joy):
    with pytest.raises(ValueError, match="cannot be called 'kl', which is ours"):
        with_reference(joy, ["Hello"], {"kl": lambda prompt, text: 1.0})


def test_a_stage_of_nobody_is_refused(joy, tmp_path, flags):
    with pytest.raises(ValueError, match="give percents that rise"):
        rolled(joy, tmp_path / "use.jsonl", stages=(0, 50))


def test_an_answer_that_is_none_is_named(joy, tmp_path, flags):
    with pytest.raises(TypeError, match="answer= gives 'base'; it has to give an Answer"):
        rolled(joy, tmp_path / "use.jsonl", answer=lambda t, *rest: "base")("ann", "Hello")


def test_a_rollout_that_is_refused_leaves_the_flags_of_another_alone(joy, tmp_path, flags):
    rollout = rolled(joy, tmp_path / "use.jsonl", share=100)
    with pytest.raises(ValueError, match="another plan"):
        Rollout(joy, rollout.log, rollout.scores, replace(STOP, limit=0.9), stages=(20, 60, 100))
    assert rollout("ann", "Hello") == "steered"


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


def test_a_unit_is_a_text_of_any_kind(joy, tmp_path, flags):
    asked = []

    def made(*given):
        asked.append(given)
        return Answer("base")

    rollout = rolled(joy, tmp_path / "use.jsonl", share=100, answer=made)
    for unit in (5, None):
        with pytest.raises(ValueError, match=f"unit {unit}: give a text"):
            rollout(unit, "Hello")
    assert not asked
    rollout("\ud800", "Hello")
    assert audit(rollout.log.path).uses["arm"].tolist() == ["on"]


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


@pytest.mark.parametrize("fails", [lambda: 1 / 0, lambda: float("nan"), lambda: None])
def test_a_judge_that_fails_keeps_nobody_from_an_answer(joy, tmp_path, flags, fails):
    rollout = rolled(joy, tmp_path / "use.jsonl", stages=(50,))
    rollout.scores["bad"] = lambda p, x: fails() if x == "steered" else 0.0
    got = [rollout(f"user {k}", "Hello") for k in range(60)]
    assert {*got} == {"steered", "base"} and rollout.course.share == 0  # it stopped
    failed = [row["why"] for row in audit(rollout.log.path).events if row["event"] == "failed"]
    assert failed[0].startswith("score bad") and len(failed) == got.count("steered")
    rollout.log.close()
    assert rolled(joy, rollout.log.path, stages=(50,)).course.share == 0
    write_page(rollout.log.path, tmp_path / "use.html")
    assert "score bad" in (tmp_path / "use.html").read_text()


def test_a_provider_that_fails_gives_nobody_the_concept_and_nobody_counts(joy, tmp_path, flags):
    from openfeature import api
    from openfeature.provider.in_memory_provider import InMemoryProvider

    class Down(InMemoryProvider):
        def resolve_float_details(self, *args, **options):
            raise ConnectionError("no answer")

    api.set_provider_and_wait(Down({}), "down")
    rollout = rolled(joy, tmp_path / "use.jsonl", client=api.get_client("down"), stages=(50,))
    assert {rollout(f"user {k}", "Hello") for k in range(9)} == {"base"} and not rollout.course.seen
    found = audit(rollout.log.path)
    assert found.uses["arm"].tolist() == ["no flag"] and found.events[-1]["why"].startswith("flag")


def test_a_bucket_in_the_log_finds_nobody(joy, tmp_path, flags):
    rollout = rolled(joy, tmp_path / "use.jsonl")
    for k in range(50):
        rollout(f"user {k}", "Hello")
    rows = [row for row, _ in read_log(rollout.log.path) if row["event"] == "request"]
    assert [row["bucket"] for row in rows] == [bucket(rollout.flag, f"user {k}") // 100 for k in range(50)]


def test_in_the_shadow_both_answers_are_kept_with_texts(joy, tmp_path, flags):
    rollout = rolled(joy, tmp_path / "use.jsonl", shadow=True, stages=(50,))
    rollout.log.redact = str.upper
    for k in range(20):
        rollout(f"user {k}", "Hello")
    rows = [row for row, _ in read_log(rollout.log.path) if row["event"] == "request"]
    kept = {(row["arm"], row["answer"], row.get("base")) for row in rows}
    assert kept == {("shadow", "STEERED", "BASE"), ("off", "BASE", None)}
    write_page(rollout.log.path, tmp_path / "use.html")
    assert "given instead: BASE" in (tmp_path / "use.html").read_text()


def test_threads_share_a_rollout(joy, tmp_path, flags):
    "What is counted on the way is what is counted from the log."
    rollout = rolled(joy, tmp_path / "use.jsonl")

    def work(i):
        for k in range(80):
            rollout(f"user {i} {k}", "Hello")
            if k == 40:
                rollout.to(20, "anew")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for x in threads:
        x.start()
    for x in threads:
        x.join()
    rollout.log.close()
    again = rolled(joy, tmp_path / "use.jsonl")
    assert again.course.look() == rollout.course.look() and again.course.seen == rollout.course.seen


def test_scores_outside_of_0_and_1_are_refused(joy, tmp_path, flags):
    scores = {"good": lambda p, x: 7.0, "bad": lambda p, x: 0.0}
    rollout = Rollout(joy, UseLog(tmp_path / "use.jsonl"), scores, STOP, answer=lambda *a: Answer("x"))
    with pytest.raises(ValueError, match="from 0 to 1"):
        rollout("ann", "Hello")


SCRIPT = """
import sys, torch
from concept_transfer.models import load_model, tiny_model
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
    "name, move",
    [("kl", {"kl": 0.25}), ("kl", {"kl": 0.02}), ("norm", {"norm": 7.0}), ("good", {"good": 0.2})],
)
def test_what_moves_is_named_with_its_beginning(known, name, move):
    rng, monitor = np.random.default_rng(1), Monitor(known)
    found = [a for n in range(700) for a in monitor(row(n, rng, **(move if n >= 400 else {})))]
    assert [a.number for a in found] == [name] and abs(found[0].since - 400) < 40
    fell = found[0].now < found[0].usual
    assert fell == (name == "good" or move.get("kl") == 0.02)
    assert ("less than they were" in found[0].advice) == (name == "kl" and fell)


def test_numbers_that_are_none_are_passed_over(known):
    rng, monitor = np.random.default_rng(1), Monitor(known)
    for n in range(300):
        blind = {"norm": [None, 1.0], "projection": [float("nan")] * 2, "kl": None, "scores": {"good": None}}
        assert not monitor(row(n, rng) | blind)
    assert {*monitor.streams} == {"repetition"}


@pytest.mark.parametrize(
    "wrong, gone",
    [({}, "event"), (5, "event"), ({"event": "request"}, "n, time, strength"), ("kl", "kl")],
)
def test_what_is_no_row_of_a_log_is_not_watched(known, wrong, gone):
    if isinstance(wrong, str):
        wrong = {k: x for k, x in row(0, np.random.default_rng(0)).items() if k != wrong}
    with pytest.raises(ValueError, match=f"a row without {gone}: give rows of a use log"):
        Monitor(known)(wrong)


def test_a_monitor_of_something_else_is_refused(known):
    for t, detector, name in (("x", None, "t"), (known, 5, "detector")):
        with pytest.raises(ValueError, match=f"Monitor '{name}'"):
            Monitor(t, detector)


def test_nothing_is_usual_without_prompts(joy):
    for prompts in ([], "It rained"):
        with pytest.raises(ValueError, match="prompts"):
            with_reference(joy, prompts)


def test_a_reference_may_be_of_chats(joy):
    chats = [[{"role": "user", "content": x}] for x in ("It rained", "The bank")]
    notes = [with_reference(joy, x, answer=lambda *a: Answer("Hi.")).notes for x in (chats, chats, chats[:1])]
    assert notes[0] == notes[1] and notes[0]["reference_texts"] != notes[2]["reference_texts"]


def test_numbers_on_a_page_are_rounded(tmp_path):
    log = UseLog(tmp_path / "use.jsonl")
    log.request(OF | {"dose": 1 / 3}, "ann", "Hello", Answer("Hi."))
    log.close()
    write_page(log.path, tmp_path / "use.html")
    assert "<td>0.333</td>" in (tmp_path / "use.html").read_text()


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


@pytest.mark.parametrize("text", ["{}", "hello", '{"error": 1}', "\0"])
def test_what_is_no_log_is_not_called_a_torn_one(tmp_path, text, capsys):
    (tmp_path / "other.json").write_text(text)
    found = audit(tmp_path / "other.json")
    assert not found.torn and found.faults == ["other.json holds a line that is no row"]
    assert main(["audit", str(tmp_path / "other.json")]) == 1


def test_a_log_is_no_folder_and_no_device(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = {*tmp_path.iterdir()}
    for path in (tmp_path / "folder", tmp_path / "pipe"):
        with pytest.raises(ValueError, match="a folder or a device, where a file is needed"):
            UseLog(path)
    assert {*tmp_path.iterdir()} == before
