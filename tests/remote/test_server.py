"The transplant through a real NDIF server on loopback, and every fault that the way to it can have."

import shutil
import signal
import threading
import time
import urllib.request

import nnsight
import pytest
import torch
from proxy import Fault
from stack import model_key

from concept_transfer import cli, remote
from concept_transfer.arms import Settings
from concept_transfer.concepts import activations, extract_concept
from concept_transfer.data import EMOTIONS, Corpus, load_corpus, load_pairs
from concept_transfer.engine import encode, engine
from concept_transfer.evidence import evaluate
from concept_transfer.maps import fit_maps
from concept_transfer.models import load_model
from concept_transfer.moments import Moments, collect
from concept_transfer.ndif import Ndif
from concept_transfer.remote import Job, Remote
from concept_transfer.selection import choose
from concept_transfer.steering import Transplant, place
from concept_transfer.tasks import load_task

SMOKE = pytest.mark.smoke
pytestmark = pytest.mark.remote
QUICK = Remote(connect=2, read=2, total=60, still=20)  # seconds
SCENES = Corpus("scenes", [x for e in EMOTIONS[:4] for x in load_pairs(f"emotions/{e}").texts])
IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]])
MASK = torch.ones_like(IDS)


def close(a, b, eps=1e-5):
    assert float((a - b).abs().max()) <= eps * max(1.0, float(b.abs().max()))


def covariance(m):
    return m.xy[0, 0] / m.n[0] - torch.einsum("a,lb->alb", m.x[0, 0], m.y[0]) / m.n[0] ** 2


def load(server, family, remote=False):
    return load_model(str(server.folders[family]), remote=remote)


def read(model):
    "States after the second block."
    ((_, (h,)),) = engine(model).states(IDS.tolist(), [1], [range(5)] * 2)  # (10, d)
    return h.view(2, 5, -1)


def transplant(server, source, target):
    "The same script; only `remote=` differs."
    source, target = load(server, "llama", source), load(server, "gpt2", target)
    joy = extract_concept(source, load_pairs("emotions/happiness"))
    maps = fit_maps(source, target, SCENES, [1], [2, 4], template=joy.template)
    t, experiments = place(joy, target, map=maps[1, 2], dose=0.5), ("equal_damage", "equal_norm", "curves")
    settings = Settings(random=1, strengths=(-1.0, 0.0, 1.0))
    task, neutral = load_task("emotions/happiness").take(8), load_corpus("neutral").take(12)
    found = evaluate(t, task, neutral, experiments=experiments, settings=settings)
    return t, found, t.generate(["The cat", "It rained all day and"], max_new_tokens=6), (joy, maps)


@pytest.fixture(scope="module")
def home(server):
    return transplant(server, False, False)


@pytest.mark.parametrize(
    "source, target",
    [pytest.param(False, True, marks=SMOKE), (True, False), (True, Remote(tokens=4000, batch=500))],
    ids=["target", "source", "both"],
)
def test_the_same_transplant(server, home, source, target):
    (a, e, texts, _), (b, f, same, _) = home, transplant(server, source, target)
    close(b.direction, a.direction)
    close(b.shuffled, a.shuffled)
    close(b.vector(1), a.vector(1))
    assert same == texts
    left_out = {"unembedding", "gradient"} if target else set()  # a server gives no gradients
    runs = [x for x in e.runs if x.arm not in left_out]
    for x, y in zip(runs, f.runs, strict=True):
        assert (x.arm, x.experiment, x.draw) == (y.arm, y.experiment, y.draw)
        assert x.answers.get("chosen") == y.answers.get("chosen")
    assert left_out <= {*f.missing}
    for k, arm in e.arms.items():
        if k in left_out:
            continue
        for name in ("logit_shift", "kl", "perplexity_ratio"):
            there, here = getattr(f.arms[k], name), getattr(arm, name)
            assert there is here is None or there == pytest.approx(here, rel=1e-5, abs=1e-5)


def test_layers_and_dose_are_chosen_alike(server, home, distant):
    joy, maps = home[3]
    task, neutral = load_task("emotions/happiness", "tune").take(8), load_corpus("neutral").take(8)
    a, b = (choose(joy, maps, m, task, neutral) for m in (load(server, "gpt2"), distant))
    for x, y in zip(a.notes["search"], b.notes["search"], strict=True):
        assert x["layers"] == y["layers"] and all(
            x[k] == pytest.approx(y[k], rel=1e-5, abs=1e-5) for k in ("margin", "choice_rate", "dose", "kl")
        )


