"""A rollout, its log and its monitor: what they cost a request, and how often they are wrong or late.

    python benchmarks/rollout.py [--json] [--requests 10000] [--runs 1000] [--weeks 1000]
        [--minutes 5] [--within 5]

Nothing is generated: answers and their numbers are drawn, so that what is measured is what stands around a
model. `overhead_ms`: milliseconds a request of rollout, log and monitor; `bytes`: of the log a
request; `wrong_aa`: the largest share of A/A rollouts that ever claim a difference, without which none stops
or advances; `wrong_limit`: that of rollouts that do just the damage that is allowed and ever say otherwise;
`units_vs_fixed`: units until a difference is found in the median run over those of a test of one look with a
power of .8; `false_a_week`: false alarms in a quiet week; `delay`: requests from a doubled damage to its
alarm, median.
"""

import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from river.drift import PageHinkley
from scipy.special import logsumexp
from shared import arguments, interleave, report

from concept_transfer.models import load_model
from concept_transfer.monitor import Monitor, watched
from concept_transfer.rollout import STAKES, Course, Rollout, Stop
from concept_transfer.steering import place
from concept_transfer.toys import tiny_module
from concept_transfer.uselog import Answer, UseLog, audit, read_log, used

STOP = Stop("good", "bad", limit=0.1)
SHARES = (0.01, 0.05, 0.25, 0.5)
ALPHA = STOP.alpha / 4  # of each score in the first tests of a rollout


def capital(arm, x, chance, d=0.0):
    "Log of the capital against a difference, after each unit (n,), as `Difference` has it."
    k = np.arange(1, len(x) + 1)
    guess = np.r_[0.5, (x.cumsum() + 0.5)[:-1] / k[1:]]
    z = (x - guess) * (arm - chance) / (chance * (1 - chance))
    stakes = STAKES[:, None] / (1 + 1 / min(chance, 1 - chance))
    return logsumexp(np.log1p(stakes * (z - d)).cumsum(1), axis=0) - np.log(len(STAKES))


def first_claim(rng, chance, on, off, n, alpha, d=0.0):
    "After how many units a difference of `d` is said to be wrong; infinity for never."
    arm = rng.random(n) < chance
    found = capital(arm, (rng.random(n) < np.where(arm, on, off)).astype(float), chance, d) > -np.log(alpha)
    return found.argmax() + 1 if found.any() else np.inf


def check_capital(n=300, share=25):
    "The formula claims a difference when the rollout itself does, and neither sooner nor later."
    rng, course = np.random.default_rng(0), Course(STOP)
    course.take({"event": "plan", "share": share})
    arm, claimed = rng.random(n) < share / 100, []
    x = (rng.random(n) < np.where(arm, 0.7, 0.4)).astype(float)
    for k in range(n):
        row = {"event": "request", "unit": k, "arm": "on" if arm[k] else "off", "share": share}
        course.take(row | {"scores": {"good": x[k], "bad": 0.0}})
        low, high = course.look()["effect"]
        claimed.append(not low < 0 < high)
    ours = capital(arm, x, share / 100) > -np.log(ALPHA)
    apart = abs(int(ours.argmax()) - claimed.index(True))  # ends are rounded outwards
    if not ours.any() or apart > n / 20:
        raise SystemExit("the formula is not that of the class: the simulation is void")


def wrong_claims(runs, n=2000):
    """By share: how many rollouts without any difference ever claim one, of two scores, at any unit; and how
    many whose damage is just what is allowed ever say that it is more or less."""
    rng, found = np.random.default_rng(0), {}
    for share in SHARES:
        none, limit = [], []
        for _ in range(runs):
            none.append([first_claim(rng, share, p, p, n, ALPHA) for p in (0.4, 0.02)])
            limit.append(first_claim(rng, share, 0.02 + STOP.limit, 0.02, n, ALPHA, STOP.limit))
        found[share] = float(np.isfinite(none).any(1).mean()), float(np.isfinite(limit).mean())
    return found


def powers(runs):
    "Share, rates, units of a fixed test with power .8, found by 1, 2, 3 times as many, median over it."
    rng, rows = np.random.default_rng(1), []
    for share, on, off in (
        (0.5, 0.5, 0.4),
        (0.25, 0.5, 0.4),
        (0.05, 0.5, 0.4),
        (0.5, 0.7, 0.4),
        (0.25, 0.06, 0.02),
    ):
        spread = on * (1 - on) / share + off * (1 - off) / (1 - share)
        fixed = int(np.ceil(spread * (1.96 + 0.8416) ** 2 / (on - off) ** 2))
        at = np.array([first_claim(rng, share, on, off, 4 * fixed, 0.05) for _ in range(runs)])
        by = [float((at <= k * fixed).mean()) for k in (1, 2, 3)]
        rows.append((share, off, on, fixed, *by, float(np.median(at)) / fixed))
    return rows


