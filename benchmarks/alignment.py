"""Maps for the full grid of layers of the embedded pair, as ratios of interleaved runs.

    python benchmarks/alignment.py [--json] [--rows 16384] [--texts 160] [--rounds 2] [--growth 1]

published: one minimum-norm SVD solve for each pair of layers on stored rows (timed on a pair of each source
           layer, times the number of target layers)
products:  the matrix products of the grid alone, at the measured rate of each precision
"""

import subprocess
import sys
from functools import partial

import numpy as np
import torch
from shared import NAMES, arguments, interleave, rate, ratio, report, seconds

from concept_transfer.data import load_corpus
from concept_transfer.engine import encode, fast_matmul, length_batches, pad
from concept_transfer.maps import SourceLayer, contrans, control, ridge
from concept_transfer.models import load_model
from concept_transfer.moments import Moments
from concept_transfer.pairing import paired_states

CPU = torch.device("cpu")
LAMBDAS = [10.0**k for k in range(-5, 5)]
PUBLISHED, GRID, CHOSEN = "published, all pairs", "grid", "grid, 5 folds, 10 lambdas"


def grid(X, Y, folds, lambdas):
    "Maps from every layer of X (n, L1, d1) to every layer of Y (n, L2, d2), with their shuffled controls."
    m = Moments.zeros(folds, *X.shape[1:], *Y.shape[1:])
    m.add(X, Y, torch.arange(len(X)) % folds)
    solved = (SourceLayer(m, s, lambdas) for s in range(X.shape[1]))
    return [(ridge(u).float(), control(u)) for u in solved]


def svd(X, Y):
    return [contrans(X[:, s], Y[:, s % 18]) for s in range(30)]


def grids(X, Y):
    return {
        PUBLISHED: partial(svd, X, Y),
        GRID: partial(grid, X, Y, 1, [0.1]),
        CHOSEN: partial(grid, X, Y, 5, LAMBDAS),
    }


def products(n, L1, d1, L2, d2) -> float:
    """Seconds that the products of one fit take.

    Sums in float32 with their control, solution in float64, control in float32; d^3 for an inverse."""
    sums = 2 * n * (1.1 * L1 * d1 * L2 * d2 + L1 * d1**2 + L2 * d2**2)
    solve = 2 * L1 * d1**2 * L2 * d2
    single, double = (rate(576, 576, 11520, t) for t in (torch.float32, torch.float64))
    return (sums + solve) / single + (solve + L1 * d1**3) / double


def bare(models, texts):
    for m in models:
        ids = encode(m, texts)
        with torch.no_grad(), fast_matmul(CPU):
            for rows in length_batches(ids):
                x, mask = pad(m, [ids[i] for i in rows])
                m._module.base_model(input_ids=x, attention_mask=mask, use_cache=False)


def growth(X, Y):
    "Exponents of the time of a grid in rows, widths and layers, from three sizes of each."
    sizes = {
        "rows": [(n, 576, 6) for n in (4096, 8192, 16384)],
        "widths": [(2048, d, 12) for d in (144, 288, 576)],
        "layers": [(2048, 576, layers) for layers in (4, 8, 16)],
    }
    copies, out = 1 + 16384 // len(X), {}
    X, Y = torch.cat([X] * copies), torch.cat([Y] * copies)
    for i, (name, points) in enumerate(sizes.items()):
        took = []
        for n, d, layers in points:
            job = partial(grid, X[:n, :layers, :d], Y[:n, :layers, :d], 1, [0.1])
            took.append(min(seconds(job) for _ in range(2)))
        out[name] = float(np.polyfit(np.log([p[i] for p in points]), np.log(took), 1)[0])
    return out


def peak(what, texts) -> float:
    "Peak memory in bytes, over what the loaded models hold, of a fresh process that does `what`."
    script = f"""
import pathlib, re
from concept_transfer.data import Corpus, load_corpus
from concept_transfer.models import load_model
from concept_transfer.moments import collect
from concept_transfer.pairing import paired_states, spread_layers

def held(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

models = [load_model(n) for n in {NAMES}]
texts = load_corpus("general").texts[:{texts}]
pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
start = held("VmRSS")
kept = {what}
print(held("VmHWM") - start)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout)


def notes(rows, few, memory, fewer, powers):
    ours, stored = memory
    out = [
        f"{rows} rows, 30 x 18 layers, widths 576 and 640; reading: {few} sentences, all layers, all "
        "shared tokens.",
        f"Memory over loaded models, 8 x 8 layers, 600 sentences: moments {ours / 1e9:.2f} GB whatever the "
        f"text, stored states {stored / 1e9:.2f} GB and growing: equal "
        f"at {600 * ours / stored:,.0f} sentences.",
    ]
    for n, t in fewer.items():
        plain, chosen = ratio(t, PUBLISHED, GRID), ratio(t, PUBLISHED, CHOSEN)
        out.append(
            f"At {n:,} rows, where a solve by SVD is cheaper and cross-validation costs the same: "
            f"grid_vs_svd {plain:.1f}, grid_cv_vs_svd {chosen:.1f}."
        )
    if powers:
        grows = ", ".join(f"{v:.2f} of {k}" for k, v in powers.items())
        out.append(
            f"Time of a grid grows with the power {grows} (three sizes each; in theory at most 1, 2 and 2)."
        )
    return out


def main():
    a = arguments(rows=16384, texts=160, rounds=2, growth=1)
    models, texts = [load_model(n) for n in NAMES], load_corpus("general").texts
    X, Y, _ = paired_states(*models, texts[: a.rows // 11], range(30), range(18))
    X, Y = X[: a.rows].clone(), Y[: a.rows].clone()
    few, layers, more = texts[: a.texts], [range(len(m.layers)) for m in models], a.growth and not a.json
    reads = {
        "reading for a map": partial(paired_states, *models, few, *layers),
        "bare forward": partial(bare, models, few),
    }
    with fast_matmul(CPU):
        times = interleave(reads, 2 * a.rounds, warm=False)  # the models are warm
        times |= interleave(grids(X, Y), a.rounds, warm=False)
        sizes = (2048, 8192) if more else ()
        fewer = {n: interleave(grids(X[:n], Y[:n]), 1, warm=False) for n in sizes}
        times["its matrix products"] = [products(len(X), 30, 576, 18, 640)] * a.rounds
    for t in (times, *fewer.values()):
        t[PUBLISHED] = [18 * x for x in t[PUBLISHED]]  # one target layer was solved for
    moments = peak("collect(*models, Corpus('x', texts))", 600)
    stored = peak("paired_states(*models, texts, *map(spread_layers, models))", 600)
    ratios = {
        "grid_vs_svd": ratio(times, PUBLISHED, GRID),
        "grid_cv_vs_svd": ratio(times, PUBLISHED, CHOSEN),
        "grid_vs_gemm": ratio(times, GRID, "its matrix products"),
        "extract_vs_bare": ratio(times, "reading for a map", "bare forward"),
        "memory_vs_states": stored / moments,
    }
    powers = growth(X, Y) if more else {}
    said = notes(len(X), len(few), (moments, stored), fewer, powers)
    report("Alignment", times, ratios, a.json, said)


if __name__ == "__main__":
    main()