def test_the_command_line_asks_no_server_because_of_a_map(server, home, tmp_path, capsys):
    "A file that was made for a model on a server leads to no connection: the model has to be given by hand."
    joy = home[3][0]
    source, target = load(server, "llama"), load(server, "gpt2", QUICK)
    maps = fit_maps(source, target, SCENES, [1], [2], template=joy.template)
    joy.save(tmp_path / "c")
    maps.save(tmp_path / "m")
    server.api.reset_counts()
    words = f"--concept {tmp_path}/c --map {tmp_path}/m --layers 1:2 --damage .1 --out {tmp_path}/t"
    assert cli.main(["transplant", *words.split()]) == 1
    assert "Load it yourself" in capsys.readouterr().err and not server.api.sent
    place(joy, target, map=maps[1, 2], dose=0.1).save(tmp_path / "t")
    t = Transplant.load(tmp_path / "t", target)
    assert isinstance(engine(t.model), Ndif) and isinstance(t.generate("The cat", max_new_tokens=2), str)


@SMOKE
@pytest.mark.parametrize("texts", [len(SCENES.texts), 120])
def test_a_map_moves_twenty_times_less_than_all_states(server, texts):
    """One layer pair. The sums are as large for any text, so there has to be enough of it: here 5,000 tokens
    are. nbs/studies/remote.ipynb says what a 70B target takes."""
    source, target = load(server, "llama"), load(server, "gpt2", QUICK)
    server.api.reset_counts()
    server.store.reset_counts()
    fit_maps(source, target, Corpus("some", SCENES.texts[:texts]), [2], [8])
    tokens = sum(map(len, encode(target, SCENES.texts[:texts])))
    moved = sum(p.sent + p.received for p in (server.api, server.store))
    states = 4 * len(target.layers) * 64 * tokens
    times = f"all states are {states / 1e6:.1f} MB, {states / moved:.0f} times as many"
    print(f"{tokens} tokens, {moved / 1e6:.2f} MB moved, {times}")
    assert states > 20 * moved


# -- faults
@pytest.fixture(scope="module")
def near(server):
    return load(server, "gpt2")


def patient(f, seconds=90):
    "The server may still be coming back from the fault of an earlier test."
    end = time.monotonic() + seconds
    while True:
        try:
            return f()
        except (OSError, RuntimeError):
            if time.monotonic() > end:
                raise
            time.sleep(1)


@pytest.fixture
def distant(server):
    m = patient(lambda: load(server, "gpt2", QUICK))
    patient(lambda: slow(m, 0))
    return m


def slow(model, seconds, wait=True):
    "A job that takes its time."
    job = engine(model).job(wait)
    with torch.no_grad(), model.trace(input_ids=IDS, attention_mask=MASK, backend=job) as tracer:
        h = (
            model.layers[1].output[0].clone().save()
            if isinstance(model.layers[1].output, tuple)
            else model.layers[1].output.clone().save()
        )
        time.sleep(seconds)
        tracer.stop()
    return job if not wait else h


def timed(limit, f):
    begin = time.monotonic()
    try:
        return f()
    finally:
        assert time.monotonic() - begin < limit


WAY = [
    Fault("reset", "/request"),
    Fault("status", "/request", code=503),
    Fault("cut", "/request", after=20),
    Fault("hang", "/request"),
    Fault("status", "/request", code=429),
    Fault("status", "/response", code=408),
    Fault("reset", "/response"),
    Fault("status", "/response", code=500),
    Fault("cut", "/response", after=30),
    Fault("hang", "/response"),
]
BACK = [Fault("reset"), Fault("status", code=403), Fault("cut", after=500), Fault("freeze", after=500)]


@pytest.mark.parametrize(
    "where, fault",
    [pytest.param("api", f, marks=SMOKE if f.kind == "reset" else ()) for f in WAY]
    + [("store", f) for f in BACK],
    ids=lambda x: (
        x
        if isinstance(x, str)
        else f"{x.kind}{x.path.replace('/', '-')}{x.code if x.kind == 'status' else ''}"
    ),
)
def test_a_bad_line_is_asked_again(server, near, distant, where, fault):
    fault.times = 1
    getattr(server, where).faults = [fault]
    got = timed(30, lambda: read(distant))
    assert fault.times == 0
    close(got, read(near))


def test_a_line_that_stays_bad_ends_in_an_error(server, distant):
    server.api.faults = [Fault("hang", "/request", times=99)]
    with pytest.raises(ConnectionError, match="cannot be reached"):
        timed(20, lambda: read(load(server, "gpt2", Remote(read=1, attempts=3))))


def test_a_result_that_drips_ends_in_an_error(server, distant):
    server.store.faults = [Fault("drip", seconds=0.2, times=99)]
    m = load(server, "gpt2", Remote(total=3))  # one byte after the other, headers too
    with pytest.raises(TimeoutError, match="did not arrive within 3 s"):
        timed(15, lambda: slow(m, 0))


