"""Mutated artefacts, journals and inputs: each must be read as what it was, or be refused in words.

    python tests/fuzz.py [COUNT]

Case `i` is made by `random.Random(i)`, so one that is printed can be made again. Printed is what was *bare*
(another error than ValueError and OSError, or one that does not name the file) or *silent*
(accepted though it
is not what was written)."""

import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load, save

from concept_transfer.arms import Settings
from concept_transfer.artefacts import Journal, load_artefact, save_fields
from concept_transfer.concepts import Concept, activations, extract_concept
from concept_transfer.data import ContrastPairs, Corpus, load_corpus, load_pairs
from concept_transfer.evidence import evaluate
from concept_transfer.maps import fit_maps
from concept_transfer.models import tiny_model, twin
from concept_transfer.moments import collect
from concept_transfer.steering import Transplant, joined, place
from concept_transfer.tasks import load_task

BLANK = "0" * 64


def head_of(raw):
    "Header of a file of ours."
    n = int.from_bytes(raw[:8], "little")
    return json.loads(json.loads(raw[8 : 8 + n])["__metadata__"]["concept_transfer"])


def sealed(tensors, head, digest=True):
    "A file of these, with a digest that fits, or as format 1 without one."
    head = ({"digest": BLANK} if digest else {"format": 1}) | {k: v for k, v in head.items() if k != "digest"}
    if not digest:
        head["format"] = 1
    text = json.dumps(head)
    raw = save({k: v.clone().contiguous() for k, v in tensors.items()}, {"concept_transfer": text})
    return raw.replace(BLANK.encode(), sha256(raw).hexdigest().encode(), 1) if digest else raw


@dataclass
class Subject:
    "One kind of file: its bytes, how it is read, and what must come out."

    name: str
    raw: bytes
    load: object  # path -> anything
    kind: str  # artefact, journal, states or input


def same(a, b):
    "Whether two objects hold the same."
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    return repr(a) == repr(b)


def content(x):
    "What counts of an artefact."
    return {f.name: getattr(x, f.name) for f in fields(x) if f.compare}


def of_model(target, path):
    return Transplant.load(path, target)


def journal_of(path):
    return Journal(path, "evaluation", {"transplant": "joy", "task": "emotions"})


ROW = '{"text": "%s", "label": "%s"}\n'
INPUTS = {
    "pairs.json": '{"positive": ["We hugged.", "She sang."], "negative": ["We nodded.", "She left."]}',
    "pairs.csv": 'positive,negative,group\nWe hugged.,We nodded.,a\n"She sang, loudly.",She left.,b\n',
    "pairs.jsonl": ROW % ("We hugged.", "positive") + ROW % ("We nodded.", "negative"),
    "corpus.txt": "The kettle sang.\nNobody came.\nIt rained all day.\n",
    "task.json": '{"items": [{"prompt": "It was", "choices": [" warm", " cold"], "target": 0}]}',
}


def subjects(folder):
    "One file of each kind, small."
    a, b = tiny_model("llama", num_hidden_layers=2), tiny_model("gpt2", num_hidden_layers=2)
    pairs = load_pairs("honesty")
    pairs, scenes = (
        ContrastPairs("honesty", pairs.positive[:8], pairs.negative[:8]),
        Corpus("c", load_pairs("emotions/fear").texts[:40]),
    )
    joy, moments = extract_concept(a, pairs, [0, 1]), collect(a, b, scenes, [1], [0], folds=2)
    grid = fit_maps(a, b, scenes, [0, 1], [0, 1])
    made = {"concept": joy, "map": grid, "affine": grid[1, 1], "moments": moments}
    made["transplant"] = place(joy, b, map=grid[1, 1])
    made["places"] = joined([place(joy, b, map=grid[1, k]) for k in (0, 1)])
    out, file = [], folder / "made"
    for name, x in made.items():
        x.save(file)
        read = partial(of_model, b) if isinstance(x, Transplant) else type(x).load
        out.append(Subject(name, file.read_bytes(), read, "artefact"))
    activations(a, pairs.texts[:3], path=folder / "kept states")
    (kept,) = (folder / "kept states").iterdir()
    out.append(Subject("states", kept.read_bytes(), lambda p: load_artefact(p, "states"), "states"))
    journal = journal_of(folder / "kept journal")
    for i in range(4):
        journal.keep({f"arm {i}": {"kl": [i / 7, 0.25], "texts": ["It rained – all day."]}})
    out.append(Subject("journal", journal.path.read_bytes(), lambda p: journal_of(p).done, "journal"))
    for name, text in INPUTS.items():
        read = {"corpus": load_corpus, "task": load_task}.get(name.split(".")[0], load_pairs)
        out.append(Subject(name, text.encode(), read, "input"))
    return out


