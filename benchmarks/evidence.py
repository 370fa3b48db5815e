"""Evidence for one concept on the embedded pair.

    python benchmarks/evidence.py [--json] [--items 24] [--arms 6] [--rounds 2]

loop: every text of every arm alone through the whole model with all its logits, steered by a forward hook
ours: the same answers and the same damage from shared states, in batches, with the logits that are needed
seconds: the full evidence for one concept: all arms (20 random directions), dose curves, knowledge
"""
import time
import numpy as np, torch
from concept_transfer.data import load_corpus, load_pairs, load_task
from concept_transfer.evaluation import ChoiceProbe, DamageProbe, evaluate
from concept_transfer.extraction import extract_concept
from concept_transfer.injection import graft
from concept_transfer.models import encode, load_model
from shared import NAMES, arguments, interleave, ratio, report

LAYER, KEEP = 12, 4


def loop(model, task, texts, vectors):
    "Chosen answers and mean KL for every vector, the plain way."
    module, out, base = model._module, [], {}
    def logp(text, v):
        hook = model.layers[LAYER]._module.register_forward_hook(lambda m, i, o: o + v if v is not None else o)
        with torch.no_grad(): lp = module(input_ids=torch.tensor(encode(model, [text]))).logits[0].log_softmax(-1)
        hook.remove(); return lp
    first = [[encode(model, [i.prompt + c])[0][len(encode(model, [i.prompt])[0])] for c in i.choices] for i in task.items]
    for v in (None, *vectors):
        chosen = [int(logp(i.prompt, v)[-1][ids].argmax()) == i.target for i, ids in zip(task.items, first)]; kl = []
        for n, text in enumerate(texts):
            q = logp(text, v)[-KEEP - 1:-1]
            if v is None: base[n] = q
            kl.append(torch.nn.functional.kl_div(q, base[n], reduction="none", log_target=True).sum(-1).mean().item())
        out.append((np.array(chosen), float(np.mean(kl))))
    return out

def ours(model, task, texts, vectors):
    probe, hurt = ChoiceProbe(model, task, LAYER), DamageProbe(model, texts, LAYER, KEEP)
    fns = [None, *((lambda h, v=v: h + v) for v in vectors)]
    return [(probe(fn).chosen, hurt(fn)[0]) for fn in fns]

def main():
    a = arguments(items=24, arms=6, rounds=2); source, target = (load_model(n) for n in NAMES)
    task, texts = load_task("emotions/happiness").take(a.items), load_corpus("neutral").texts[:16]
    joy = graft(extract_concept(target, load_pairs("emotions/happiness"), [LAYER]), target, LAYER, dose=.05)
    vectors = [joy.vector(s) for s in np.linspace(.5, 2, a.arms)]
    def check(got):
        for (c1, k1), (c2, k2) in zip(got["loop"], got["ours"]):
            if (c1 != c2).mean() > .05 or abs(k1 - k2) > 1e-3 + .01 * k1: raise SystemExit(f"answers differ ({(c1 != c2).sum()} items, KL {k1:.4f} and {k2:.4f}): the comparison is void")
    times = interleave({"loop": lambda: loop(target, task, texts, vectors), "ours": lambda: ours(target, task, texts, vectors)}, a.rounds, check, warm=False)
    start = time.perf_counter(); evaluate(joy, load_task("emotions/happiness"), pairs=load_pairs("emotions/happiness"), other=load_pairs("emotions/sadness")); seconds = time.perf_counter() - start
    times["full evidence"] = [seconds]
    report("Evidence", times, {"vs_loop": ratio(times, "loop", "ours"), "seconds": seconds}, a.json, [f"{a.items} items, {len(texts)} neutral texts, {a.arms} directions and the base model; the same answers both ways."])

if __name__ == "__main__": main()
