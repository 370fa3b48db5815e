"""Why Gemma in llama.cpp is .01 nats off: GELU is looked up there in a table of float16.

    python benchmarks/gelu.py [--json] [--tiny 0]

A dozen prompts, the log-probabilities of the whole vocabulary after each, the base model. Our own Gemma with
GELU's input and output rounded to float16 is compared with itself without, in float32 and in float64, and
llama.cpp (where `make test-engines` installed it) with both. What float32 and float64 differ in, with that
GELU, is what such a table makes of the last bits of its input: nobody comes closer to that engine.
"""

import sys
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from shared import NAMES, arguments, report

from concept_transfer import export as room
from concept_transfer.export import FORMATS, NotCompared, answers
from concept_transfer.models import load_model, tiny_model
from concept_transfer.steering import place


class Rounded(torch.nn.Module):
    "GELU as llama.cpp has it."

    def forward(self, x):
        y = torch.nn.functional.gelu(x.half().to(x.dtype), approximate="tanh").half().to(x.dtype)
        return torch.where(x.abs() < 10, y, x.clamp_min(0))


@contextmanager
def rounded(model):
    "Within: that GELU in every block."
    parts = [layer.mlp for layer in model._module.model.layers]
    was = [part.act_fn for part in parts]
    try:
        for part in parts:
            part.act_fn = Rounded()
        yield
    finally:
        for part, act in zip(parts, was, strict=True):
            part.act_fn = act


def here(t):
    "Log-probabilities of the base model, without and with that GELU."
    plain, _ = answers(t)[0.0]
    with rounded(t.model):
        return plain, answers(t)[0.0][0]


def there(t):
    "The same of llama.cpp; nothing where it is not installed."
    way = FORMATS["gguf"]
    try:
        with TemporaryDirectory() as tmp:
            way.write(t, f"{tmp}/vector.gguf")
            who, found = way.ask(t, f"{tmp}/vector.gguf")
    except NotCompared as e:
        print(e, file=sys.stderr)
        return {}
    return {who: found[0.0][0]}


def main():
    a = arguments(tiny=0)
    model = tiny_model("gemma3_text") if a.tiny else load_model(NAMES[1])
    width, layer = model._module.config.hidden_size, len(model.layers) // 2
    t = place(torch.ones(width), model, layer, dose=0.05)
    with patch.object(room, "COMPARED", (0.0,)):
        engine = there(t)
        single, single_rounded = here(t)
        model._module.double()
        double, double_rounded = here(t)
    pairs = {
        "float32: GELU in float16 and not": (single_rounded, single),
        "float64: GELU in float16 and not": (double_rounded, double),
        "float32 and float64": (single, double),
        "float32 and float64, GELU in float16": (single_rounded, double_rounded),
    }
    for who, logp in engine.items():
        pairs |= {f"{who} and float32": (logp, single)}
        pairs |= {f"{who} and float32, GELU in float16": (logp, single_rounded)}
    gaps = {k: (x.double() - y.double()).abs() for k, (x, y) in pairs.items()}
    told = {f"{k}, largest": gap.max().item() for k, gap in gaps.items()}
    told |= {f"{k}, mean": gap.mean().item() for k, gap in gaps.items()}
    report("GELU in float16, differences in nats", {}, told, a)


if __name__ == "__main__":
    main()