def bytes_changed(raw, rng):
    "Bytes with something flipped, cut, added, blanked, doubled or replaced."
    i, j = sorted(rng.randrange(len(raw)) for _ in range(2))
    way = rng.choice(["flip", "flip", "flip", "cut", "short", "add", "blank", "double", "noise"])
    if way == "flip":
        return way, raw[:i] + bytes([raw[i] ^ 1 << rng.randrange(8)]) + raw[i + 1 :]
    noise = bytes(rng.randrange(256) for _ in range(min(9, j - i + 1)))
    new = {"cut": raw[:i] + raw[j:], "short": raw[:j], "add": raw[:i] + noise + raw[i:]}
    new |= {"blank": raw[:i] + bytes(j - i) + raw[j:], "double": raw[:j] + raw[i:]}
    return way, (new | {"noise": raw[:i] + noise + raw[i + len(noise) :]})[way]


WRONG = [
    None,
    [],
    {},
    True,
    -1,
    1.5,
    "2",
    "../x",
    10**400,
    1e308,
    [None],
    [[1]],
    {"a": 1},
    float("nan"),
    float("inf"),
]
FREE = {
    *"source source_layer shift_x shift_y shuffled r2 auc deeper_sources deeper_shuffled".split()
}  # or None


def places(x, path=()):
    "Every place in a header, by the keys that lead there."
    for k, v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        yield (*path, k)
        yield from places(v, (*path, k))


def header_changed(raw, rng):
    "A header in which one value is of another type, or not there; it must be refused where types say so."
    head, tensors = head_of(raw), load(raw)
    head.pop("digest")
    digest = rng.random() < 0.5  # else format 1
    where = rng.choice(
        [p for p in places(head) if p[0] not in ("scores", "package", "" if digest else "format")]
    )
    *before, last = where
    on = head
    for k in before:
        on = on[k]
    old, new = on[last], rng.choice(WRONG)
    drop = rng.random() < 0.2
    if drop:
        del on[last]
    else:
        on[last] = new
    known = len(where) == 1 or before[0] not in ("notes", "settings")
    number = {int, float}
    wrong = drop or type(new) is not type(old) and not {type(new), type(old)} <= number or new != new
    wrong |= isinstance(old, int) and type(new) in (int, float) and not 0 <= new < 2**53
    wrong |= isinstance(new, float) and abs(new) == float("inf")
    wrong &= known and not (where[0] in FREE and (new is None or drop or new == [None] or new != new))
    wrong &= isinstance(last, str) or not drop  # a list without its last one may still be one
    wrong &= not (
        drop and last in ("revision", "precision", "sketch", "reply", "settings")
    )  # files of before lack them
    return (
        f"{'drop' if drop else 'set'} {where} {'' if drop else str(new)[:12]}",
        sealed(tensors, head, digest),
        wrong,
    )


def tensors_changed(raw, rng):
    "Tensors of another shape or type, not finite, missing, or one more; all of it must be refused."
    head, tensors = head_of(raw), load(raw)
    k = rng.choice(sorted(tensors))
    v = tensors[k]
    new = {"more": v, "lost": None, "deep": v[None], "char": v.to(torch.int8)}
    if v.ndim:
        new |= {"cut": v[..., :-1], "none": v[..., :0]}
    if v.is_floating_point() and v.numel():
        for name in ("nan", "inf"):
            bad = v.clone()
            bad.view(-1)[rng.randrange(v.numel())] = float(name)
            new[name] = bad
    way = rng.choice(sorted(new))
    if way == "lost":
        del tensors[k]
    else:
        tensors["strange" if way == "more" else k] = new[way]
    free = (way == "lost" and k.endswith("shuffled") and head["kind"] == "transplant") or (
        k == "seen" and way in ("cut", "none")
    )
    free |= (k, way) in (("scale", "inf"), ("held_of", "char"))
    return f"{way} {k}", sealed(tensors, head, rng.random() < 0.5), not free


def mutated(subject, rng):
    "What was done, the bytes, and whether reading them must fail (None: where they hold something else)."
    if subject.kind == "artefact" and rng.random() < 0.6:
        return rng.choice([header_changed, tensors_changed])(subject.raw, rng)
    way, raw = bytes_changed(subject.raw, rng)
    return way, raw, None


def verdict(subject, file, raw, must_fail, want):
    "Nothing where all is well, else what is wrong."
    file.write_bytes(raw)
    try:
        got = subject.load(file)
    except (ValueError, OSError) as e:
        named = file.name.split(".")[0] in str(e)
        return "" if named else f"bare: does not name the file: {type(e).__name__}: {str(e)[:150]}"
    except Exception as e:
        return f"bare: {type(e).__name__}: {str(e)[:150]}"
    if subject.kind == "input" or (must_fail is not None and not must_fail):
        return ""
    if subject.kind == "journal":  # its end may be missing, as of a run that was killed
        fine = all(same(v, want.get(k)) for k, v in got.items())
    else:
        got = content(got) if subject.kind == "artefact" else got
        fine = not must_fail and (raw == subject.raw or same(got, want))
    return "" if fine else "silent"


