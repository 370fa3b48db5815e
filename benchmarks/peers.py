"""The same concept from the same pairs with repeng and steering-vectors, and steered generation with them.

    python benchmarks/peers.py [--json] [--minutes 6] [--within 5]

The two are installed in .venv-peers, on top of the environment of this package, so that all have the same
torch and transformers, and get a model that nothing is hooked into and the size of batch that suits them
best. Ours gives besides a direction its held-out scores, at every layer. `--minutes` are those of a model in
one precision.

extract:  the better of the two over ours, all in one precision
halved:   the better of the two in float32, which is what both take by themselves, over ours in bfloat16
most:     the better of the two over the bare blocks: the most that `extract` can be
generate: the better of the two over ours
"""

import os
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path

import numpy as np
import torch
from shared import BATCHES, NAMES, PASSIVE, arguments, bare, fastest, interleave, plain, report
from transformers import AutoModelForCausalLM, AutoTokenizer

from concept_transfer.concepts import extract_concept
from concept_transfer.data import load_corpus, load_pairs
from concept_transfer.models import load_model
from concept_transfer.steering import place
from concept_transfer.zoo import fetch

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".venv-peers"
PEERS = ["repeng==0.4.0", "steering-vectors==0.12.2"]
TEXTS = (8, 16, 32, 64)  # in a batch
LAYER, NEW = 12, 24


def environment() -> Path:
    "The Python that has the peers. Raises CalledProcessError where they cannot be installed."
    done, python = HOME / ".installed", HOME / "bin" / "python"
    if not done.is_file() or done.read_text() != str(PEERS):
        subprocess.run([sys.executable, "-m", "venv", "--clear", HOME], check=True)
        (site,) = HOME.glob("lib/python*/site-packages")
        (site / "beside.pth").write_text(f"{ROOT}\n{sysconfig.get_paths()['purelib']}\n")
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, *PEERS], check=True)  # they pin numpy below 2 and transformers below 5
        done.write_text(str(PEERS))
    return python


class Peers:
    "Both packages, with a model of their own."

    def __init__(self, folder, dtype, layer=LAYER):
        np.float_ = np.float64  # which repeng names, and numpy 2 does not
        import repeng
        import steering_vectors

        self.control, self.vectors, self.layer = repeng, steering_vectors, layer
        self.module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token

    def repeng(self, pairs, batch):
        "A direction for each layer, the first component of the differences."
        some, layers = [self.control.DatasetEntry(*x) for x in pairs], range(len(self.module.model.layers))
        train = partial(self.control.ControlVector.train, self.module, self.tokenizer, some)
        return train(hidden_layers=layers, batch_size=batch).directions

    def steering_vectors(self, pairs, batch):
        "A direction for each layer, the difference of means."
        train = partial(self.vectors.train_steering_vector, self.module, self.tokenizer, pairs)
        return train(batch_size=batch).layer_activations

    def written(self, model, prompts):
        given = self.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**given, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)
        return self.tokenizer.batch_decode(out[:, given.input_ids.shape[1] :], skip_special_tokens=True)

    def repeng_writes(self, v, prompts):
        model = self.control.ControlModel(self.module, [self.layer])
        model.set_control(self.control.ControlVector("", {self.layer: v.numpy()}))
        out = self.written(model, prompts)
        model.unwrap()
        return out

    def steering_vectors_writes(self, v, prompts):
        with self.vectors.SteeringVector({self.layer: v.to(self.module.dtype)}).apply(self.module):
            return self.written(self.module, prompts)