def test_no_server(server, monkeypatch):
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="NDIF_HOST"):
        timed(20, lambda: load(server, "gpt2", True))


@pytest.mark.parametrize("key", ["00000000-0000-0000-0000-000000000000", "nonsense", None])
def test_a_wrong_key(distant, monkeypatch, key):
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", key)
    with pytest.raises(PermissionError, match="NDIF_API_KEY") as e:
        timed(20, lambda: read(distant))
    assert not key or key not in str(e.value)


def test_not_hosted(server, tmp_path):
    shutil.copytree(server.folders["gpt2"], tmp_path / "gone")
    with pytest.raises(ValueError, match="does not host .*; it hosts .*gpt2"):
        timed(20, lambda: load_model(str(tmp_path / "gone"), remote=True))


def test_other_versions(server, distant, monkeypatch, caplog):
    monkeypatch.setattr(remote, "version", lambda p: {"nnsight": "0.7.0"}.get(p, "9.9"))
    load(server, "gpt2", True)
    assert "nnsight" in caplog.text and "here 0.7.0" in caplog.text and caplog.text.count("\n") == 1
    with pytest.raises(ValueError, match="speaks another version"):
        read(distant)


def test_an_error_of_the_block(distant):
    with pytest.raises(RuntimeError, match="out of (bounds|range)|attribute '99'"):
        timed(20, lambda: list(engine(distant).states(IDS.tolist(), [99], [[0], [0]])))


def test_no_weights_are_loaded(distant):
    with pytest.raises(RuntimeError, match="no weights here"), distant.trace(input_ids=IDS):
        distant.layers[0].output.save()


def test_a_long_queue_and_a_long_job(server):
    m = load(server, "gpt2", Remote(total=3))
    first = slow(m, 8, wait=False)
    with pytest.raises(TimeoutError, match="waiting in the queue after 3 s"):
        timed(15, lambda: slow(m, 0))
    with pytest.raises(TimeoutError, match="is not done after 3 s"):
        first.end = 1  # long past
        first.result()
    again = engine(load(server, "gpt2", QUICK)).job(False)
    again.job_id = first.job_id
    assert "h" in again.result()  # taken up by its id


def test_the_servers_own_limit(server):
    with pytest.raises(TimeoutError, match="requests smaller"):
        timed(80, lambda: slow(load(server, "gpt2", Remote(total=80, still=60)), 30))


def during(act, f):
    timer = threading.Timer(1.5, act)
    timer.start()
    try:
        return timed(90, f)
    finally:
        timer.join()


def test_the_line_is_down_for_a_while(server, near, distant):
    def down():
        server.api.refuse()
        server.api.cut()
        time.sleep(2)
        server.api.listen()

    close(during(down, lambda: slow(distant, 4)), read(near))


def test_the_server_restarts(server, near, distant):
    def restart():
        server.stack.stop("api", sig=signal.SIGKILL)
        time.sleep(1)
        server.stack.start_api()

    close(during(restart, lambda: slow(distant, 4)), read(near))


def test_a_job_is_lost(server, near, distant):
    def kill():
        for p in server.stack.processes():
            if "CPUModelActor" in " ".join(p.cmdline()):
                p.kill()

    close(during(kill, lambda: slow(distant, 4)), read(near))


def test_the_server_forgets_a_job(server, near, distant):
    "Whatever its store has of the job is gone: no status and no result until `still`, then it is sent again."
    job = slow(load(server, "gpt2", Remote(total=60, still=3)), 2, wait=False)
    first, end = job.job_id, time.monotonic() + 30
    url = f"http://127.0.0.1:{server.stack.store}/ndif-results/responses/{first}.json"
    who = "Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    signed = {"Authorization": f"AWS4-HMAC-SHA256 {who}"}

    def forget():
        while job.job_id == first and time.monotonic() < end:
            urllib.request.urlopen(
                urllib.request.Request(url, method="DELETE", headers=signed), timeout=9
            ).close()

    thread = threading.Thread(target=forget)
    thread.start()
    got = timed(40, job.result)
    thread.join()
    assert job.sent == 2 and job.job_id != first
    close(got["h"], read(near))


TOLD = [x for e in EMOTIONS for x in load_pairs(f"emotions/{e}").texts]
LIMITS = dict(connect=2, tokens=1500, batch=1500, flight=1)


def stage(what, source, target, path):
    """Reading states, summing there, or bringing rows that are summed here, kept at `path`;
    five jobs or more, one after the other."""
    if what == "reading":
        return activations(target, TOLD[:200], [2], path=path)
    m = collect(source, target, Corpus("told", TOLD), [1] if what == "summing" else [0, 1], [2], path=path)
    return covariance(m)


WHOLE = {}