def drawn(rng, kl=0.1, good=0.7, norm=6.5):
    "What a model would give, as a log has it."
    known = {"norm": [rng.normal(norm, 0.3)] * 2, "projection": [rng.normal(-0.5, 0.2)] * 2}
    scores = {"good": float(rng.random() < good), "bad": float(rng.random() < 0.02)}
    return known | {"kl": rng.gamma(4, kl / 4), "repetition": float(rng.beta(1, 30)), "scores": scores}


def referred(t, rng, n=200):
    "A transplant that knows what is usual."
    seen: dict = {}
    for _ in range(n):
        for name, x in watched(drawn(rng)).items():
            seen.setdefault(name, []).append(x)
    return replace(t, notes={"reference": {k: sorted(x) for k, x in seen.items()}})


def page_hinkley():
    return PageHinkley(min_instances=30, delta=0.05, threshold=15)


KINDS = {
    "damage doubles": {"kl": 0.2},
    "effect halves": {"good": 0.35},
    "target trained on": {"norm": 6.8},
}


def weeks(t, detector, count, seed, **move):
    "Of weeks of 700 requests that change in their middle: false alarms before, requests until the right one."
    early, delays = 0, []
    for k in range(count):
        rng, monitor, delay = np.random.default_rng([seed, k]), Monitor(t, detector), np.inf
        for n in range(700):
            moved = move if n >= 350 else {}
            row = {"event": "request", "n": n, "time": "", "strength": 1.0} | drawn(rng, **moved)
            if found := monitor(row):
                if n < 350 or not move:
                    early += len(found)
                else:
                    delay = n - 350
                    break
        delays.append(delay)
    return early / count, delays


def made(rng, t, prompt, strength, twin):
    "An answer without a model."
    row = drawn(rng)
    known = {k: row[k] for k in ("norm", "projection")} | {"kl": row["kl"] if twin and strength else None}
    return Answer("as good as any other answer could be", [20, 8], seconds=0.0, **known)


def begun(t, folder, monitor=True, name="use.jsonl", **how):
    "A rollout whose scores are drawn."
    rng = np.random.default_rng(2)
    scores = {"good": lambda p, x: float(rng.random() < 0.5), "bad": lambda p, x: float(rng.random() < 0.02)}
    watch = {"watch": Monitor(t)} if monitor else {}
    log = UseLog(Path(folder, name), **how)
    return Rollout(t, log, scores, STOP, answer=partial(made, rng), **watch)


def served(t, folder, kind, count):
    "Requests through a part of it all: seconds of the processor."
    start = time.process_time()
    rng, name = np.random.default_rng(3), f"{time.time_ns()}.jsonl"
    if kind in ("answers alone", "log"):
        log, of = UseLog(Path(folder, name)), used(t)
        for k in range(count):
            got = made(rng, t, "", 1.0, False)
            if kind == "log":
                log.request(of, f"user {k}", "", got, scores={"good": 1.0, "bad": 0.0}, arm="on")
    else:
        rollout = begun(t, folder, kind == "log, rollout, monitor", name)
        log = rollout.log
        for k in range(count):
            rollout(f"user {k % 4000}", "What is the way to the harbour?")
    log.close()
    return time.process_time() - start


def killed(t, folder, count, kills=10):
    "A day of requests, killed on the way: how many were answered, and how many of them the log lacks."
    answered, begin = [], 0
    for k in range(kills + 1):
        most = count - begin if k == kills else int(count / (kills + 1))
        read, write = os.pipe()
        if not (child := os.fork()):
            rollout = begun(t, folder, name="day.jsonl")
            for i in range(begin, count):
                rollout(f"user {i % 4000}", "What is the way to the harbour?")
                os.write(write, f"{rollout.log.rows - 1}\n".encode())
            os._exit(0)
        os.close(write)
        with open(read) as said:
            mine = [int(next(said)) for _ in range(most)]
            os.kill(child, signal.SIGKILL)
            mine += [int(line) for line in said]
        os.waitpid(child, 0)
        answered += mine
        begin += len(mine)
    path = Path(folder, "day.jsonl")
    rows = {row["n"] for row, _ in read_log(path) if row.get("event") in ("request", "alarm", "share")}
    return path, len(answered), len({*answered} - rows)


