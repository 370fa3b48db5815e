"""Maps for the full grid of layers of the embedded pair, as ratios of interleaved runs.

    python benchmarks/alignment.py [--json] [--rows 16384] [--texts 160] [--minutes 15] [--within 5]

published: one minimum-norm SVD solve for each pair of layers on stored rows (timed on a pair of each source
           layer, times the number of target layers)
products:  the matrix products of the grid alone
"""

from functools import partial

import torch
from shared import BATCHES, CPU, NAMES, apart, arguments, bare, fastest, interleave, over, peak, report

from concept_transfer.data import Corpus, load_corpus
from concept_transfer.engine import fast_matmul
from concept_transfer.maps import SourceLayer, contrans, control, ridge
from concept_transfer.models import load_model
from concept_transfer.moments import Moments, collect
from concept_transfer.pairing import paired_states, spread_layers

LAMBDAS = [10.0**k for k in range(-5, 5)]
READING, BARE = "reading for a map", "bare forward"
PUBLISHED, GRID, CHOSEN = "published, all pairs", "grid", "grid, 5 folds, 10 lambdas"
PRODUCTS = "its matrix products"


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


def products(X, Y):
    """The matrix products of one fit, and nothing else.

    Sums in float32, those of the control of one row in ten; for each source layer an inverse and the solution
    in float64, the control in float32."""
    (_, L1, d1), (_, L2, d2) = X.shape, Y.shape
    x, y = X.flatten(1), Y.flatten(1)
    for step in (1, 10):
        x[::step].T @ y[::step]  # (L1 d1, L2 d2)
    for A in (X, Y):
        torch.bmm(A.permute(1, 2, 0), A.transpose(0, 1))  # (L, d, d)
    R, S = torch.eye(d1, dtype=torch.float64), torch.ones(d1, L2 * d2, dtype=torch.float64)
    for _ in range(L1):
        torch.cholesky_inverse(torch.linalg.cholesky(R)) @ S
        R.float() @ S.float()


def each(models, texts, sizes):
    for m, size in zip(models, sizes, strict=True):
        bare(m, texts, size)


def memory(moments, count) -> int:
    "Bytes that sums, or states that are stored, take at most for so many texts, 8 x 8 layers."
    models, texts = [load_model(n) for n in NAMES], load_corpus("general").texts[:count]
    if moments:
        return peak(partial(collect, *models, Corpus("x", texts)))
    return peak(partial(paired_states, *models, texts, *map(spread_layers, models)))


def notes(rows, few, bytes, fewer):
    ours, stored = bytes
    out = [
        f"{rows} rows, 30 x 18 layers, widths 576 and 640; reading: {few} sentences, all layers, all "
        "shared tokens.",
        f"Memory over loaded models, 8 x 8 layers, 600 sentences: moments {ours / 1e9:.2f} GB whatever the "
        f"text, stored states {stored / 1e9:.2f} GB and growing: equal "
        f"at {600 * ours / stored:,.0f} sentences.",
    ]
    for n, got in fewer.items():
        plain, chosen = (f"{x.value:.1f} ({x.span('.1f')})" for x in got.values())
        out.append(
            f"At {n:,} rows, where a solve by SVD is cheaper and cross-validation costs the same: "
            f"grid_vs_svd {plain}, grid_cv_vs_svd {chosen}."
        )
    return out


def main():
    a = arguments(rows=16384, texts=160)
    models, texts = [load_model(n) for n in NAMES], load_corpus("general").texts
    X, Y, _ = paired_states(*models, texts[: a.rows // 11], range(30), range(18))
    X, Y = X[: a.rows].clone(), Y[: a.rows].clone()
    few, layers = texts[: a.texts], [range(len(m.layers)) for m in models]
    best = [fastest(partial(bare, m, few), BATCHES) for m in models]
    reads = {READING: partial(paired_states, *models, few, *layers), BARE: partial(each, models, few, best)}
    solved = {  # the published way solves for one target layer of 18
        "grid_vs_svd": lambda t: 18 * t[PUBLISHED] / t[GRID],
        "grid_cv_vs_svd": lambda t: 18 * t[PUBLISHED] / t[CHOSEN],
    }
    with fast_matmul(CPU):
        times, read = interleave(reads, {"extract_vs_bare": over(READING, BARE)}, a)
        jobs = grids(X, Y) | {PRODUCTS: partial(products, X, Y)}
        took, ratios = interleave(jobs, solved | {"grid_vs_gemm": over(GRID, PRODUCTS)}, a, warm=False)
        sizes = () if a.json else (2048, 8192)
        fewer = {n: interleave(grids(X[:n], Y[:n]), solved, a, warm=False)[1] for n in sizes}
    took[PUBLISHED] = [18 * x for x in took[PUBLISHED]]
    moments, stored = apart(memory, True, 600), apart(memory, False, 600)
    ratios |= read | {"memory_vs_states": stored / moments}
    said = notes(len(X), len(few), (moments, stored), fewer)
    report("Alignment", times | took, ratios, a, said)


if __name__ == "__main__":
    main()