@pytest.fixture
def whole(server, near, distant):
    "The source; what should come out, and in how many requests."
    if not WHOLE:
        source, far_ = load(server, "llama"), load(server, "gpt2", Remote(total=60, **LIMITS))
        WHOLE["source"] = source
        for w in ("reading", "summing", "bringing"):
            server.api.reset_counts()
            close(stage(w, source, far_, None), here := stage(w, source, near, None))
            WHOLE[w] = here, server.api.paths["/request"][0]
    return WHOLE


def fault(name, server, monkeypatch, gone):
    "What goes wrong, the error it ends in, and how it is put right."
    off = server.api.faults.clear

    def on(**how):
        return lambda: server.api.faults.append(Fault(path="/response", times=99, **how))

    def busy():
        slow(load(server, "gpt2", QUICK), 15, wait=False)

    def other_key():
        monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "nonsense")

    def other_name():
        monkeypatch.setattr(nnsight.TransformersModel, "to_model_key", lambda self: model_key(gone))

    def other_version():
        monkeypatch.setattr(remote, "version", lambda p: "0.7.0")

    def down():
        server.api.refuse()
        server.api.cut()

    return {
        "server down": (down, ConnectionError, server.api.listen),
        "wrong key": (other_key, PermissionError, monkeypatch.undo),
        "not hosted": (other_name, ValueError, monkeypatch.undo),
        "long queue": (busy, TimeoutError, lambda: None),
        "job lost": (on(kind="status", code=404), ConnectionError, off),
        "cut": (on(kind="cut", after=30), ConnectionError, off),
        "time-out": (on(kind="hang"), ConnectionError, off),
        "server restarted": (lambda: server.stack.stop("api"), ConnectionError, server.stack.start_api),
        "other version": (other_version, ValueError, monkeypatch.undo),
    }[name]


@pytest.mark.parametrize("what", ["reading", "summing", "bringing"])
@pytest.mark.parametrize(
    "name",
    [
        "server down",
        "wrong key",
        "not hosted",
        "long queue",
        "job lost",
        "cut",
        "time-out",
        "server restarted",
        "other version",
    ],
)
def test_no_fault_loses_what_is_finished(server, whole, distant, name, what, tmp_path):
    "Two jobs are done, then comes the fault; put right, a rerun does only the rest."
    real, calls, source, (want, requests) = Job.result, [], whole["source"], whole[what]
    attempts = 3 if name == "not hosted" else 1
    total = 4 if name == "long queue" else 60
    slow_to_doubt = {"job lost": 2, "not hosted": 5}  # a refusal may be overwritten by an earlier status
    bad = Remote(read=1, attempts=attempts, total=total, still=slow_to_doubt.get(name, 60), **LIMITS)
    with pytest.MonkeyPatch.context() as mp, pytest.MonkeyPatch.context() as watch:
        act, error, right = fault(name, server, mp, tmp_path / "gone")

        def result(self):
            calls.append(1)
            if len(calls) == 3:
                act()
            return real(self)

        watch.setattr(Job, "result", result)
        with pytest.raises(error):
            timed(40, lambda: stage(what, source, load(server, "gpt2", bad), tmp_path / "kept"))
        right()
    patient(lambda: slow(distant, 0), seconds=300)  # a server that was restarted has to find its models
    # a job that was lost with the server that had it is sent again when nothing is heard of it for a while
    far_ = load(server, "gpt2", Remote(total=180, still=20, **LIMITS))
    server.api.reset_counts()
    close(stage(what, source, far_, tmp_path / "kept"), want)
    assert server.api.paths["/request"][0] <= requests - 2


def test_what_is_finished_is_kept(server, near, tmp_path, monkeypatch):
    "Stopped by the user in the middle, the sums so far and the jobs under way are taken up again."
    source = load(server, "llama")
    patient(lambda: slow(load(server, "gpt2", QUICK), 0))
    target, corpus = load(server, "gpt2", Remote(tokens=4000, flight=2)), SCENES
    whole = collect(source, near, corpus, [1], [2])
    real, calls = Job.result, []

    def stopped(self):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Job, "result", stopped)
    with pytest.raises(KeyboardInterrupt):
        collect(source, target, corpus, [1], [2], path=tmp_path / "m")
    monkeypatch.setattr(Job, "result", real)
    left = Moments.load(tmp_path / "m")
    assert 0 < len(left.seen) < len(whole.seen) and (tmp_path / "m.jobs").is_file()
    server.api.reset_counts()
    again = collect(source, target, corpus, [1], [2], path=tmp_path / "m")
    assert again.seen == whole.seen and not (tmp_path / "m.jobs").exists()
    close(covariance(again), covariance(whole))
    assert server.api.paths.get("/request", [0])[0] < len(corpus.texts) // 100 + 2
