"""Evidence for one concept on the embedded pair.

    python benchmarks/evidence.py [--json] [--items 24] [--arms 6] [--minutes 15] [--within 5]

loop: every text of every arm alone through the whole model with all its logits, steered by a forward hook
ours: the same answers and the same damage from shared states, in batches, with the logits that are needed
seconds: the full evidence for one concept: all arms (20 random directions), dose curves, knowledge, readouts
products: what its matrix products take at this processor's best rate in float32: nothing can be faster that
asks the same of the same model
"""

from functools import partial

import numpy as np
import torch
from shared import CPU, NAMES, arguments, interleave, over, rate, report, seconds
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from concept_transfer.concepts import extract_concept
from concept_transfer.data import Corpus, load_corpus, load_pairs
from concept_transfer.engine import encode, fast_matmul
from concept_transfer.evidence import evaluate
from concept_transfer.measure import Bench
from concept_transfer.models import load_model
from concept_transfer.steering import adding, place
from concept_transfer.tasks import load_task

LAYER, KEEP = 12, 4


def logp(model, text, v):
    "Log-probabilities (t, V) after every token of a text, steered by a forward hook."

    def add(block, inputs, output):
        return output if v is None else output + v

    hook = model.layers[LAYER]._module.register_forward_hook(add)
    with torch.no_grad():
        out = model._module(input_ids=torch.tensor(encode(model, [text]))).logits[0].log_softmax(-1)
    hook.remove()
    return out


def first_tokens(model, item):
    "The token that each choice starts with."
    n = len(encode(model, [item.prompt])[0])
    return [encode(model, [item.prompt + c])[0][n] for c in item.choices]


def loop(model, task, texts, vectors):
    "Chosen answers and mean KL for every vector, the plain way."
    first, base, out = [first_tokens(model, i) for i in task.items], {}, []
    for v in (None, *vectors):
        chosen, kl = [], []
        for item, ids in zip(task.items, first, strict=True):
            chosen.append(int(logp(model, item.prompt, v)[-1][ids].argmax()) == item.target)
        for n, text in enumerate(texts):
            q = logp(model, text, v)[-KEEP - 1 : -1]
            base.setdefault(n, q)
            lost = torch.nn.functional.kl_div(q, base[n], reduction="none", log_target=True)
            kl.append(lost.sum(-1).mean().item())
        out.append((np.array(chosen), float(np.mean(kl))))
    return out


def ours(model, task, texts, vectors):
    bench = Bench(model, LAYER, task, Corpus("neutral", texts))
    changes = [None, *(adding(v) for v in vectors)]
    answers, damages = bench.ask(changes), bench.hurt(changes)
    return [(a.chosen, float(d.kl[:, -KEEP:].mean())) for a, d in zip(answers, damages, strict=True)]


class Counted(TorchDispatchMode):
    "Within: floating-point operations of matrix products are counted."

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


def check(got):
    for (c1, k1), (c2, k2) in zip(got["loop"], got["ours"], strict=True):
        if (c1 != c2).mean() > 0.05 or abs(k1 - k2) > 1e-3 + 0.01 * k1:
            wrong = f"{(c1 != c2).sum()} items, KL {k1:.4f} and {k2:.4f}"
            raise SystemExit(f"answers differ ({wrong}): the comparison is void")


def main():
    a = arguments(items=24, arms=6)
    _, target = (load_model(n) for n in NAMES)
    task, texts = load_task("emotions/happiness").take(a.items), load_corpus("neutral").texts[:32]
    pairs, other = load_pairs("emotions/happiness"), load_pairs("emotions/sadness")
    joy = place(extract_concept(target, pairs, [LAYER]), target, LAYER, dose=0.05)
    vectors = [joy.vector(s) for s in np.linspace(0.5, 2, a.arms)]
    # a bench reports damage on the second half of its texts
    jobs = {
        "loop": partial(loop, target, task, texts[16:], vectors),
        "ours": partial(ours, target, task, texts, vectors),
    }
    times, ratios = interleave(jobs, {"vs_loop": over("loop", "ours")}, a, check, warm=False)
    with Counted() as counted:
        whole = seconds(partial(evaluate, joy, load_task("emotions/happiness"), pairs=pairs, other=other))
    with fast_matmul(CPU):
        products = counted.flops / rate(1024, 640, 2048, torch.float32)
    times |= {"full evidence": [whole], "its matrix products": [products]}
    note = (
        f"{a.items} items, {len(texts) // 2} neutral texts, {a.arms} directions and the base model; "
        "the same answers both ways."
    )
    report("Evidence", times, ratios | {"seconds": whole, "vs_products": whole / products}, a, [note])


if __name__ == "__main__":
    main()
