"""What the benchmarks have in common: rounds until their ratios are known, the load of the machine, tables.

    python benchmarks/shared.py PART RESULTS

puts the tables of one file into another, in the place of those of the same processor and title."""

import argparse
import itertools
import json
import os
import platform
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import torch
from scipy.stats import bootstrap

from concept_transfer.engine import encode, fast_matmul, length_batches, pad

NAMES = ("smollm2-135m-instruct", "gemma-3-270m")
CPU = torch.device("cpu")
BATCHES = (256, 512, 1024, 2048)  # padded tokens
SURE = 6  # the range of so many rounds holds the median with 97 %, that of five with 94
BUSY = 0.05  # share of the processors
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}  # a thread that spins takes time from whatever comes next


def spent():
    "Seconds so far: of the clock, of idle processors, of this process with those that it started."
    me, times = psutil.Process(), psutil.cpu_times()
    own = sum(sum(p.cpu_times()[:4]) for p in (me, *me.children(recursive=True)))
    return np.array([time.perf_counter(), times.idle + getattr(times, "iowait", 0), own])


def others(since) -> float:
    "Share of the processors that other work has taken since then (what `spent` gave)."
    clock, idle, own = spent() - since
    return max(0.0, 1 - (idle + own) / (clock * psutil.cpu_count()))


def arguments(minutes=15, **defaults):
    "The command line, in a process whose threads do not spin, and the load of the machine before it begins."
    if os.environ.get("OMP_WAIT_POLICY") != "PASSIVE":  # which is read while torch is loaded
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | PASSIVE)
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true", help="one object of ratios")
    parser.add_argument("--minutes", type=float, default=minutes, help="after which no round begins")
    parser.add_argument("--within", type=float, default=5, help="percent about a ratio that are close enough")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    a, begun = parser.parse_args(), spent()
    time.sleep(1)
    a.before, a.begun = others(begun), spent()
    if a.before > BUSY:
        print(f"WARNING: other work takes {a.before:.0%} of the processors; stop it first.", file=sys.stderr)
    return a


def seconds(job) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Found:
    "The median of some rounds, and its interval."

    value: float
    low: float
    high: float
    rounds: int

    def span(self, form: str) -> str:
        return f"{self.low:{form}} to {self.high:{form}}" if self.rounds > 1 else "one round"

    def close(self, within):
        "Whether it is known within so many percent; a number below 1 within so many hundredths."
        return self.rounds >= SURE and self.high - self.low <= within / 50 * max(1, abs(self.value))


def found(x: Sequence[float]) -> Found:
    "Median with a 95 % interval (bootstrap over rounds), with their range where those are too few for one."
    low, high = min(x), max(x)
    if len(x) >= SURE and low < high:
        low, high = bootstrap((x,), np.median, method="percentile", rng=0).confidence_interval
    return Found(float(np.median(x)), float(low), float(high), len(x))


def over(a: str, b: str) -> Callable:
    "Of the seconds of a round, those of one job over those of another."
    return lambda t: t[a] / t[b]


def interleave(jobs: dict, wanted: dict[str, Callable], a, check=None, warm: bool = True):
    """Seconds of every job in every round, and what is wanted of them, each a function of a round's seconds.

    A round does all jobs, in an order of its own; after a warm one there are so many that everything wanted
    lies in a narrow interval, or the time is up. `check` sees the results of a round."""
    until, rounds = time.perf_counter() + 60 * a.minutes, []
    for n in itertools.count():
        took, got = {}, {}
        for name in random.Random(n).sample([*jobs], len(jobs)):
            start = time.perf_counter()
            got[name] = jobs[name]()
            took[name] = time.perf_counter() - start
        if check:
            check(got)
        if n or not warm:
            rounds.append(took)
            numbers = {k: found([f(r) for r in rounds]) for k, f in wanted.items()}
            if time.perf_counter() > until or all(x.close(a.within) for x in numbers.values()):
                return {name: [r[name] for r in rounds] for name in jobs}, numbers


