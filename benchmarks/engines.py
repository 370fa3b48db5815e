"""Exported transplants in the engines that serve them: how far log-probabilities are from ours, and what
steering costs there, as ratios of throughput in interleaved rounds.

    python benchmarks/engines.py [--json] [--minutes 5] [--within 5] [--requests 16] [--words 32] [--tiny 0]

The engines are those that `make test-engines` installs (CONCEPT_TRANSFER_ENGINES names their folder); what
is not installed has no rows. Both embedded models, two concepts each, a dozen prompts, four strengths.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from shared import NAMES, arguments, interleave, report

from concept_transfer import export as room
from concept_transfer.concepts import activations
from concept_transfer.data import load_corpus, load_pairs
from concept_transfer.engine import encode
from concept_transfer.export import COMPARED, FORMATS, NotCompared, answers, serving, write_target
from concept_transfer.models import load_model, tiny_model
from concept_transfer.steering import place
from concept_transfer.zoo import quiet

HOME = Path(os.environ.get("CONCEPT_TRANSFER_ENGINES", "nowhere"))
CONCEPTS = ("happiness", "sadness")
WIDE = dict(
    hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32
)  # vLLM wants such heads
TINY = {"llama": WIDE, "gemma3_text": WIDE | {"query_pre_attn_scalar": 32}}
SERVED = {"gguf": "llama.cpp", "vllm": "vllm"}  # formats of a server; the others run in transformers
ALONE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
VLLM = "--dtype float32 --max-model-len 128 --no-enable-prefix-caching".split()
VLLM += ["--kv-cache-memory-bytes", 1 << 30]
LLAMA = "--device none -np 4 -c 1024 -ctk f32 -ctv f32 -fa off -t 1".split()


def models(tiny):
    if tiny:
        return [tiny_model(family, **config) for family, config in TINY.items()]
    return [load_model(name) for name in NAMES]


def carried(model, emotion):
    "A direction of the model's own, from a few pairs."
    pairs, layer = load_pairs(f"emotions/{emotion}"), 2 * len(model.layers) // 3
    read = partial(activations, model, layers=[layer])
    v = read(pairs.positive[:8])[:, 0].mean(0) - read(pairs.negative[:8])[:, 0].mean(0)
    return place(v, model, layer, dose=0.07, name=emotion)


def unsteered():
    "Within: servers are started as they would be without us, and asked for the same."
    was = room.server_command

    def without(*asked):
        command, _, ask = was(*asked)
        if (option := "--control-vector-scaled") in command:
            at = command.index(option)
            del command[at : at + 2]
        ask.pop("vllm_xargs", None)
        return command, {}, ask

    return patch.object(room, "server_command", without)


def apart(x, y) -> float:
    return (x - y).abs().max().item()


def says(way, t, folder):
    "The engine of a format, and its log-probabilities by strength."
    file = Path(folder, t.name)
    way.write(t, file)
    who, found = way.ask(t, file)
    return who, {s: logp for s, (logp, _) in found.items()}


def differences(formats, tiny):
    """Rows: engine, model, concept, differences from ours by strength, at 0 from the engine's own base, how
    far strength 1 moves it, tolerance."""
    for model in models(tiny):
        bases: dict = {}
        for t in (carried(model, name) for name in CONCEPTS):
            ours = {s: logp for s, (logp, _) in answers(t).items()}
            for to, way in ((k, FORMATS[k]) for k in formats):
                if way.families and t.target.family not in way.families:
                    continue
                try:
                    with TemporaryDirectory() as tmp:
                        who, found = says(way, t, tmp)
                    if to in SERVED and to not in bases:
                        with unsteered(), patch.object(room, "COMPARED", (0.0,)), TemporaryDirectory() as tmp:
                            bases[to] = says(way, t, tmp)[1][0.0]
                except NotCompared as e:
                    print(e, file=sys.stderr)
                    continue
                off = [apart(found[s], ours[s]) for s in COMPARED]
                base, moved = apart(found[0.0], bases.get(to, ours[0.0])), apart(found[1.0], found[0.0])
                if not moved > way.tolerance:
                    raise SystemExit(f"{who} serves unsteered: the comparison is void")
                yield f"{who} ({to})", t.target.name, t.name, *off, base, moved, way.tolerance


def of_lm_eval(tiny):
    "The rows of lm-eval, by the Python that has it."
    python = HOME / "lm-eval" / "bin" / "python"
    if not python.exists():
        print(f"lm-eval is not installed in {python.parents[1]}", file=sys.stderr)
        return []
    command = [python, __file__, "--only_lm_eval", "1", "--tiny", str(tiny)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def asked(client, ask, ids, words, steer):
    "As many requests at once as there are lists of ids, each with its own steering; how many words came."

    def one(x, how):
        more = dict(prompt=x, max_tokens=words, temperature=0, ignore_eos=True, cache_prompt=False)
        said = client.post("/v1/completions", json=ask | more | how).raise_for_status().json()
        return said["usage"]["completion_tokens"]

    with ThreadPoolExecutor(len(ids)) as pool:
        return sum(pool.map(one, ids, steer))


def jobs_of(stack, to, t, folder, requests, words):
    "What is timed in an engine: without us, and steered; in vLLM also with nobody steered, and mixed."
    engine, file, model = SERVED[to], folder / t.name, folder / to
    FORMATS[to].write(t, file)
    if to == "gguf":
        write_target(t.model, model)
    else:
        with quiet():
            for part in (t.model._module, t.model.tokenizer):
                part.save_pretrained(model)
    texts = load_corpus("neutral").texts[:requests]
    ids, more = encode(t.model, texts, room=words), LLAMA if to == "gguf" else VLLM
    with unsteered():
        plain = stack.enter_context(serving(engine, file, model, None, *more))
    steered = stack.enter_context(serving(engine, file, model, None, *more))
    always = [{}] * requests
    jobs = {engine: partial(asked, *plain, ids, words, always)}
    if to == "gguf":
        return jobs | {f"{engine}, steered": partial(asked, *steered, ids, words, always)}
    client, ask = steered
    ask = {k: v for k, v in ask.items() if k != "vllm_xargs"}
    mixed = [{"vllm_xargs": {"steer": t.name, "strength": s}} for s in (1.0, 2.0, -1.0)]
    kinds = {
        "nobody steered": always,
        "steered": mixed[:1] * requests,
        "mixed": ([*mixed, {}] * requests)[:requests],
    }
    return jobs | {f"{engine}, {k}": partial(asked, client, ask, ids, words, how) for k, how in kinds.items()}


def same_work(got):
    if len(set(got.values())) > 1:
        raise SystemExit(f"not the same number of words: {got}")


def speed(alone, name, seconds):
    return seconds[alone] / seconds[name]


def throughput(a):
    "Seconds of every job, and throughput over that of the same engine without us."
    times, ratios = {}, {}
    for to in SERVED:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            t = carried(models(a.tiny)[0], CONCEPTS[0])
            try:
                jobs = jobs_of(stack, to, t, folder, a.requests, a.words)
            except NotCompared as e:
                print(e, file=sys.stderr)
                continue
            alone, *ours = jobs
            took, found = interleave(jobs, {k: partial(speed, alone, k) for k in ours}, a, same_work)
            times, ratios = times | took, ratios | found
    return times, ratios


def table(rows):
    yield "\nLargest difference of log-probabilities over the vocabulary, in nats, by strength:\n"
    yield "| engine | model | concept | 0 | 1 | 2 | -1 | 0 from its base | moved at 1 | tolerance |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        yield "| " + " | ".join(f"{x:.1e}" if isinstance(x, float) else x for x in row) + " |"
    yield "\nThroughput of requests at once, over that of the same engine without us:"


def main():
    a = arguments(minutes=5, requests=16, words=32, tiny=0, only_lm_eval=0)
    os.environ |= ALONE
    if a.only_lm_eval:
        return print(json.dumps([*differences(["lm-eval"], a.tiny)]))
    rows = [*differences(["gguf", "baked", "vllm"], a.tiny), *of_lm_eval(a.tiny)]
    times, ratios = throughput(a)
    if a.json:
        ratios |= {f"{who} {model} {concept}": max(off) for who, model, concept, *off, _, _, _ in rows}
    report("Engines", times, ratios, a, table(rows))


if __name__ == "__main__":
    main()
