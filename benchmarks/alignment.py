"""Maps for the full grid of layers of the embedded pair, as ratios of interleaved runs.

    python benchmarks/alignment.py [--json] [--rows 16384] [--texts 160] [--rounds 2] [--growth 1]

published: one minimum-norm SVD solve for each pair of layers on stored rows (timed on a pair of each source layer, times the number of target layers)
products:  the matrix products of the grid alone, at the measured rate of each precision
"""
import subprocess, sys, time
import numpy as np, torch
from concept_transfer.alignment import contrans, ridge
from concept_transfer.data import load_corpus
from concept_transfer.extraction import length_batches
from concept_transfer.models import fast_matmul, load_model, pad
from concept_transfer.moments import Moments, _encode_offsets, paired_states
from shared import NAMES, arguments, interleave, ratio, report


def moments(X, Y, folds):
    m = Moments.zeros(folds, *X.shape[1:], *Y.shape[1:]); m.add(X, Y, torch.arange(len(X)) % folds)
    return m

def grid(X, Y, folds, lambdas):
    m = moments(X, Y, folds)
    return [ridge(m, s, lambdas)[0].float() for s in range(X.shape[1])]

def rate(dtype) -> float:
    "Measured FLOP/s of a product of the grid's shape."
    a, b, best = torch.randn(576, 576, dtype=dtype), torch.randn(576, 11520, dtype=dtype), float("inf")
    for _ in range(12):
        start = time.perf_counter(); a @ b; best = min(best, time.perf_counter() - start)
    return 2 * 576 * 576 * 11520 / best

def products(n, L1, d1, L2, d2) -> float:
    "Seconds that the products of one fit take: sums in float32 with their control, solution in float64, control in float32."
    sums = 2 * n * (1.1 * L1 * d1 * L2 * d2 + L1 * d1 ** 2 + L2 * d2 ** 2); solve = 2 * L1 * d1 ** 2 * L2 * d2
    return (sums + solve) / rate(torch.float32) + (solve + L1 * d1 ** 3) / rate(torch.float64)   # d^3 for an inverse by Cholesky

def bare(models, texts):
    for m in models:
        ids = _encode_offsets(m, texts)[0]
        with torch.no_grad(), fast_matmul(m):
            for rows in length_batches(ids):
                x, mask = pad(m, [ids[i] for i in rows]); m._module.base_model(input_ids=x, attention_mask=mask, use_cache=False)

def growth(X, Y):
    "Exponents of the time of a grid in rows, widths and layers, from three sizes of each."
    sizes = {"rows": [(n, 576, 6) for n in (4096, 8192, 16384)], "widths": [(2048, d, 12) for d in (144, 288, 576)], "layers": [(2048, 576, L) for L in (4, 8, 16)]}
    big, out = (torch.cat([X] * (1 + 16384 // len(X))), torch.cat([Y] * (1 + 16384 // len(Y)))), {}
    for k, points in sizes.items():
        t = [min(_time(lambda: grid(big[0][:n, :L, :d], big[1][:n, :L, :d], 1, [.1])) for _ in range(2)) for n, d, L in points]
        at = [p[{"rows": 0, "widths": 1, "layers": 2}[k]] for p in points]; out[k] = float(np.polyfit(np.log(at), np.log(t), 1)[0])
    return out

def _time(fn):
    start = time.perf_counter(); fn()
    return time.perf_counter() - start

def peak(what, texts) -> float:
    "Peak memory in bytes, over what the loaded models hold, of a fresh process that fits 8 x 8 layers from moments or stores all states for it."
    code = {"moments": "from concept_transfer.moments import collect; collect(*models, Corpus('x', texts))",
            "states": "from concept_transfer.moments import paired_states, spread_layers; Z = paired_states(*models, texts, *map(spread_layers, models))"}[what]
    script = ("import re, pathlib; from concept_transfer.data import Corpus, load_corpus; from concept_transfer.models import load_model\n"
              "held = lambda k: 1024 * int(re.search(rf'{k}:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])\n"
              f"models = [load_model(n) for n in {NAMES}]; texts = load_corpus('general').texts[:{texts}]; pathlib.Path('/proc/self/clear_refs').write_text('5')\n"    # forget the peak of loading
              f"start = held('VmRSS'); {code}\nprint(held('VmHWM') - start)")
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)

def main():
    a = arguments(rows=16384, texts=160, rounds=2, growth=1); models = [load_model(n) for n in NAMES]; texts = load_corpus("general").texts
    X, Y, _ = paired_states(*models, texts[:a.rows // 11], range(30), range(18)); X, Y = X[:a.rows].clone(), Y[:a.rows].clone()
    lambdas = [10. ** k for k in range(-5, 5)]; few = texts[:a.texts]; layers = [list(range(len(m.layers))) for m in models]
    grids = lambda X, Y: {"published, all pairs": lambda: [contrans(X[:, s], Y[:, s % 18]) for s in range(30)], "grid": lambda: grid(X, Y, 1, [.1]), "grid, 5 folds, 10 lambdas": lambda: grid(X, Y, 5, lambdas)}
    with fast_matmul(models[0]):
        times = interleave({"reading for a map": lambda: paired_states(*models, few, *layers), "bare forward": lambda: bare(models, few)}, 2 * a.rounds, warm=False)      # the models are warm
        times |= interleave(grids(X, Y), a.rounds, warm=False)
        fewer = {n: interleave(grids(X[:n], Y[:n]), 1, warm=False) for n in (2048, 8192)} if a.growth and not a.json else {}
        times["its matrix products"] = [products(len(X), 30, 576, 18, 640)] * a.rounds
    for t in (times, *fewer.values()): t["published, all pairs"] = [18 * x for x in t["published, all pairs"]]                          # one target layer was solved for
    ours, stored = (peak(k, 600) for k in ("moments", "states"))
    r = lambda x, y: ratio(times, x, y)
    out = {"grid_vs_svd": r("published, all pairs", "grid"), "grid_cv_vs_svd": r("published, all pairs", "grid, 5 folds, 10 lambdas"), "grid_vs_gemm": r("grid", "its matrix products"),
           "extract_vs_bare": r("reading for a map", "bare forward"), "memory_vs_states": stored / ours}
    notes = [f"{len(X)} rows, 30 x 18 layers, widths 576 and 640; reading: {len(few)} sentences, all layers, all shared tokens.",
             f"Memory over loaded models, 8 x 8 layers, 600 sentences: moments {ours / 1e9:.2f} GB whatever the text, stored states {stored / 1e9:.2f} GB and growing: equal at {600 * ours / stored:,.0f} sentences."]
    for n, t in fewer.items(): notes.append(f"At {n:,} rows, where a solve by SVD is cheaper and cross-validation costs the same: grid_vs_svd {ratio(t, 'published, all pairs', 'grid'):.1f}, grid_cv_vs_svd {ratio(t, 'published, all pairs', 'grid, 5 folds, 10 lambdas'):.1f}.")
    if a.growth and not a.json: notes.append("Time of a grid grows with the power " + ", ".join(f"{v:.2f} of {k}" for k, v in growth(X, Y).items()) + " (three sizes each; in theory at most 1, 2 and 2).")
    report("Alignment", times, out, a.json, notes)

if __name__ == "__main__": main()