def forged(path, times=24):
    "Of so many changes of single lines, how many an audit finds."
    whole, rng, found = path.read_bytes(), np.random.default_rng(4), 0
    lines = whole.splitlines(keepends=True)[-400:]
    head = whole[: len(whole) - len(b"".join(lines))]
    for k in range(times):
        i, some = int(rng.integers(1, len(lines) - 2)), [*lines]
        if k % 4 == 0:
            at = int(rng.integers(50, len(some[i]) - 3))
            some[i] = some[i][:at] + bytes([some[i][at] ^ 1]) + some[i][at + 1 :]
        elif k % 4 == 1:
            del some[i]
        elif k % 4 == 2:
            some[i], some[i + 1] = some[i + 1], some[i]
        else:
            del some[i:]
        path.write_bytes(head + b"".join(some))
        found += bool(audit(path).faults)
    path.write_bytes(whole)
    return found


def listed(numbers, form):
    return ", ".join(f"{k} {x:{form}}" for k, x in numbers.items())


def row_of(share, off, on, fixed, *rest):
    once, twice, thrice, median = rest
    rates = f"{100 * share:g} % | {off:g} | {on:g} | {fixed:,}"
    return f"| {rates} | {once:.0%} | {twice:.0%} | {thrice:.0%} | {median:.2f} |"


def main():
    a = arguments(requests=10_000, runs=1000, weeks=1000, minutes=5)
    torch.set_num_threads(1)
    check_capital()
    t = place(
        torch.randn(48, generator=torch.Generator().manual_seed(0)), load_model(*tiny_module()), 2, norm=5.0
    )
    t = referred(t, np.random.default_rng(0))
    some = max(50, a.requests // 10)
    with tempfile.TemporaryDirectory() as folder:
        kinds = ("answers alone", "log", "log, rollout", "log, rollout, monitor")
        taken: list = []
        jobs = {k: partial(served, t, folder, k, some) for k in kinds}
        wanted = {"overhead_ms": lambda x: 1000 * (x[kinds[-1]] - x[kinds[0]]) / some}
        times, ratios = interleave(jobs, wanted, a, taken.append)
        path, answered, lost = killed(t, folder, a.requests)
        size, whole, found = path.stat().st_size, not audit(path).faults, forged(path)
    ms = {k: 1000 * float(np.median([x[k] for x in taken])) / some for k in kinds}
    wrong, power = wrong_claims(a.runs), powers(max(50, a.runs // 4))
    quiet = {"ADWIN": weeks(t, None, a.weeks, 0), "Page-Hinkley": weeks(t, page_hinkley, a.weeks, 0)}
    late = {
        (kind, name): weeks(t, d, max(20, a.weeks // 10), 1, **move)[1]
        for kind, move in KINDS.items()
        for name, d in (("ADWIN", None), ("Page-Hinkley", page_hinkley))
    }
    ratios |= {
        "bytes": size / answered,
        "wrong_aa": max(none for none, _ in wrong.values()),
        "wrong_limit": max(limit for _, limit in wrong.values()),
        "units_vs_fixed": power[0][-1],
        "false_a_week": quiet["ADWIN"][0],
        "delay": float(np.median(late["damage doubles", "ADWIN"])),
    }
    day = f"{answered:,} requests, killed 10 times on the way: {lost} that were answered are not in the log"
    aa, limit = ({f"{100 * k:g} %": x[i] for k, x in wrong.items()} for i in (0, 1))
    notes = [
        f"Without generation, {some} requests a run. Milliseconds of the processor: {listed(ms, '.2f')}.",
        f"{day}, which is {'whole' if whole else 'NOT whole'} and {size / 1e6:.1f} MB.",
        f"Of 24 forgeries (a bit, a line removed, two swapped, the end cut off) {found} were found.",
        f"{a.runs:,} A/A rollouts of 2,000 units, two scores, a look after each unit; ever wrong, by share:",
        f"{listed(aa, '.1%')}. As many whose damage is just what is allowed, and which say that it is not:",
        f"{listed(limit, '.1%')}.",
        f"{a.weeks:,} quiet weeks of 700 requests and six numbers; false alarms a week:",
        f"{listed({k: x[0] for k, x in quiet.items()}, '.3f')}.",
        "\n| share | off | on | units of a fixed test | found by as many | twice | three times | median |",
        "|---|---|---|---|---|---|---|---|",
        *(row_of(*row) for row in power),
        "\n| what changes in mid-week | detector | median delay, requests | noticed in the week |",
        "|---|---|---|---|",
        *(f"| {k} | {d} | {np.median(x):.0f} | {np.isfinite(x).mean():.0%} |" for (k, d), x in late.items()),
    ]
    report("Rollout", times, ratios, a, notes)


if __name__ == "__main__":
    sys.exit(main())
