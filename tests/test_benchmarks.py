"""What the benchmarks have in common, and that growth is found where it is known. No test measures time.

The one for a card runs without one, at toy size, and says so; its grid is right."""

import importlib
import json
import runpy
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from concept_transfer.maps import SourceLayer, control, ridge
from concept_transfer.models import tiny_model
from concept_transfer.steering import place

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gelu
import growth
import shared


@pytest.fixture
def clock(monkeypatch):
    "A clock that stands still unless a job moves it on."
    now = SimpleNamespace(t=0.0)
    monkeypatch.setattr(shared.time, "perf_counter", lambda: now.t)
    return now


def jobs_taking(clock, seconds):
    "Jobs that take what a function of the name says."

    def job(name):
        clock.t += seconds(name)
        return name

    return {name: lambda name=name: job(name) for name in "ab"}


A = SimpleNamespace(minutes=100, within=5)


def test_rounds_end_when_a_ratio_is_known(clock):
    times, got = shared.interleave(
        jobs_taking(clock, {"a": 3, "b": 2}.get), {"r": shared.over("a", "b")}, A, warm=True
    )
    assert times == {"a": [3] * shared.SURE, "b": [2] * shared.SURE}
    assert got["r"] == shared.Found(1.5, 1.5, 1.5, shared.SURE)


def test_noise_takes_more_rounds_and_its_interval_holds_the_truth(clock):
    rng = np.random.default_rng(0)
    jobs = jobs_taking(clock, lambda name: {"a": 3, "b": 2}[name] * np.exp(rng.normal(0, 0.1)))
    _, got = shared.interleave(jobs, {"r": shared.over("a", "b")}, A)
    assert got["r"].rounds > 2 * shared.SURE and got["r"].low < 1.5 < got["r"].high
    assert got["r"].high - got["r"].low <= 0.1 * got["r"].value


def test_the_time_is_up(clock):
    jobs = jobs_taking(clock, lambda name: 40 if name == "a" else 30 + clock.t % 7)
    short = SimpleNamespace(minutes=3, within=0.1)
    times, got = shared.interleave(jobs, {"r": shared.over("a", "b")}, short, warm=False)
    x = np.divide(times["a"], times["b"])
    assert len(x) == 3 and (got["r"].low, got["r"].high) == (x.min(), x.max())  # too few: their range


def test_rounds_differ_in_their_order(clock):
    orders: list = [[]]
    jobs = {name: lambda name=name: orders[-1].append(name) for name in "abc"}
    jobs["a"] = lambda: (orders[-1].append("a"), setattr(clock, "t", clock.t + 1))
    shared.interleave(jobs, {"t": lambda t: t["a"]}, A, lambda got: orders.append([]))
    assert len({*map(tuple, orders[:-1])}) > 1 and all(sorted(x) == [*"abc"] for x in orders[:-1])


def test_one_round_has_no_interval():
    assert shared.found([2.0]).span(".1f") == "one round"
    assert shared.found([2.0, 1.0]).span(".1f") == "1.0 to 2.0"


def test_the_fastest_option_is_found(clock):
    assert shared.fastest(lambda n: setattr(clock, "t", clock.t + (n - 3) ** 2), (1, 2, 3, 8)) == 3


def test_others_are_what_neither_idles_nor_is_ours(monkeypatch):
    monkeypatch.setattr(shared.psutil, "cpu_count", lambda: 2)
    monkeypatch.setattr(shared, "spent", lambda: np.array([10.0, 4.0, 11.0]))  # 20 s, of which 5 are missing
    assert shared.others(np.zeros(3)) == 0.25


def test_tables_replace_those_of_their_processor(tmp_path):
    part, results = tmp_path / "part", tmp_path / "results"
    results.write_text("## A\n\n### x\n\n1\n\n### y\n\n2\n\n## B\n\n### x\n\n3\n\n")
    part.write_text("## B\n\n### x\n\n4\n\n## B\n\n### z\n\n5\n\n")
    shared.main(part, results)
    expected = "## A\n\n### x\n\n1\n\n### y\n\n2\n\n## B\n\n### x\n\n4\n\n### z\n\n5\n\n"
    assert results.read_text() == expected


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda p: p.stem)
def test_every_script_loads(path):
    assert runpy.run_path(str(path), run_name="loaded")["__doc__"]


def test_a_slope_is_the_power():
    n = np.array(growth.TIMES)
    assert growth.slope(n, 5.0 * n**2) == pytest.approx(2)
    assert growth.less(shared.Found(2.1, 2.0, 2.3, 6), 2).value == pytest.approx(0.1)


@pytest.mark.parametrize("name", growth.steps(1))
def test_a_step_runs_and_has_a_formula_for_all_that_grows(name):
    step = growth.steps(1)[name]
    assert step.least.keys() == step.time.keys() == step.memory.keys()
    step.make(**step.least)()


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the largest memory is read from /proc"
)
def test_the_largest_memory_of_a_job():
    job = partial(np.ones, 10_000_000)  # 80 MB
    assert shared.apart(shared.peak, job) == pytest.approx(80e6, rel=0.1)


@pytest.fixture
def gpu(monkeypatch):
    made = importlib.import_module("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(made, "TOYS", {"toy": (32, 2, 2, 1, 48)})
    monkeypatch.setattr(
        made, "SMALL", made.SMALL | {"texts": 6, "alone": 2, "items": 2, "rows": 60, "new": 2}
    )
    return made


@pytest.mark.slow
def test_the_card_benchmark_runs_at_toy_size_and_says_that_there_is_no_card(gpu, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--toy", "--json"])
    gpu.main()
    found = json.loads(capsys.readouterr().out)["toy"]
    told = gpu.__doc__.replace("generate_N", "generate_1 generate_8 generate_64")
    assert all(k in told for k in found.keys() - {"tokens_a_second", "seconds"}) and len(found) == 10
    assert all(v > 0 for v in found.values())
    monkeypatch.setattr(gpu, "measured", lambda *a: found)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    gpu.main()
    said = capsys.readouterr().out
    assert "No GPU is at hand: toy sizes on" in said and "| read_vs_bare | " in said


def test_its_grid_is_that_of_the_package(gpu):
    m = gpu.random_rows(60, 2, 40, "cpu")
    W, N = gpu.grid(m)
    for s in range(2):
        u = SourceLayer(m, s, [0.1])
        assert torch.allclose(W[s], ridge(u).float()) and u.R.shape == (40, 40)
        scale = (m.n_shuffled / u.n).sqrt().float()
        assert torch.allclose(N[s].float() * scale, control(u), rtol=0.02, atol=1e-3)


@pytest.mark.slow
def test_gelu_of_float16_is_a_little_off():
    model = tiny_model("gemma3_text")
    t = place(torch.ones(48), model, 1, dose=0.05)
    (plain, rounded), (again, _) = gelu.here(t), gelu.here(t)
    assert torch.equal(plain, again) and 0 < (plain - rounded).abs().max() < 0.01
