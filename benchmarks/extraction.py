"""Extraction and steered generation on the embedded pair, as ratios of interleaved runs.

    python benchmarks/extraction.py [--json] [--texts 128] [--rounds 2]

published: one text at a time through transformers with all hidden states and head, last token of every layer
floor:     the bare transformers blocks, without a head, on the same batches
"""

from functools import partial

import torch
from shared import NAMES, arguments, interleave, rate, ratio, report

from concept_transfer.concepts import activations
from concept_transfer.data import load_corpus
from concept_transfer.engine import encode, fast_matmul, length_batches, pad
from concept_transfer.models import load_model
from concept_transfer.steering import generate, place


def published(model, texts):
    "Last-token states of every block (n, L, d)."
    out, module, last = [], model._module, model.layers[len(model.layers) - 1]._module
    seen = {}

    def keep(block, inputs, output):  # hidden_states[-1] is after the final norm
        seen["h"] = output[0] if isinstance(output, tuple) else output

    for ids in encode(model, texts):
        hook = last.register_forward_hook(keep)
        with torch.no_grad():
            states = module(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        hook.remove()
        out.append(torch.stack([*(h[0, -1] for h in states[1:-1]), seen["h"][0, -1]]))  # (L, d)
    return torch.stack(out)


def bare(model, ids):
    "The blocks alone on the batches that `activations` makes."
    with torch.no_grad(), fast_matmul(torch.device("cpu")):
        for rows in length_batches(ids):
            x, mask = pad(model, [ids[i] for i in rows])
            model._module.base_model(input_ids=x, attention_mask=mask, use_cache=False)


def each(what, models, texts):
    return [what(m, texts) for m in models]


def difference(a, b) -> float:
    "Largest difference of two models' states, as a share of their norm."
    return max(((x - y).norm(dim=-1) / x.norm(dim=-1)).max().item() for x, y in zip(a, b, strict=True))


def main():
    a = arguments(texts=128, rounds=2)
    texts = load_corpus("neutral").texts[: a.texts]
    full = [load_model(n) for n in NAMES]
    half = [load_model(n, dtype="bfloat16") for n in NAMES]
    gemma, prompts = full[1], [" ".join(t.split()[:12]) for t in texts[:8]]
    direction = torch.randn(640, generator=torch.Generator().manual_seed(0))
    steered = place(direction, gemma, 12, dose=0.02)
    jobs = {
        "published": partial(each, published, full, texts),
        "ours": partial(each, activations, full, texts),
        "ours, bfloat16": partial(each, activations, half, texts),
        "bare forward": lambda: [bare(m, encode(m, texts)) for m in full],
        "plain generate": partial(generate, gemma, prompts, 24, min_new_tokens=24),
        "steered generate": partial(steered.generate, prompts, 1, 24, min_new_tokens=24),
    }
    worst = []

    def check(got):
        worst.append(difference(got["published"], got["ours"]))
        if not worst[-1] < 1e-4:
            raise SystemExit(f"states differ by {worst[-1]:.1e} of their norm: the comparison is void")

    times = interleave(jobs, a.rounds, check)
    ratios = {
        "vs_published_f32": ratio(times, "published", "ours"),
        "vs_published_bf16": ratio(times, "published", "ours, bfloat16"),
        "vs_floor": ratio(times, "ours", "bare forward"),
        "generate_vs_plain": ratio(times, "plain generate", "steered generate"),
    }
    f32, bf16 = (rate(512, 576, 1536, t, 30) / 1e9 for t in (torch.float32, torch.bfloat16))
    notes = [
        f"{len(texts)} sentences, both models, {a.rounds} rounds; largest difference of states "
        f"{max(worst):.0e} of their norm. This processor multiplies at {f32:.0f} GFLOP/s in float32 and "
        f"{bf16:.0f} in bfloat16, which bounds what bfloat16 can gain."
    ]
    report("Extraction", times, ratios, a.json, notes)


if __name__ == "__main__":
    main()
