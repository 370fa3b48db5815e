"The transplant through a real NDIF server on loopback, and every fault that the way to it can have."
import shutil, signal, threading, time

import nnsight
import pytest
import torch

from concept_transfer import remote
from concept_transfer.alignment import fit_maps
from concept_transfer.data import EMOTIONS, Corpus, load_corpus, load_pairs, load_task
from concept_transfer.evaluation import evaluate
from concept_transfer.extraction import extract_concept
from concept_transfer.injection import graft
from concept_transfer.models import load_model, read
from concept_transfer.moments import Moments, collect
from concept_transfer.remote import Job, Remote
from proxy import Fault

pytestmark = [pytest.mark.remote, pytest.mark.xdist_group("remote")]
QUICK = Remote(connect=2, read=2, total=60, still=20)     # seconds
IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]]); MASK = torch.ones_like(IDS)


def close(a, b, eps=1e-5): assert float((a - b).abs().max()) <= eps * max(1., float(b.abs().max()))

def transplant(server, source, target):
    "The same script; only `remote=` differs."
    source, target = (load_model(str(server.folders[f]), remote=r) for f, r in (("llama", source), ("gpt2", target)))
    corpus = Corpus("scenes", [x for e in EMOTIONS for x in load_pairs(f"emotions/{e}").texts])
    joy = extract_concept(source, load_pairs("emotions/happiness")); maps = fit_maps(source, target, corpus, [1, 2], [2])
    t = graft(joy, target, map=maps[1, 2], dose=.5)
    found = evaluate(t, load_task("emotions/happiness").take(8), load_corpus("neutral").take(12), random=1, strengths=(-1., 0., 1.), knowledge=False)
    return t, found, t.generate(["The cat", "It rained all day and"], max_new_tokens=6)

@pytest.fixture(scope="module")
def home(server): return transplant(server, False, False)

@pytest.mark.parametrize("source, target", [(False, True), (True, False), (True, Remote(tokens=4000, batch=500))], ids=["target", "source", "both"])
def test_the_same_transplant(server, home, source, target):
    (a, e, texts), (b, f, same) = home, transplant(server, source, target)
    close(b.direction, a.direction); close(b.shuffled, a.shuffled); close(b.vector(1), a.vector(1)); assert same == texts
    for k, arm in e.arms.items():
        if not arm.get("reason"): assert f.arms[k]["items"] == arm["items"] and f.arms[k]["logit_shift"] == pytest.approx(arm["logit_shift"], abs=1e-4) and f.arms[k]["kl"] == pytest.approx(arm["kl"], abs=1e-4)


# -- faults
@pytest.fixture(scope="module")
def near(server): return load_model(str(server.folders["gpt2"]))

def patient(f, seconds=90):
    "The server may still be coming back from the fault of an earlier test."
    end = time.monotonic() + seconds
    while True:
        try: return f()
        except (OSError, RuntimeError):
            if time.monotonic() > end: raise
            time.sleep(1)

@pytest.fixture
def distant(server):
    m = patient(lambda: load_model(str(server.folders["gpt2"]), remote=QUICK)); patient(lambda: slow(m, 0))
    return m

def slow(model, seconds, wait=True):
    "A job that takes its time."
    job = remote.backend(model, wait)
    with torch.no_grad(), model.trace(input_ids=IDS, attention_mask=MASK, backend=job) as tracer:
        h = model.layers[1].output[0].clone().save() if isinstance(model.layers[1].output, tuple) else model.layers[1].output.clone().save()
        time.sleep(seconds)
        tracer.stop()
    return job if not wait else h

def timed(limit, f):
    begin = time.monotonic(); out = f(); assert time.monotonic() - begin < limit
    return out

WAY = [Fault("reset", "/request"), Fault("status", "/request", code=503), Fault("cut", "/request", after=20), Fault("hang", "/request"),
       Fault("reset", "/response"), Fault("status", "/response", code=500), Fault("cut", "/response", after=30), Fault("hang", "/response")]
BACK = [Fault("reset"), Fault("status", code=403), Fault("cut", after=500), Fault("freeze", after=500)]

@pytest.mark.parametrize("where, fault", [("api", f) for f in WAY] + [("store", f) for f in BACK], ids=lambda x: x if isinstance(x, str) else f"{x.kind}{x.path.replace('/', '-')}{x.code if x.kind == 'status' else ''}")
def test_a_bad_line_is_asked_again(server, near, distant, where, fault):
    fault.times = 1; getattr(server, where).faults = [fault]
    (got,) = timed(30, lambda: read(distant, IDS, MASK, [1])); assert fault.times == 0
    close(got, read(near, IDS, MASK, [1])[0])

def test_a_line_that_stays_bad_ends_in_an_error(server, distant):
    server.api.faults = [Fault("hang", "/request", times=99)]
    with pytest.raises(ConnectionError, match="cannot be reached"): timed(20, lambda: read(load_model(str(server.folders["gpt2"]), remote=Remote(read=1, attempts=3)), IDS, MASK, [1]))

