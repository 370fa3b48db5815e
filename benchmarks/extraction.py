"""Extraction and steered generation on the embedded pair, as ratios of interleaved runs.

    python benchmarks/extraction.py [--json] [--texts 128] [--minutes 15] [--within 5]

published: one text at a time through transformers with all hidden states and head, last token of every layer
floor:     the bare transformers blocks, without a head, at the size of batch that suits them best
plain:     transformers' own generation, of a model that nothing was hooked into
"""

from functools import partial

import torch
from shared import BATCHES, NAMES, arguments, bare, fastest, interleave, over, plain, rate, report
from transformers import AutoModelForCausalLM

from concept_transfer.concepts import activations
from concept_transfer.data import load_corpus
from concept_transfer.engine import encode
from concept_transfer.models import load_model
from concept_transfer.steering import place
from concept_transfer.zoo import fetch

NEW = 24  # tokens


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


def each(what, models, texts):
    return [what(m, texts) for m in models]


def difference(a, b) -> float:
    "Largest difference of two models' states, as a share of their norm."
    return max(((x - y).norm(dim=-1) / x.norm(dim=-1)).max().item() for x, y in zip(a, b, strict=True))


def main():
    a = arguments(texts=128)
    texts = load_corpus("neutral").texts[: a.texts]
    full = [load_model(n) for n in NAMES]
    half = [load_model(n, dtype="bfloat16") for n in NAMES]
    gemma, prompts = full[1], [" ".join(t.split()[:12]) for t in texts[:8]]
    untouched = AutoModelForCausalLM.from_pretrained(fetch(NAMES[1]), dtype="float32")
    direction = torch.randn(640, generator=torch.Generator().manual_seed(0))
    steered = place(direction, gemma, 12, dose=0.02)
    best = [fastest(partial(bare, m, texts), BATCHES) for m in full]
    jobs = {
        "published": partial(each, published, full, texts),
        "ours": partial(each, activations, full, texts),
        "ours, bfloat16": partial(each, activations, half, texts),
        "bare forward": lambda: [bare(m, texts, b) for m, b in zip(full, best, strict=True)],
        "plain generate": partial(plain, untouched, gemma, prompts, NEW),
        "steered generate": partial(steered.generate, prompts, 1, NEW, min_new_tokens=NEW),
    }
    worst = []

    def check(got):
        worst.append(difference(got["published"], got["ours"]))
        if not worst[-1] < 1e-4:
            raise SystemExit(f"states differ by {worst[-1]:.1e} of their norm: the comparison is void")

    wanted = {
        "vs_published_f32": over("published", "ours"),
        "vs_published_bf16": over("published", "ours, bfloat16"),
        "vs_floor": over("ours", "bare forward"),
        "generate_vs_plain": over("plain generate", "steered generate"),
    }
    times, ratios = interleave(jobs, wanted, a, check)
    f32, bf16 = (rate(512, 576, 1536, t, 30) / 1e9 for t in (torch.float32, torch.bfloat16))
    notes = [
        f"{len(texts)} sentences, both models; largest difference of states {max(worst):.0e} of their norm. "
        f"The bare forwards are fastest with batches of {best[0]} and {best[1]} tokens.",
        f"This processor multiplies at {f32:.0f} GFLOP/s in float32 and {bf16:.0f} in bfloat16, which bounds "
        "what bfloat16 can gain.",
    ]
    report("Extraction", times, ratios, a, notes)


if __name__ == "__main__":
    main()
