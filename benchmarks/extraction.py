"""Extraction and steered generation on the embedded pair, as ratios of interleaved runs.

    python benchmarks/extraction.py [--json] [--texts 96] [--rounds 3]

published: one text at a time through transformers with all hidden states and the head, last token of every layer
floor:     the bare transformers blocks, without a head, on the same batches
"""
import argparse, json, platform, statistics, time
import torch
from concept_transfer.data import load_corpus
from concept_transfer.extraction import activations, length_batches
from concept_transfer.injection import generate, graft
from concept_transfer.models import encode, fast_matmul, load_model, pad

NAMES = ("smollm2-135m-instruct", "gemma-3-270m")


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

def timed(fn):
    start = time.perf_counter(); result = fn()
    return time.perf_counter() - start, result

def main():
    p = argparse.ArgumentParser(); p.add_argument("--json", action="store_true"); p.add_argument("--texts", type=int, default=96); p.add_argument("--rounds", type=int, default=3)
    a = p.parse_args(); texts = load_corpus("neutral").texts[:a.texts]
    full = [load_model(n) for n in NAMES]; half = [load_model(n, dtype="bfloat16") for n in NAMES]
    both = lambda f, models: lambda: [f(m, texts) for m in models]
    gemma = full[1]; prompts = [" ".join(t.split()[:12]) for t in texts[:8]]
    steered = graft(torch.randn(640, generator=torch.Generator().manual_seed(0)), gemma, 12, dose=.02)
    jobs = {"published": both(published, full), "ours": both(activations, full), "ours, bfloat16": both(activations, half), "bare forward": both(bare, full),
            "plain generate": lambda: generate(gemma, prompts, 24, min_new_tokens=24), "steered generate": lambda: steered.generate(prompts, 1, 24, min_new_tokens=24)}
    for name in list(jobs)[1:]: jobs[name]()                                              # warm
    times = {k: [] for k in jobs}
    for _ in range(a.rounds):
        for k, fn in jobs.items():
            t, result = timed(fn); times[k].append(t)
            if k == "published": reference = result
            if k == "ours": worst = max(((x - y).norm(dim=-1) / x.norm(dim=-1)).max().item() for x, y in zip(reference, result))
    if not worst < 1e-4: raise SystemExit(f"states differ by {worst:.1e} of their norm: the comparison is void")
    ratio = lambda a, b: statistics.median(x / y for x, y in zip(times[a], times[b]))
    out = {"vs_published_f32": ratio("published", "ours"), "vs_published_bf16": ratio("published", "ours, bfloat16"), "vs_floor": ratio("ours", "bare forward"),
           "generate_vs_plain": ratio("plain generate", "steered generate")}
    if a.json: print(json.dumps(out)); return
    print(f"{a.texts} sentences, both models, {a.rounds} rounds; {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; largest difference of states {worst:.1e} of their norm\n")
    print("| | median seconds |\n|---|---|"); [print(f"| {k} | {statistics.median(v):.2f} |") for k, v in times.items()]
    print("\n| ratio | |\n|---|---|"); [print(f"| {k} | {v:.2f} |") for k, v in out.items()]

if __name__ == "__main__": main()
