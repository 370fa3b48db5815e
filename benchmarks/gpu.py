"""What a graphics card makes of it: one card, four minutes, no downloads.

    python benchmarks/gpu.py [--json] [--toy]

Models are Llamas of 1, 7 and 13 billion random weights in bfloat16; without a card, or with `--toy`, far
smaller ones on the processor in float32, which say that the script works and nothing of speed.

read_vs_published: reading the last token of all layers against one text at a time with all hidden states
read_vs_bare:      tokens a second against the bare blocks, without a head, on the same batches
share_of_peak:     its matrix products against the measured rate of a large one
grid_vs_products:  maps between 8 x 8 layers as wide as the model against the matrix products that they need
memory_vs_formula: most memory of that grid, over what was held before, against `needed`
evidence_vs_loop:  answers and damage under some directions against every text alone with all its logits
generate_N:        tokens a second of steered generation against plain, N prompts at once
"""

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from shared import interleave, processor, seconds
from transformers import LlamaConfig, LlamaForCausalLM

from concept_transfer.concepts import activations
from concept_transfer.data import Corpus, load_corpus
from concept_transfer.engine import encode, length_batches, pad
from concept_transfer.maps import MAP_METHODS, SourceLayer
from concept_transfer.measure import Bench
from concept_transfer.models import wrap
from concept_transfer.moments import Rows, needed
from concept_transfer.steering import adding, generate, place
from concept_transfer.tasks import load_task
from concept_transfer.toys import tiny_tokenizer

SHAPES = {  # width, layers, heads, heads of keys, width inside
    "1B": (2048, 16, 32, 8, 8192),
    "7B": (4096, 32, 32, 32, 11008),
    "13B": (5120, 40, 40, 40, 13824),
}
TOYS = {"toy": (64, 4, 4, 2, 128), "wider toy": (128, 4, 4, 4, 256)}
CARD = {"texts": 512, "alone": 12, "batch": 16384, "items": 24, "rows": 8192, "size": 8192, "new": 24}
SMALL = {"texts": 24, "alone": 6, "batch": 512, "items": 4, "rows": 300, "size": 256, "new": 4}
KEEP = 4
BRIEF = SimpleNamespace(minutes=0.1, within=5)  # so that all of it takes four minutes at most


def llama(shape, device):
    "A Llama with random weights, and a tokenizer that is at hand."
    names = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size".split()
    config = LlamaConfig(vocab_size=32000, **dict(zip(names, shape, strict=True)))
    was = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    try:
        with torch.device(device):
            module = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(was)
    return wrap(module.eval().requires_grad_(False), tiny_tokenizer("byte"), "random")


def waited(job, device):
    "What a job gives, once the device is done with it."
    got = job()
    if device != "cpu":
        torch.cuda.synchronize()
    return got


def compared(jobs, device, warm=True):
    "Seconds of jobs in interleaved rounds, and what the last round gave."
    last = {}
    jobs = {k: partial(waited, j, device) for k, j in jobs.items()}
    times, _ = interleave(jobs, {"a round": lambda t: sum(t.values())}, BRIEF, last.update, warm)
    return times, last


def ratio(times, a, b):
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


def rate(size, dtype, device):
    "FLOP/s of a matrix product, the best of some."
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / min(seconds(lambda: waited(lambda: a @ b, device)) for _ in range(6))


def published(model, texts):
    "Last-token states of every block but the last (n, L - 1, d), one text at a time with the head."
    out = []
    for ids in encode(model, texts):
        with torch.no_grad():
            x = torch.tensor([ids], device=model._module.device)
            states = model._module(input_ids=x, output_hidden_states=True).hidden_states[1:-1]
        out.append(torch.stack([h[0, -1] for h in states]).float().cpu())
    return torch.stack(out)


def bare(model, ids, batch):
    for rows in length_batches(ids, batch):
        x, mask = pad(model, [ids[i] for i in rows])
        with torch.no_grad():
            model._module.base_model(input_ids=x, attention_mask=mask, use_cache=False)