def jobs_of(model, peers, pairs, prompts):
    "What is timed, and the size of batch that suits each side best."
    texts = [pairs.template.replace("{}", t) for t in pairs.texts]
    both = [*zip(texts[: len(pairs)], texts[len(pairs) :], strict=True)]
    sizes = {
        "repeng": fastest(partial(peers.repeng, both[::2]), TEXTS),
        "steering-vectors": fastest(partial(peers.steering_vectors, both[::2]), TEXTS),
        "bare forward": fastest(partial(bare, model, texts[::2]), BATCHES),
    }
    placed = place(extract_concept(model, pairs, [peers.layer]), model, peers.layer, dose=0.05)
    v = placed.vector()
    return sizes, {
        "ours": partial(extract_concept, model, pairs),
        "repeng": partial(peers.repeng, both, sizes["repeng"]),
        "steering-vectors": partial(peers.steering_vectors, both, sizes["steering-vectors"]),
        "bare forward": partial(bare, model, texts, sizes["bare forward"]),
        "ours, steered": partial(placed.generate, prompts, 1, NEW, min_new_tokens=NEW),
        "repeng, steered": partial(peers.repeng_writes, v, prompts),
        "steering-vectors, steered": partial(peers.steering_vectors_writes, v, prompts),
        "plain": partial(plain, peers.module, model, prompts, NEW),
    }


def alike(got, exact):
    """Cosines of our directions with theirs, the least of one and the median of the other, and how many
    continuations are the same."""
    ours = got["ours"].directions
    theirs = [torch.stack([*map(torch.as_tensor, got[p].values())]) for p in ("steering-vectors", "repeng")]
    means, parts = (torch.cosine_similarity(ours, x.float()) for x in theirs)  # (L,) each
    if exact and not means.min() > 0.999:
        raise SystemExit(f"directions differ (cosine {means.min():.4f}): the comparison is void")
    same = [
        sum(x.strip() == y.strip() for x, y in zip(got["ours, steered"], got[f"{p}, steered"], strict=True))
        for p in ("repeng", "steering-vectors")
    ]
    return float(means.min()), float(parts.median()), same


def better(t, what=""):
    return min(t[f"repeng{what}"], t[f"steering-vectors{what}"])


WANTED = {
    "extract": lambda t: better(t) / t["ours"],
    "most": lambda t: better(t) / t["bare forward"],
    "generate": lambda t: better(t, ", steered") / t["ours, steered"],
}


def compared(name, dtype, pairs, a):
    "Times, ratios and a line on both, of one model in one precision."
    model, peers, seen = load_model(name, dtype=dtype), Peers(fetch(name), dtype), []
    prompts = [" ".join(t.split()[:12]) for t in load_corpus("neutral").texts[:8]]
    sizes, jobs = jobs_of(model, peers, pairs, prompts)
    exact, wanted = dtype == "float32", WANTED
    if exact:
        half = load_model(name, dtype="bfloat16")
        jobs["ours, bfloat16"] = partial(extract_concept, half, pairs)
        wanted = WANTED | {"halved": lambda t: better(t) / t["ours, bfloat16"]}
    times, ratios = interleave(jobs, wanted, a, lambda got: seen.append(alike(got, exact)), warm=False)
    means, parts, same = seen[-1]
    best = ", ".join(f"{k} {n}" for k, n in sizes.items())
    note = (
        f"{name} in {dtype}: batches of {best}; cosine of our directions with those of steering-vectors at "
        f"least {means:.4f}, with those of repeng {parts:.2f} in the median; of {len(prompts)} continuations "
        f"{same[0]} are those of repeng and {same[1]} those of steering-vectors."
    )
    return times, ratios, note


def main():
    if Path(sys.prefix) != HOME:
        python = environment()
        os.execve(python, [python, *sys.orig_argv[1:]], os.environ | PASSIVE | {"TQDM_DISABLE": "1"})
    a, times, ratios, notes = arguments(minutes=6), {}, {}, []
    pairs = load_pairs("emotions/happiness")
    for dtype in ("float32", "bfloat16"):
        for name in NAMES:
            took, got, note = compared(name, dtype, pairs, a)
            short = name.split("-")[0] + ("" if dtype == "float32" else "_bf16")
            times |= {f"{k}: {short}": x for k, x in took.items()}
            ratios |= {f"{k}_{short}": x for k, x in got.items()}
            notes.append(note)
    report("Peers", times, ratios, a, [f"{len(pairs)} pairs, every layer.", *notes])


if __name__ == "__main__":
    main()
