"""Extraction and steered generation on the embedded pair, as ratios of interleaved runs.

    python benchmarks/extraction.py [--json] [--texts 128] [--rounds 2]

published: one text at a time through transformers with all hidden states and the head, last token of every layer
floor:     the bare transformers blocks, without a head, on the same batches
"""
import time
import torch
from concept_transfer.data import load_corpus
from concept_transfer.extraction import activations, length_batches
from concept_transfer.injection import generate, graft
from concept_transfer.models import encode, fast_matmul, load_model, pad
from shared import NAMES, arguments, interleave, ratio, report


def published(model, texts):
    "Last-token states of every block (n, L, d)."
    out, module, last = [], model._module, model.layers[len(model.layers) - 1]._module
    for ids in encode(model, texts):
        seen = {}
        hook = last.register_forward_hook(lambda m, i, o: seen.update(h=o[0] if isinstance(o, tuple) else o))  # hidden_states[-1] is after the final norm
        with torch.no_grad(): states = module(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        hook.remove(); out.append(torch.stack([*(h[0, -1] for h in states[1:-1]), seen["h"][0, -1]]))
    return torch.stack(out)

def bare(model, texts):
    "The blocks alone on the batches that `activations` makes."
    ids = encode(model, texts)
    with torch.no_grad(), fast_matmul(model):
        for rows in length_batches(ids):
            x, mask = pad(model, [ids[i] for i in rows]); model._module.base_model(input_ids=x, attention_mask=mask, use_cache=False)

def rate(dtype, m=512, k=576, n=1536, runs=30) -> float:
    "Measured GFLOP/s of the linear layers' product."
    a, w, best = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype), float("inf")
    for _ in range(runs):
        start = time.perf_counter(); torch.nn.functional.linear(a, w); best = min(best, time.perf_counter() - start)
    return 2 * m * k * n / best / 1e9

def main():
    a = arguments(texts=128, rounds=2); texts = load_corpus("neutral").texts[:a.texts]
    full = [load_model(n) for n in NAMES]; half = [load_model(n, dtype="bfloat16") for n in NAMES]
    both = lambda f, models: lambda: [f(m, texts) for m in models]
    gemma = full[1]; prompts = [" ".join(t.split()[:12]) for t in texts[:8]]
    steered = graft(torch.randn(640, generator=torch.Generator().manual_seed(0)), gemma, 12, dose=.02)
    jobs = {"published": both(published, full), "ours": both(activations, full), "ours, bfloat16": both(activations, half), "bare forward": both(bare, full),
            "plain generate": lambda: generate(gemma, prompts, 24, min_new_tokens=24), "steered generate": lambda: steered.generate(prompts, 1, 24, min_new_tokens=24)}
    worst = []
    def check(got):
        worst.append(max(((x - y).norm(dim=-1) / x.norm(dim=-1)).max().item() for x, y in zip(got["published"], got["ours"])))
        if not worst[-1] < 1e-4: raise SystemExit(f"states differ by {worst[-1]:.1e} of their norm: the comparison is void")
    times = interleave(jobs, a.rounds, check)
    r = lambda a, b: ratio(times, a, b)
    out = {"vs_published_f32": r("published", "ours"), "vs_published_bf16": r("published", "ours, bfloat16"), "vs_floor": r("ours", "bare forward"),
           "generate_vs_plain": r("plain generate", "steered generate")}
    report("Extraction", times, out, a.json, [f"{len(texts)} sentences, both models, {a.rounds} rounds; largest difference of states {max(worst):.0e} of their norm. "
           f"This processor multiplies at {rate(torch.float32):.0f} GFLOP/s in float32 and {rate(torch.bfloat16):.0f} in bfloat16, which bounds what bfloat16 can gain."])

if __name__ == "__main__": main()
