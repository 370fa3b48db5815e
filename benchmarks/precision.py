"""Evidence in bfloat16 beside float32: how far doses, effects and damage are apart, and what it saves.

    python benchmarks/precision.py [--json] [--minutes 3] [--within 5] [--items 48] [--tiny 0]

The target's own direction of four concepts at one layer: read, brought to a damage of .1, and asked, all of
it in either precision. An effect is the mean change of the margin; its standard error, over items, says how
much a difference between the two matters.
"""

from functools import partial

import numpy as np
from shared import NAMES, arguments, interleave, over, report

from concept_transfer.concepts import extract_concept
from concept_transfer.data import load_pairs
from concept_transfer.measure import Bench
from concept_transfer.models import load_model, tiny_model
from concept_transfer.tasks import load_task

CONCEPTS = "emotions/happiness", "emotions/anger", "behaviours/politeness", "behaviours/honesty"  # as tasks
PRECISIONS = "float32", "bfloat16"


def asked(model, name, items):
    "A bench, a transplant at its damage, the change of every margin and of the choice rate, and the damage."
    layer = 2 * len(model.layers) // 3
    concept = extract_concept(model, load_pairs(name.removeprefix("behaviours/")), [layer])
    bench = Bench(model, layer, load_task(name, "test").take(items))
    t = bench.at_damage(bench.place(concept))
    base, steered = bench.ask([None, t])
    gain = steered.chosen.mean() - base.chosen.mean()
    return bench, t, steered.margin - base.margin, gain, bench.hurt(t).mean


def main():
    a = arguments(minutes=3, items=48, tiny=0)
    models = {p: load_model(tiny_model("llama") if a.tiny else NAMES[1], dtype=p) for p in PRECISIONS}
    lines = [
        "",
        "| concept | | dose | effect, nats | its error | choice rate | KL |",
        "|---|---|---|---|---|---|---|",
    ]
    ratios, jobs = {}, {}
    for name in CONCEPTS:
        shifts = []
        for p, model in models.items():
            bench, t, shift, gain, kl = asked(model, name, a.items)
            error = shift.std() / np.sqrt(len(shift))
            shifts.append((shift, error))
            told = f"{t.dose:.4f} | {shift.mean():+.3f} | {error:.3f} | {gain:+.3f} | {kl:.4f}"
            lines.append(f"| {name} | {p} | {told} |")
            jobs.setdefault(p, partial(bench.ask, t))
        (one, error), (two, _) = shifts
        ratios[f"{name}, effects apart in standard errors"] = abs(one.mean() - two.mean()) / error
    times, saved = interleave(jobs, {"bfloat16 over float32": over("float32", "bfloat16")}, a)
    report("bfloat16", times, ratios | saved, a, lines)


if __name__ == "__main__":
    main()