def test_no_server(server, monkeypatch):
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="NDIF_HOST"): timed(20, lambda: load_model(str(server.folders["gpt2"]), remote=True))

@pytest.mark.parametrize("key", ["00000000-0000-0000-0000-000000000000", "nonsense", None])
def test_a_wrong_key(distant, monkeypatch, key):
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", key)
    with pytest.raises(PermissionError, match="NDIF_API_KEY") as e: timed(20, lambda: read(distant, IDS, MASK, [1]))
    assert not key or key not in str(e.value)

def test_not_hosted(server, tmp_path):
    shutil.copytree(server.folders["gpt2"], tmp_path/"gone")
    with pytest.raises(ValueError, match="does not host .*; it hosts .*gpt2"): timed(20, lambda: load_model(str(tmp_path/"gone"), remote=True))

def test_other_versions(server, distant, monkeypatch, caplog):
    monkeypatch.setattr(remote, "version", lambda p: {"nnsight": "0.7.0"}.get(p, "9.9"))
    load_model(str(server.folders["gpt2"]), remote=True); assert "nnsight" in caplog.text and "here 0.7.0" in caplog.text and caplog.text.count("\n") == 1
    with pytest.raises(ValueError, match="speaks another version"): read(distant, IDS, MASK, [1])

def test_an_error_of_the_block(distant):
    with pytest.raises(RuntimeError, match="out of (bounds|range)"): timed(20, lambda: read(distant, IDS, MASK, [1], at=(torch.tensor([0]), torch.tensor([99]))))

def test_no_weights_are_loaded(distant):
    with pytest.raises(RuntimeError, match="no weights here"):
        with distant.trace(input_ids=IDS):
            distant.layers[0].output.save()

def test_a_long_queue_and_a_long_job(server):
    m = load_model(str(server.folders["gpt2"]), remote=Remote(total=3)); first = slow(m, 8, wait=False)
    with pytest.raises(TimeoutError, match="waiting in the queue after 3 s"): timed(15, lambda: slow(m, 0))
    with pytest.raises(TimeoutError, match="is not done after 3 s"): first.end = 0; first.result()
    again = Job(load_model(str(server.folders["gpt2"]), remote=QUICK)); again.job_id = first.job_id; assert "h" in again.result()      # taken up by its id

def test_the_servers_own_limit(server):
    with pytest.raises(TimeoutError, match="requests smaller"): timed(80, lambda: slow(load_model(str(server.folders["gpt2"]), remote=Remote(total=80, still=60)), 40))


def during(act, f):
    timer = threading.Timer(1.5, act); timer.start()
    try: return timed(90, f)
    finally: timer.join()

def test_the_line_is_down_for_a_while(server, near, distant):
    def down(): server.api.refuse(); server.api.cut(); time.sleep(2); server.api.listen()
    close(during(down, lambda: slow(distant, 4)), read(near, IDS, MASK, [1])[0])

@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL])
def test_the_server_restarts(server, near, distant, sig):
    def restart(): server.stack.stop("api", sig=sig); time.sleep(1); server.stack.start_api()
    close(during(restart, lambda: slow(distant, 4)), read(near, IDS, MASK, [1])[0])

def test_a_job_is_lost(server, near, distant):
    def kill(): [p.kill() for p in server.stack.processes() if "CPUModelActor" in " ".join(p.cmdline())]
    close(during(kill, lambda: slow(distant, 4)), read(near, IDS, MASK, [1])[0])


def test_what_is_finished_is_kept(server, near, tmp_path, monkeypatch):
    "Stopped by the user in the middle, the sums so far and the jobs under way are taken up again."
    source = load_model(str(server.folders["llama"])); patient(lambda: slow(load_model(str(server.folders["gpt2"]), remote=QUICK), 0))
    target = load_model(str(server.folders["gpt2"]), remote=Remote(tokens=4000, flight=2))
    corpus = Corpus("scenes", [x for e in EMOTIONS for x in load_pairs(f"emotions/{e}").texts]); whole = collect(source, near, corpus, [1], [2]); real, calls = Job.result, []
    def stopped(self):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return real(self)
    monkeypatch.setattr(Job, "result", stopped)
    with pytest.raises(KeyboardInterrupt): collect(source, target, corpus, [1], [2], path=tmp_path/"m")
    monkeypatch.setattr(Job, "result", real); left = Moments.load(tmp_path/"m"); assert 0 < len(left.seen) < len(whole.seen) and (tmp_path/"m.jobs").is_file()
    server.api.reset_counts(); again = collect(source, target, corpus, [1], [2], path=tmp_path/"m")
    assert again.seen == whole.seen and not (tmp_path/"m.jobs").exists()
    cov = lambda m: m.xy[0, 0] / m.n[0] - torch.einsum("a,lb->alb", m.x[0, 0], m.y[0]) / m.n[0] ** 2
    close(cov(again), cov(whole)); assert server.api.paths.get("/request", [0])[0] < len(corpus.texts) // 100 + 2
