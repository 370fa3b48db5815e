"What the benchmarks have in common: interleaved runs, their ratios, and a table."
import argparse, json, statistics, time
from pathlib import Path
import torch

NAMES = ("smollm2-135m-instruct", "gemma-3-270m")


def arguments(**defaults):
    p = argparse.ArgumentParser(); p.add_argument("--json", action="store_true", help="one object of ratios")
    for k, v in defaults.items(): p.add_argument(f"--{k}", type=int, default=v)
    return p.parse_args()

def machine() -> str:
    info = Path("/proc/cpuinfo")
    names = [l.split(":")[1].strip() for l in info.read_text().splitlines() if l.startswith("model name")] if info.is_file() else []
    return f"{names[0] if names else 'unknown processor'}, {torch.get_num_threads()} threads, torch {torch.__version__}"

def interleave(jobs: dict, rounds: int, check=None, warm: bool = True) -> dict:
    "Seconds of every job in every round, after one warm run of each; `check` sees the results of a round."
    times = {k: [] for k in jobs}
    for r in range(rounds + warm):
        got = {}
        for k, fn in jobs.items():
            start = time.perf_counter(); got[k] = fn()
            if r >= warm: times[k].append(time.perf_counter() - start)
        if check: check(got)
    return times

def ratio(times, a, b) -> float: return statistics.median(x / y for x, y in zip(times[a], times[b]))

def report(title, times, ratios, as_json, notes=()):
    if as_json: print(json.dumps(ratios)); return
    print(f"## {title}\n\n{machine()}.", *notes, sep="\n")
    print("\n| | median seconds |\n|---|---|"); [print(f"| {k} | {statistics.median(v):.2f} |") for k, v in times.items()]
    print("\n| ratio | |\n|---|---|"); [print(f"| {k} | {v:.3g} |") for k, v in ratios.items()]; print()
