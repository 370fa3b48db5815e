"""Moments of a target on an NDIF server on this machine, as ratios: bytes and seconds of fetching all its states over those of the moments, and seconds over those of a local target.

    python benchmarks/remote.py [--json] [--texts 1000] [--rounds 1] [--tiny 0]

The server is that of tests/remote (`make test-remote` installs it). Without one, requests are packed, unpacked and run here, and their packed size is counted.
"""
import contextlib, io, sys, tempfile
from functools import partial
from pathlib import Path
import torch, zstandard
from nnsight import CONFIG
from nnsight.schema.request import RequestModel
from concept_transfer import remote
from concept_transfer.data import Corpus, load_corpus
from concept_transfer.extraction import stream
from concept_transfer.models import encode, fetch, load_model, model_info, tiny_model
from concept_transfer.moments import collect
from shared import NAMES, arguments, interleave, ratio, report

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/"tests"/"remote"))
from proxy import Proxy
from stack import missing, ndif_stack


class Counted(remote.Simulated):
    "What a request and its answer would weigh on the wire."
    bytes = 0
    def __call__(self, tracer=None):
        Counted.bytes += len(RequestModel.serialize(tracer, True)); super().__call__(tracer)
    def result(self):
        out = super().result(); buffer = io.BytesIO(); torch.save({k: v for k, v in out.items() if k in ("kept", "extra", "got")}, buffer)
        Counted.bytes += len(zstandard.ZstdCompressor(level=6).compress(buffer.getvalue())); return out

@contextlib.contextmanager
def hosted(folder, limits):
    "The model in `folder` on a server, and a function that gives the bytes since it was last called."
    def since(): n, Counted.bytes = Counted.bytes, 0; return n
    if missing():
        remote.Simulated = Counted; yield load_model(folder, remote=remote.Remote(simulated=True, **limits)), since; return
    size = 2 * sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
    with tempfile.TemporaryDirectory() as logs, Proxy(1) as store, ndif_stack({folder: size}, logs, env={"NDIF_OBJECT_STORE_PUBLIC_URL": store.url}) as stack, Proxy(stack.api) as api:
        store.target = ("127.0.0.1", stack.store); CONFIG.API.HOST = api.url
        def since():
            n = sum(p.sent + p.received for p in (api, store)); api.reset_counts(); store.reset_counts(); return n
        yield load_model(folder, remote=remote.Remote(**limits)), since

def main():
    a = arguments(texts=1000, rounds=1, tiny=0); corpus = Corpus("general", load_corpus("general").texts[:a.texts])
    with tempfile.TemporaryDirectory() as tmp:
        if a.tiny:
            source, m, folder = tiny_model("llama", hidden_size=48, max_position_embeddings=1024), tiny_model("gpt2", n_embd=96, n_layer=16, n_positions=1024), tmp
            m._module.save_pretrained(tmp); m.tokenizer.save_pretrained(tmp)
        else: source, folder = load_model(NAMES[0]), str(fetch(NAMES[1]))
        near, ls, lt = load_model(folder), [2 * len(source.layers) // 3], None; lt = [2 * len(near.layers) // 3]
        with hosted(folder, dict(tokens=1 << 16)) as (far, since):
            since(); moved, ids = {}, encode(near, corpus.texts)
            def counted(name, fn): out = fn(); moved[name] = since(); return out
            def check(got):
                if not (got["remote"].xy - got["local"].xy).abs().max() < 1e-5 * got["local"].xy.abs().max(): raise SystemExit("the moments differ: the comparison is void")
            jobs = {"remote": lambda: collect(source, far, corpus, ls, lt), "all states": lambda: sum(len(rows) for rows, _ in stream(far, ids, range(len(far.layers)), at=[range(len(x)) for x in ids])), "local": lambda: collect(source, near, corpus, ls, lt)}
            times = interleave({k: partial(counted, k, fn) for k, fn in jobs.items()}, a.rounds, check, warm=False)
        states = 4 * sum(map(len, ids)) * len(near.layers) * model_info(near).width
    report("Remote", times, {"bytes_vs_states": moved["all states"] / moved["remote"], "seconds_vs_states": ratio(times, "all states", "remote"), "overhead_vs_local": ratio(times, "remote", "local")}, a.json,
           [f"{len(corpus.texts)} texts, one layer pair, {'loopback server' if not missing() else 'no server, requests packed and unpacked here'}: {moved['remote'] / 1e6:.2f} MB on the wire; all states of the target {moved['all states'] / 1e6:.1f} MB, {states / 1e6:.1f} MB before packing."])

if __name__ == "__main__": main()