def reading(model, device, texts, alone, batch):
    "Reading as ratios. Leaves where the states of both ways differ."
    ids, few = encode(model, texts), texts[:alone]
    jobs = {
        "published": partial(published, model, few),
        "ours": partial(activations, model, texts, batch_tokens=batch),
        "bare": partial(bare, model, ids, batch),
    }
    times, got = compared(jobs, device)
    one, two = got["published"], got["ours"][:alone, :-1]
    if (cosine := torch.cosine_similarity(one, two, -1).min()) < 0.999:
        raise SystemExit(f"states differ (cosine {cosine:.4f}): the comparison is void")
    n, m = sum(map(len, ids)), sum(map(len, ids[:alone]))
    weights = sum(p.numel() for p in model._module.base_model.layers.parameters())
    speed = n / statistics.median(times["ours"])
    return {
        "read_vs_published": ratio(times, "published", "ours") * n / m,
        "read_vs_bare": ratio(times, "bare", "ours"),
        "share_of_peak": 2 * weights * speed,
        "tokens_a_second": speed,
    }


def random_rows(n, L, d, device):
    "Rows of two models that have nothing to do with each other."
    X, Y = torch.randn(2, n, L, d, device=device)
    at, fold = torch.arange(0, n, 10, device=device), torch.zeros(n, device=device).long()
    sums = {"n": torch.full((1,), n, device=device).double(), "x": X.sum(0)[None].double()}
    sums |= {"y": Y.sum(0)[None].double(), "squares_x": X.square().sum(0)[None].double()}
    sums |= {"squares": Y.square().sum(0)[None].double(), "weight": torch.ones(n, device=device).double()}
    shifts = {k: torch.zeros(L, d, device=device).double() for k in ("shift_x", "shift_y")}
    m = Rows.zeros(1, L, d, L, d)
    return replace(m, X=X, Y=Y, fold_of=fold, near=at, far=at.roll(n // 20), **sums, **shifts)


def grid(m):
    "Maps and controls between all layers at one penalty."
    _, L1, d1, L2, d2 = m.shape
    W = torch.empty(L1, L2, d1, d2, device=m.X.device)
    N = torch.empty(L1, L2, d1, d2, device=m.X.device, dtype=torch.bfloat16)
    for s in range(L1):
        u = SourceLayer(m, s, [0.1])
        both = u.products, lambda t, u=u: u.side.shuffled(t) / u.m.n_shuffled
        maps = zip(*(u.maps(MAP_METHODS["ridge"].solve, products) for products in both), strict=True)
        for t, (one, two) in enumerate(maps):
            W[s, t], N[s, t] = one, two
    return W, N


def mapping(device, rows, width, size, L=8):
    "A grid against its products: sums and control in float32, own products, inverse and maps in float64."
    m = random_rows(rows, L, width, device)
    before = 0 if device == "cpu" else waited(torch.cuda.memory_allocated, device)
    if before:
        torch.cuda.reset_peak_memory_stats()
    times, _ = compared({"grid": partial(grid, m)}, device, False)
    single, double = (rate(min(size, 4096), t, device) for t in (torch.float32, torch.float64))
    r = min(rows, width)
    float32 = L * L * (2.2 * rows * r * width + 2 * r * r * width)
    float64 = L * (2 * rows * r * r + r**3) + L * L * 2 * r * r * width
    need = needed(m.shape, rows)
    found = {"grid_vs_products": times["grid"][0] / (float32 / single + float64 / double)}
    if before:
        most = torch.cuda.max_memory_allocated() - before
        found["memory_vs_formula"] = most / (need["maps"] + need["from rows"])
    return found


def logp(model, text, v):
    "Log-probabilities (t, V) after every token of a text, steered by a forward hook."

    def add(block, inputs, output):
        return output if v is None else output + v

    hook = model.layers[len(model.layers) // 2]._module.register_forward_hook(add)
    ids = torch.tensor(encode(model, [text]), device=model._module.device)
    with torch.no_grad():
        out = model._module(input_ids=ids).logits[0].float().log_softmax(-1)
    hook.remove()
    return out


def loop(model, task, texts, vectors):
    "All answers of each vector, and its mean KL, the plain way."
    base, found = {}, []
    for v in (None, *vectors):
        for item in task.items:
            logp(model, item.prompt, v)
        kl = []
        for text in texts:
            q = logp(model, text, v)[-KEEP - 1 : -1]
            p = base.setdefault(text, q)
            kl.append(
                torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean().item()
            )
        found.append(float(np.mean(kl)))
    return found


def batched(model, task, texts, vectors):
    bench = Bench(model, len(model.layers) // 2, task, Corpus("neutral", texts))
    changes = [None, *(adding(v.to(model._module.device)) for v in vectors)]
    bench.ask(changes)
    return [float(d.kl[:, -KEEP:].mean()) for d in bench.hurt(changes)]


def evidence(model, device, items, vectors):
    task, texts = load_task("emotions/happiness").take(items), load_corpus("neutral").texts[:16]
    dtype = model._module.dtype
    vectors = [v.to(device, dtype) for v in vectors]
    jobs = {
        "loop": partial(loop, model, task, texts[8:], vectors),  # damage is told on the second half
        "ours": partial(batched, model, task, texts, vectors),
    }
    times, got = compared(jobs, device, False)
    for plain, ours in zip(got["loop"][1:], got["ours"][1:], strict=True):
        if abs(plain - ours) > (0.01 if dtype == torch.float32 else 0.1) * plain + 1e-3:
            raise SystemExit(f"damage differs ({plain:.4f} and {ours:.4f}): the comparison is void")
    return {"evidence_vs_loop": ratio(times, "loop", "ours")}


def writing(model, device, prompts, new, steered):
    found = {}
    for n in (1, 8, 64):
        some = (prompts * n)[:n]
        jobs = {
            "plain": partial(generate, model, some, new, min_new_tokens=new),
            "steered": partial(steered.generate, some, 1, new, min_new_tokens=new),
        }
        found[f"generate_{n}"] = ratio(compared(jobs, device)[0], "plain", "steered")
    return found


def measured(shape, device, how):
    "All ratios of one model."
    start, model, width = time.perf_counter(), llama(shape, device), shape[0]
    texts = load_corpus("general").texts[: how["texts"]]
    g = torch.Generator().manual_seed(0)
    placed = [place(torch.randn(width, generator=g), model, shape[1] // 2, dose=0.1) for _ in range(3)]
    found = reading(model, device, texts, how["alone"], how["batch"])
    found["share_of_peak"] /= rate(how["size"], model._module.dtype, device)
    found |= evidence(model, device, how["items"], [t.vector() for t in placed])
    prompts = [" ".join(t.split()[:12]) for t in texts[:64]]
    found |= writing(model, device, prompts, how["new"], placed[0])
    found |= mapping(device, how["rows"], width, how["size"])
    return found | {"seconds": time.perf_counter() - start}


def table(found):
    names = [*found]
    print("\n| |", " | ".join(names), "|\n|---|" + "---|" * len(names))
    for k in found[names[0]]:
        print(f"| {k} |", " | ".join(f"{found[n][k]:.3g}" for n in names), "|")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true", help="one object of ratios for each model")
    parser.add_argument("--toy", action="store_true", help="small models on the processor")
    a = parser.parse_args()
    card = torch.cuda.is_available() and not a.toy
    found, start = {}, time.perf_counter()
    for name, shape in (SHAPES if card else TOYS).items():
        if time.perf_counter() - start > 150:
            print(f"{name} is left out: four minutes would not do.", file=sys.stderr)
            continue
        try:
            found[name] = measured(shape, "cuda" if card else "cpu", CARD if card else SMALL)
        except torch.OutOfMemoryError:
            print(f"{name} is left out: it does not fit on this card.", file=sys.stderr)
        gc.collect()
        if card:
            torch.cuda.empty_cache()
    if a.json:
        print(json.dumps(found))
        return
    name = torch.cuda.get_device_name() if card else processor()
    toy = (
        "No GPU is at hand: toy sizes on this processor, which say that the script runs and nothing of speed."
    )
    print(f"## {name}\n\n### GPU\n\n{'In bfloat16.' if card else toy}")
    table(found)
    print()


if __name__ == "__main__":
    main()
