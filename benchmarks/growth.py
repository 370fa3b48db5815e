"""How time and memory grow with text, width, layers, arms and batch, on models and rows with random numbers.

    python benchmarks/growth.py [--json] [--scale 16] [--tries 3] [--minutes 2] [--within 5]

For each step and each thing that grows, four sizes, of which each is twice the last one: the exponent is the
slope of the logarithm of the seconds of a round, or of the largest memory of a process of its own (in excess
of what it held before), against that of the size. `--minutes` are those of one line of the table.
`worst_seconds` and `worst_bytes`: of all lines the exponent that lies highest above its formula's, less that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from shared import Found, apart, arguments, found, interleave, peak, report

from concept_transfer.concepts import activations
from concept_transfer.data import load_corpus
from concept_transfer.maps import SourceLayer, control, ridge
from concept_transfer.measure import Bench
from concept_transfer.models import load_model
from concept_transfer.moments import Moments
from concept_transfer.steering import adding, generate
from concept_transfer.tasks import choice_task
from concept_transfer.toys import tiny_module

TIMES = (1, 2, 4, 8)
PAGE = 4096  # bytes: less cannot be seen


def model(width, layers):
    "A Llama with random weights."
    sizes = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers)
    heads = dict(num_attention_heads=4, num_key_value_heads=4, head_dim=width // 4)
    return load_model(*tiny_module("llama", max_position_embeddings=1024, **sizes, **heads))


def sentences(n):
    "Texts of one length in characters."
    return [t[:60].ljust(60, ".") for t in load_corpus("general").texts[:n]]


def reading(texts, width, layers, batch):
    return partial(activations, model(width, layers), sentences(texts), batch_tokens=batch)


def fit(m, X, Y):
    m.add(X, Y, torch.arange(len(X)) % 5)
    for s in range(X.shape[1]):
        u = SourceLayer(m, s, [0.1, 1.0])
        ridge(u).float(), control(u)


def fitting(texts, width, layers):
    "A grid of maps; sixteen rows a text."
    X, Y = (torch.randn(16 * texts, layers, width) for _ in range(2))
    return lambda: fit(Moments.zeros(5, layers, width, layers, width), X, Y)


def measuring(texts, arms):
    "Answers of some arms to a question on each text, and their damage on the texts that are always the same."
    target, corpus = model(128, 4), load_corpus("neutral")
    task = choice_task(sentences(texts), ["joy", "fear", "anger"], "joy")
    changes = [adding(v) for v in torch.randn(arms, 128)]

    def job():
        bench = Bench(target, 1, task, corpus)
        bench.ask(changes), bench.hurt(changes)

    return job


def writing(batch, width, layers):
    target, prompts = model(width, layers), sentences(batch)
    return partial(generate, target, prompts, 16, min_new_tokens=16)


@dataclass(frozen=True)
class Step:
    "What is done, at its smallest sizes, and the exponents that its formula has at most."

    make: Callable  # sizes -> what is timed
    least: dict[str, int]
    time: dict[str, float]
    memory: dict[str, float]


def steps(k):
    "All steps, `k` times as large as the smallest that run at all."
    return {
        "reading": Step(
            reading,
            dict(texts=4 * k, width=16 * k, layers=max(1, k // 4), batch=32 * k),
            dict(texts=1, width=2, layers=1, batch=0),
            dict(texts=1, width=1, layers=1, batch=1),
        ),
        "fitting": Step(
            fitting,
            dict(texts=8 * k, width=8 * k, layers=max(1, k // 4)),
            dict(texts=1, width=3, layers=2),
            dict(texts=1, width=2, layers=2),
        ),
        "measuring": Step(measuring, dict(texts=k, arms=k), dict(texts=1, arms=1), dict(texts=1, arms=1)),
        "writing": Step(
            writing,
            dict(batch=k, width=16 * k, layers=max(1, k // 4)),
            dict(batch=1, width=2, layers=1),
            dict(batch=1, width=1, layers=1),
        ),
    }


def slope(sizes, values):
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def memory(name, k, sizes):
    small = steps(1)[name]
    small.make(**small.least)()  # so that the code itself is in memory
    return max(peak(steps(k)[name].make(**sizes)), PAGE)


def grown(name, what, a):
    "Sizes of what grows, seconds of the largest, bytes of all, exponents of both."
    step = steps(a.scale)[name]
    sizes = [step.least[what] * n for n in TIMES]
    given = [step.least | {what: n} for n in sizes]
    jobs = {n: step.make(**x) for n, x in zip(sizes, given, strict=True)}
    times, got = interleave(jobs, {"seconds": lambda t: slope(sizes, [t[n] for n in sizes])}, a)
    held = [[apart(memory, name, a.scale, x) for x in given] for _ in range(a.tries)]
    return sizes, times[sizes[-1]], held[-1], got["seconds"], found([slope(sizes, x) for x in held])


def less(x, most):
    return Found(x.value - most, x.low - most, x.high - most, x.rounds)


def shown(x, most):
    return f"{x.value:.2f} ({x.span('.2f')}) | {most:g}"


def main():
    a, times, excess, rows = arguments(scale=16, tries=3, minutes=2), {}, [], []
    for name, step in steps(a.scale).items():
        for what in step.least:
            sizes, took, held, seconds, size = grown(name, what, a)
            times[f"{name}, {what} {sizes[-1]}"] = took
            most = step.time[what], step.memory[what]
            excess.append((less(seconds, most[0]), less(size, most[1])))
            mb = f"{held[0] / 1e6:.0f} to {held[-1] / 1e6:.0f}"
            line = f"{what} | {sizes[0]} to {sizes[-1]} | {shown(seconds, most[0])}"
            rows.append(f"| {name} | {line} | {mb} | {shown(size, most[1])} |")
    worst = [max(x, key=lambda f: f.value) for x in zip(*excess, strict=True)]
    notes = [
        "Exponents of time and memory, with their intervals, beside those of the formulas.",
        "\n| step | of | sizes | exponent of the seconds | at most | MB | exponent of the bytes | at most |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    report("Growth", times, dict(zip(("worst_seconds", "worst_bytes"), worst, strict=True)), a, notes)


if __name__ == "__main__":
    main()
