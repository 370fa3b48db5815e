"The playground and the page with a slider: what they show is what `generate` writes, in a browser too."

import html
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from urllib.request import urlopen

import nbformat
import pytest
import torch
import websocket

from concept_transfer.models import tiny_model
from concept_transfer.play import play, play_steps
from concept_transfer.steering import generate, joined, place
from concept_transfer.views import ladder

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --remote-debugging-port=0 --remote-allow-origins=*""".split()
SHORT = {"max_new_tokens": 8}
WRITTEN = SHORT | {"repetition_penalty": 1.2}
HOSTILE = "<script>alert(1)</script>"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def made(name, layer, seed, **given):
    v = torch.randn(48, generator=torch.Generator().manual_seed(seed))
    model = tiny_model("llama", max_position_embeddings=256)
    return place(v, model, layer, dose=0.3, name=name, **given)


@pytest.fixture(scope="module")
def joy():
    return made("joy", 1, 0)


@pytest.fixture(scope="module")
def fear(joy):
    return replace(made("fear", 2, 1), model=joy.model)


def bare(page):
    "The text of some HTML, with one space between words."
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)).split())


def shows(ground, text):
    return " ".join(text.split()) in bare(ground.text.value)


def asked(ground, **controls):
    "A playground after its controls were moved, and it was waited for."
    for name, value in controls.items():
        ground.controls[name].value = value
    ground.ask().join()
    assert ground.status.value == ""
    return ground


# the callbacks


def test_what_it_shows_is_what_generate_writes(joy):
    ground = play(joy, prompt="It rained and", **SHORT)
    base = generate(joy.model, "It rained and", **WRITTEN)
    for strength in (-2, 0, 1, 3):
        text = joy.generate("It rained and", strength, **WRITTEN)
        assert shows(asked(ground, strength=strength), text) and shows(ground, base)
        assert (text == base) == (strength == 0)
    again = asked(ground, prompt="The letter")
    assert shows(again, joy.generate("The letter", 3, **WRITTEN))


def test_layer_and_positions_are_those_of_place(joy):
    ground = play(joy, prompt="It rained and", **SHORT)
    for layer, positions in ((3, "all"), (3, "last"), (1, "last")):
        asked(ground, layer=layer, positions=positions, strength=3)
        other = place(joy.direction, joy.model, layer, dose=0.3, positions=positions)
        assert shows(ground, other.generate("It rained and", 3, **WRITTEN))


@pytest.mark.slow
@pytest.mark.parametrize("layer", [1, 2])
def test_a_second_concept_is_added(joy, fear, layer):
    "At the same layer and at another one."
    fear = place(fear.direction, joy.model, layer, dose=0.3, name="fear")
    ground = play(joy, replace(fear, model=None), prompt="It rained and", **SHORT)
    for one, two in ((2, 3), (0, -2), (1.5, 0), (-1, 2)):
        asked(ground, strength=one, second=two)
        with fear(two):
            assert shows(ground, joy.generate("It rained and", one, **WRITTEN))


def test_a_transplant_at_several_places_keeps_its_layers(joy, fear):
    ground = asked(play(joined([joy, fear]), prompt="It rained and", **SHORT), strength=2)
    assert ground.controls["layer"].disabled
    assert shows(ground, joined([joy, fear]).generate("It rained and", 2, **WRITTEN))


@pytest.mark.slow
def test_what_is_opened_belongs_to_the_text(joy, fear):
    ground = asked(play(joy, fear, prompt="It rained and", **SHORT), strength=2)
    assert not any(view.value for view in ground.views.children)
    wanted = {
        "Ladder": ladder(joy, "It rained and", **SHORT)._repr_html_(),
        "Token by token": joy.generate("It rained and", 2, **WRITTEN),
        "Words": "fear, layer 2",
    }
    for i, title in enumerate(ground.views.titles):
        ground.views.selected_index = i
        seen = [bare(view.value) for view in asked(ground).views.children]
        assert bare(wanted[title]) in seen[i] and not any(seen[:i] + seen[i + 1 :])


def test_a_word_that_looks_like_html_is_shown_as_it_is(joy):
    ground = asked(play(replace(joy, name=HOSTILE), prompt=HOSTILE, **SHORT), strength=2)
    for i in range(3):
        ground.views.selected_index = i
        asked(ground)
        assert HOSTILE not in ground.text.value + ground.views.children[i].value
    assert HOSTILE in bare(ground.text.value)


@pytest.mark.parametrize(
    "given, why", [({"prompt": " \n"}, "There is no prompt"), ({"max_new_tokens": 500}, "leave no room")]
)
def test_what_cannot_be_is_said_in_words_and_no_old_text_stays(joy, given, why):
    ground = play(joy, **{"prompt": "It rained", **SHORT, **given})
    ground.ask().join()
    assert why in ground.status.value and ground.text.value == ""


def test_after_an_error_it_goes_on(joy, monkeypatch):
    ground = play(joy, prompt="It rained and", **SHORT)
    ground.views.selected_index = 0
    assert asked(ground).views.children[0].value
    with monkeypatch.context() as m:
        m.setattr("concept_transfer.play.ladder", lambda *a, **k: 1 / 0)
        ground.controls["strength"].value = 2
        ground.ask().join()
    assert "ZeroDivisionError" in ground.status.value
    assert not any(part.value for part in (ground.text, *ground.views.children))
    assert shows(asked(ground, strength=2.5), joy.generate("It rained and", 2.5, **WRITTEN))


def test_the_newest_request_wins_and_those_between_are_never_written(joy, monkeypatch):
    ground, begun, go, written = play(joy, prompt="It", **SHORT), threading.Event(), threading.Event(), []
    ground.ask().join()

    def slowly(t, prompt, strengths, *more, **given):
        written.append(strengths[0])
        begun.set()
        assert go.wait(20)
        return ladder(t, prompt, strengths, *more, **given)

    monkeypatch.setattr("concept_transfer.play.ladder", slowly)
    before = ground.text.value
    ground.controls["strength"].value = 2
    assert begun.wait(20)
    for strength in (2.5, 3, 4):
        ground.controls["strength"].value = strength
    assert "Working" in ground.status.value and ground.text.value == before
    last = ground.ask()
    go.set()
    last.join()
    assert written == [2, 4] and ground.status.value == ""
    assert shows(ground, joy.generate("It", 4, **WRITTEN))


def test_a_transplant_that_cannot_play_is_refused(joy, fear):
    for made in (play, play_steps):
        with pytest.raises(ValueError, match="'joy' has no model: load it with"):
            made(replace(joy, model=None))
    other = place(fear.direction, tiny_model("llama", 1), 2, name="fear")
    with pytest.raises(ValueError, match="fear"):
        play(joy, other)


# the page


@pytest.fixture(scope="module")
def steps(joy):
    return play_steps(joy, ["It rained and", HOSTILE], [-1, 1, 3], **SHORT)


def test_steps_are_what_generate_writes(joy, steps):
    for x in steps.ladders:
        assert [r.strength for r in x.rungs] == [-1, 0, 1, 3]
        assert [r.text for r in x.rungs] == [joy.generate(x.prompt, s, **WRITTEN) for s in (-1, 0, 1, 3)]
    assert json.dumps(steps.data, allow_nan=False) and repr(steps).count(HOSTILE) == 1


def test_a_page_holds_all_and_nothing_from_outside(steps, tmp_path):
    steps.save(tmp_path / "play.html")
    page = (tmp_path / "play.html").read_text(encoding="utf-8")
    assert page.count("data-step=") == 8 and "http" not in page and HOSTILE not in page
    assert page.count("<script>") == 1
    for x in steps.ladders:
        assert all(" ".join(r.text.split()) in bare(page) for r in x.rungs)


def test_a_model_that_writes_nothing_has_a_page_too(joy, monkeypatch, tmp_path):
    monkeypatch.setattr("concept_transfer.steering.Transplant.generate", lambda self, *a, **k: ["", " again"])
    steps = play_steps(joy, ["It rained"], [1], **SHORT)
    steps.save(tmp_path / "play.html")
    assert "nothing was written" in (tmp_path / "play.html").read_text(encoding="utf-8")


def test_prompts_are_needed(joy):
    with pytest.raises(ValueError, match="prompts"):
        play_steps(joy, [])


# in a browser


class Browser:
    "A page of headless Chromium, driven through its debugging port."

    def __init__(self, socket):
        self.socket, self.numbers = socket, count(1)

    def send(self, method, **given):
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": given}))
        while (said := json.loads(self.socket.recv())).get("id") != number:
            pass
        assert "error" not in said, said
        return said["result"]

    def js(self, code):
        said = self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def until(self, code, seconds=120):
        "What an expression gives once it is true."
        end = time.monotonic() + seconds
        while not (found := self.js(code)):
            assert time.monotonic() < end, f"{code}: {self.js('document.body.innerText')[-2000:]}"
            time.sleep(0.2)
        return found

    def press(self, key, code):
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def look(self, width, height):
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.send("Emulation.setDeviceMetricsOverride", **size)


@contextmanager
def ended(command, **given):
    "Within: a process runs."
    process = subprocess.Popen(command, **given)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def found(read, seconds=60):
    "What a function gives once it gives something."
    end = time.monotonic() + seconds
    while not (got := read()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return got


@pytest.fixture
def chromium(tmp_path):
    profile = tmp_path / "profile"
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with ended([CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"], **quiet):
        told = profile / "DevToolsActivePort"
        port = found(lambda: told.exists() and told.read_text().split())[0]
        pages = partial(urlopen, f"http://127.0.0.1:{port}/json")
        page = found(lambda: [p for p in json.load(pages()) if p["type"] == "page"])[0]
        socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=60)
        page = Browser(socket)
        page.send("Emulation.setFocusEmulationEnabled", enabled=True)  # as of a window that is in front
        yield page
        socket.close()


def focus(page, selector):
    page.js(f"document.querySelector({selector!r}).focus()")


@pytest.mark.parametrize("where", ["page", "fragment"])
@pytest.mark.slow
@needs_chromium
def test_the_slider_of_a_page_moves_its_text(chromium, steps, tmp_path, where):
    "With the keyboard alone, on a phone, in a page of its own and in another one, twice."
    file = tmp_path / "play.html"
    head = '<!doctype html><meta charset=utf-8><meta name=viewport content="width=device-width">'
    file.write_text(f"{head}{steps._repr_html_() * 2}")
    if where == "page":
        steps.save(file)
    chromium.look(390, 844)
    chromium.send("Page.navigate", url=file.as_uri())
    chromium.until("document.querySelectorAll('.play input').length")
    seen = "document.querySelectorAll('.play [aria-live]')[{}].innerText.replace(/\\s+/g, ' ')".format
    for x in steps.ladders:
        focus(chromium, ".play input")
        chromium.press("Home", 36)
        for rung in x.rungs:
            said = chromium.js(seen(0))
            assert f"{x.prompt} ..." in said and f"strength {rung.strength:g} " in said
            assert all(" ".join(y.text.split()) in said for y in (rung, x.base))
            assert f"KL {rung.kl:.2f}" in said and f"perplexity {rung.perplexity:.1f}" in said
            assert chromium.js("document.activeElement.ariaValueText") == f"strength {rung.strength:g}"
            chromium.press("ArrowRight", 39)
        focus(chromium, ".play select")
        chromium.press("ArrowDown", 40)
    assert chromium.js("document.documentElement.scrollWidth") <= 390
    if where == "fragment":  # the other one stayed where it was
        last = chromium.js(seen(1))
        assert "strength 1 " in last and "It rained and ..." in last


CELLS = """
import torch
from concept_transfer.models import tiny_model
from concept_transfer.play import play, play_steps
from concept_transfer.steering import place
v = torch.randn(48, generator=torch.Generator().manual_seed(0))
joy = place(v, tiny_model("llama", max_position_embeddings=256), 1, dose=0.3, name="joy")
play(joy, prompt="It rained and", max_new_tokens=8)
# %%
play_steps(joy, ["It rained and"], [1, 3], max_new_tokens=8)"""


@pytest.fixture
def lab(tmp_path):
    "The address of a JupyterLab with one notebook in it."
    pytest.importorskip("jupyterlab")
    here = tmp_path / "lab"
    here.mkdir()
    book = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, CELLS.split("# %%"))])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(book, here / "play.ipynb")
    places = {f"JUPYTER_{k}_DIR": str(tmp_path / k) for k in ("RUNTIME", "CONFIG", "DATA")}
    places |= {
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "set"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "w"),
    }
    options = (
        f"--no-browser --allow-root --port=0 --expose-app-in-browser --ServerApp.root_dir={here}".split()
    )
    env = os.environ | places | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with ended([sys.executable, "-m", "jupyterlab", *options], env=env, cwd=here, **quiet):
        (file,) = found(lambda: [p for p in tmp_path.glob("RUNTIME/jpserver-*.json") if p.stat().st_size])
        said = json.loads(file.read_text())
        yield f"http://127.0.0.1:{said['port']}/lab/tree/play.ipynb?token={said['token']}"


@pytest.mark.slow
@needs_chromium
def test_the_playground_plays_in_jupyterlab(chromium, lab, joy):
    "Run a notebook, press the right arrow on its sliders, read the texts."
    chromium.look(1280, 1000)
    chromium.send("Page.navigate", url=lab)
    kernel = "[...(window.jupyterapp?.shell.widgets('main') ?? [])][0]?.sessionContext?.session?.kernel"
    chromium.until(f"{kernel}?.connectionStatus === 'connected' && {kernel}.status === 'idle'")
    chromium.js("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    seen = "(document.querySelectorAll('.jp-OutputArea')[{}]?.innerText ?? '').replace(/\\s+/g, ' ')".format
    chromium.until(f"{seen(1)}.includes('strength 1 ')")
    handles = [(0, ".noUi-handle", (1, 1.25, 1.5)), (1, ".play input", (1, 3))]
    for k, handle, strengths in handles:
        for strength in strengths:
            chromium.until(f"{seen(k)}.includes('strength {strength:g} ')")
            text = joy.generate("It rained and", strength, **WRITTEN)
            assert " ".join(text.split()) in chromium.js(seen(k))
            focus(chromium, f".jp-OutputArea {handle}")
            chromium.press("ArrowRight", 39)