def fastest(job: Callable, options: Sequence):
    "The option with which a job takes least, in the better of two tries."
    tries = [(seconds(lambda x=x: job(x)), x) for x in (*options, *reversed(options))]
    return min(tries)[1]


def bare(model, texts, batch_tokens):
    "The blocks alone, without a head: the least that reading a text takes."
    ids = encode(model, texts)
    with torch.no_grad(), fast_matmul(CPU):
        for rows in length_batches(ids, batch_tokens):
            x, mask = pad(model, [ids[i] for i in rows])
            model._module.base_model(input_ids=x, attention_mask=mask, use_cache=False)


def plain(module, model, prompts, new):
    "Greedy generation by a module that nothing is hooked into: of ours there is but the batch."
    ids, mask = pad(model, encode(model, prompts), left=True)
    exactly = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
    with torch.no_grad(), fast_matmul(CPU):
        out = module.generate(input_ids=ids, attention_mask=mask, **exactly)
    return model.tokenizer.batch_decode(out[:, ids.shape[1] :])


def rate(m, k, n, dtype, runs=12) -> float:
    "Measured FLOP/s of a matrix product (m, k) @ (k, n)."
    a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
    return 2 * m * k * n / min(seconds(lambda: a @ b) for _ in range(runs))


def held(name: str) -> int:
    return 1024 * int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak(job: Callable) -> int:
    "Bytes that a job takes at most, over what was held before; it needs Linux, and a process of its own."
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of what was before
    start = held("VmRSS")
    job()
    return held("VmHWM") - start


def apart(function: Callable, *given):
    "What a function returns in a new process."
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "concept_transfer.evidence"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *given).result()


def processor() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    kind = next((f" with {k}" for k in ("amx_bf16", "avx512_bf16") if k in text.split()), "")
    return f"{name[1] if name else platform.machine()}{kind}, {torch.get_num_threads()} threads"


def ratio_row(name, x) -> str:
    if not isinstance(x, Found):
        return f"| {name} | {x:.3g} | | |"
    return f"| {name} | {x.value:.3g} | {x.span('.3g')} | {x.rounds} |"


def report(title, times, ratios, a, notes=()):
    "Ratios, each `Found` or a number, as the command line wants them."
    if a.json:
        print(json.dumps({k: x.value if isinstance(x, Found) else x for k, x in ratios.items()}))
        return
    load = f"other work took {a.before:.0%} of the processors before and {others(a.begun):.0%} meanwhile"
    print(f"## {processor()}\n\n### {title}\n\ntorch {torch.__version__}; {load}.", *notes, sep="\n")
    if times:
        print("\n| | median seconds | least to most |\n|---|---|---|")
    for name, x in times.items():
        print(f"| {name} | {np.median(x):.2f} | {min(x):.2f} to {max(x):.2f} |")
    print(f"\n| ratio | median | 95 % interval, of fewer than {SURE} rounds their range | rounds |")
    print("|---|---|---|---|")
    print(*(ratio_row(k, x) for k, x in ratios.items()), sep="\n", end="\n\n")


def tables(text: str) -> dict[str, dict[str, str]]:
    "The tables of each processor by their headings."
    out: dict[str, dict[str, str]] = {}
    for part in re.split(r"^## ", text, flags=re.M)[1:]:
        name, *some = re.split(r"^### ", part, flags=re.M)
        own = out.setdefault(name.strip(), {})
        own |= {t.split("\n", 1)[0]: t.strip() for t in some}
    return out


def main(part: Path, results: Path):
    kept = tables(results.read_text()) if results.is_file() else {}
    for name, some in tables(part.read_text()).items():
        kept[name] = kept.get(name, {}) | some
    text = [f"## {name}\n\n" + "".join(f"### {t}\n\n" for t in some.values()) for name, some in kept.items()]
    results.write_text("".join(text))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