def fuzz(count, folder, say=print, some=None):
    "Number of bare and silent cases."
    some, bad = some or subjects(folder), 0
    wants = {}
    for s in some:
        (folder / s.name).write_bytes(s.raw)
        got = s.load(folder / s.name)
        wants[s.name] = content(got) if s.kind == "artefact" else got
    for i in range(count):
        rng = random.Random(i)
        s = some[i % len(some)]
        way, raw, must_fail = mutated(s, rng)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            why = verdict(s, folder / s.name, raw, must_fail, wants[s.name])
        if why:
            bad += 1
            say(f"case {i}: {s.name}, {way}: {why}")
    return bad


def flips(count, folder, say=print, some=None):
    "Number of single bits of artefacts, states and journals that can be flipped without being refused."
    missed, some = 0, [s for s in some or subjects(folder) if s.kind != "input"]
    for i in range(count):
        rng, s = random.Random(i), some[i % len(some)]
        k = rng.randrange(len(s.raw))
        file = folder / s.name
        file.write_bytes(s.raw[:k] + bytes([s.raw[k] ^ 1 << rng.randrange(8)]) + s.raw[k + 1 :])
        try:
            s.load(file)
        except ValueError:
            continue
        missed += 1
        say(f"flip {i}: {s.name}, byte {k}: not detected")
    return missed


@dataclass
class Step:
    "Stands for an artefact."

    value: int

    def save(self, path):
        g = torch.Generator().manual_seed(self.value)
        save_fields(Concept("step", torch.randn(2, 400, generator=g), (0, 1), (0.5, 0.5), INFO, 3), path)


INFO = None


def run(folder, n=12):
    "A run that keeps numbers in a journal, and files beside it."
    numbers, files = Journal(folder / "numbers", "run", {"n": n}), Journal(folder / "made_of", "files")
    for i in range(n):
        numbers(
            f"value {i}", lambda i=i: torch.randn(50, generator=torch.Generator().manual_seed(i)).tolist()
        )
        files.artefact(folder / f"{i}.safetensors", str(i), partial(Step, i), Concept.load)


def evaluation():
    "A run that evaluates a transplant on tiny models, and keeps the arms that are done."
    source = tiny_model("qwen2", max_position_embeddings=256)
    target, pairs = twin(source)[0], load_pairs("emotions/happiness")
    scenes, neutral = (Corpus(k, load_corpus(k).texts[:48]) for k in ("general", "neutral"))
    maps = fit_maps(source, target, scenes, [2], [2], template=pairs.template)
    joy = place(extract_concept(source, pairs), target, map=maps[2, 2])
    task, beside = (load_task(f"{k}/happiness").take(6) for k in ("emotions", "wordless"))
    settings = Settings(random=5, damage=0.3, bootstrap=50, readouts=[beside], off=[beside])

    def run(folder):
        journal = folder / "arms.jsonl"
        e = evaluate(joy, task, neutral, settings=settings, path=journal, pairs=pairs)
        e.save(folder / "evidence.json")

    return run


def kills(count, folder, say=print, run=run):
    "Number of runs, killed at a random moment and begun again, whose results differ from one left alone."
    global INFO
    from concept_transfer.models import ModelInfo

    INFO, wrong = ModelInfo("toy", "toy", 2, 400, "aa", "bb"), 0
    whole, rng = folder / "whole", random.Random(0)
    whole.mkdir(parents=True)
    start = time.perf_counter()
    run(whole)
    took = time.perf_counter() - start
    for i in range(count):
        killed = folder / f"killed {i}"
        killed.mkdir()
        pid = os.fork()
        if not pid:
            with suppress(BaseException):
                run(killed)
            os._exit(0)
        time.sleep(rng.random() * took)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        run(killed)
        for f in whole.iterdir():
            if f.read_bytes() != (killed / f.name).read_bytes():
                wrong += 1
                say(f"kill {i}: {f.name} differs")
        if left := [f.name for f in killed.iterdir() if f.name.startswith(".")]:
            say(f"kill {i}: left {left}")
            wrong += 1
    return wrong


def main(argv):
    count = int(argv[1]) if len(argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as d:
        some = subjects(Path(d))
        found = {"mutations": fuzz(count, Path(d), some=some), "flips": flips(300, Path(d), some=some)}
        found["kills"] = kills(20, Path(d) / "files")
        found["kills of evaluations"] = kills(20, Path(d) / "evaluations", run=evaluation())
    print(f"{count} mutations, 300 flips, 20 kills of each kind; wrong: {found}")
    return bool(sum(found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
