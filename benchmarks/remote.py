"""Moments of a target on an NDIF server on this machine, as ratios: bytes and seconds of fetching all its
states over those of the moments, and seconds over those of a local target.

    python benchmarks/remote.py [--json] [--texts 1000] [--tiny 0] [--minutes 15] [--within 5]

The server is that of tests/remote (`make test-remote` installs it). Without one, requests are packed,
unpacked and run here, and their packed size is counted.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path

import torch
import zstandard
from nnsight import CONFIG
from nnsight.schema.request import RequestModel
from shared import NAMES, arguments, interleave, over, report

from concept_transfer import remote
from concept_transfer.data import Corpus, load_corpus
from concept_transfer.engine import encode, stream
from concept_transfer.models import load_model, model_info
from concept_transfer.moments import collect
from concept_transfer.toys import tiny_module
from concept_transfer.zoo import fetch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "remote"))
from proxy import Proxy
from stack import missing, ndif_stack

SAVED = ("kept", "extra", "got", "table")  # what the package's requests save


class Counted(remote.Simulated):
    "What a request and its answer would weigh on the wire."

    bytes = 0

    def __call__(self, tracer=None):
        Counted.bytes += len(RequestModel.serialize(tracer, True))
        super().__call__(tracer)

    def result(self):
        out, buffer = super().result(), io.BytesIO()
        torch.save({k: v for k, v in out.items() if k in SAVED}, buffer)
        Counted.bytes += len(zstandard.ZstdCompressor(level=6).compress(buffer.getvalue()))
        return out

    @classmethod
    def since(cls):
        "Bytes since it was last asked."
        n, cls.bytes = cls.bytes, 0
        return n


@contextlib.contextmanager
def simulated(folder, limits):
    "The model in `folder`, asked without a server, and a function that gives the bytes since its last call."
    remote.Simulated = Counted
    yield load_model(folder, remote=remote.Remote(simulated=True, **limits)), Counted.since


@contextlib.contextmanager
def served(folder, limits):
    "The same on a server of this machine."
    size = 2 * sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
    with contextlib.ExitStack() as stack:
        logs = stack.enter_context(tempfile.TemporaryDirectory())
        store = stack.enter_context(Proxy(1))
        env = {"NDIF_OBJECT_STORE_PUBLIC_URL": store.url}
        ndif = stack.enter_context(ndif_stack({folder: size}, logs, env=env))
        api = stack.enter_context(Proxy(ndif.api))
        store.target = ("127.0.0.1", ndif.store)
        CONFIG.API.HOST = api.url

        def since():
            n = sum(p.sent + p.received for p in (api, store))
            api.reset_counts()
            store.reset_counts()
            return n

        yield load_model(folder, remote=remote.Remote(**limits)), since


def models(tiny, tmp):
    "The source, and the folder of the target."
    if not tiny:
        return load_model(NAMES[0]), str(fetch(NAMES[1]))
    for part in tiny_module("gpt2", n_embd=96, n_layer=16, n_positions=1024):
        part.save_pretrained(tmp)
    return load_model(*tiny_module("llama", hidden_size=48, max_position_embeddings=1024)), tmp


def check(got):
    a, b = got["remote"].xy, got["local"].xy
    if not (a - b).abs().max() < 1e-5 * b.abs().max():
        raise SystemExit("the moments differ: the comparison is void")


def main():
    a, moved = arguments(texts=1000, tiny=0), {}
    corpus = Corpus("general", load_corpus("general").texts[: a.texts])
    hosted, where = (
        (simulated, "no server, requests packed and unpacked here")
        if missing()
        else (served, "loopback server")
    )
    with tempfile.TemporaryDirectory() as tmp:
        source, folder = models(a.tiny, tmp)
        near = load_model(folder)
        layers = [[2 * len(m.layers) // 3] for m in (source, near)]
        ids = encode(near, corpus.texts)
        with hosted(folder, dict(tokens=1 << 16)) as (far, since):
            since()

            def counted(name, job):
                def run():
                    out = job()
                    moved[name] = since()
                    return out

                return run

            def all_states():
                at = [range(len(x)) for x in ids]
                return sum(len(rows) for rows, _ in stream(far, ids, range(len(far.layers)), at=at))

            jobs = {
                "remote": counted("remote", lambda: collect(source, far, corpus, *layers)),
                "all states": counted("all states", all_states),
                "local": counted("local", lambda: collect(source, near, corpus, *layers)),
            }
            wanted = {
                "seconds_vs_states": over("all states", "remote"),
                "overhead_vs_local": over("remote", "local"),
            }
            times, ratios = interleave(jobs, wanted, a, check, warm=False)
        states = 4 * sum(map(len, ids)) * len(near.layers) * model_info(near).width
    ratios = {"bytes_vs_states": moved["all states"] / moved["remote"]} | ratios
    note = (
        f"{len(corpus.texts)} texts, one layer pair, {where}: {moved['remote'] / 1e6:.2f} MB on the wire; "
        f"all states of the target {moved['all states'] / 1e6:.1f} MB, {states / 1e6:.1f} MB before packing."
    )
    report("Remote", times, ratios, a, [note])


if __name__ == "__main__":
    main()
