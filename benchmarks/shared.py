"What the benchmarks have in common: interleaved runs, their ratios, and a table."

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

NAMES = ("smollm2-135m-instruct", "gemma-3-270m")


def arguments(**defaults):
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true", help="one object of ratios")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else "unknown processor"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def seconds(job) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def interleave(jobs: dict, rounds: int, check=None, warm: bool = True) -> dict:
    "Seconds of every job in every round, after one warm run of each; `check` sees the results of a round."
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for round in range(rounds + warm):
        got = {}
        for name, job in jobs.items():
            start = time.perf_counter()
            got[name] = job()
            if round >= warm:
                times[name].append(time.perf_counter() - start)
        if check:
            check(got)
    return times


def ratio(times, a, b) -> float:
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


def rate(m, k, n, dtype, runs=12) -> float:
    "Measured FLOP/s of a matrix product (m, k) @ (k, n)."
    a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
    return 2 * m * k * n / min(seconds(lambda: a @ b) for _ in range(runs))


def report(title, times, ratios, as_json, notes=()):
    if as_json:
        print(json.dumps(ratios))
        return
    print(f"## {title}\n\n{machine()}.", *notes, sep="\n")
    print("\n| | median seconds |\n|---|---|")
    for name, values in times.items():
        print(f"| {name} | {statistics.median(values):.2f} |")
    print("\n| ratio | |\n|---|---|")
    for name, value in ratios.items():
        print(f"| {name} | {value:.3g} |")
    print()
