"The benchmark for one card, at the size of a toy: it runs without one, says so, and its grid is right."

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from concept_transfer.maps import SourceLayer, control, ridge

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
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
