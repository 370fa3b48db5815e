"Every stage through requests packed as for a server (nnsight's remote='local'), against the same without."

import asyncio
import contextlib
import gzip
import io
import json
import socket
import threading
import time
import zipfile
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nnsight
import pytest
import torch
import zstandard
from nnsight.schema.request import RequestModel

from concept_transfer import ndif, remote
from concept_transfer.arms import STARTS, Settings
from concept_transfer.concepts import activations, extract_concept
from concept_transfer.data import EMOTIONS, Corpus, load_corpus, load_pairs
from concept_transfer.engine import engine, wrapped
from concept_transfer.evidence import evaluate, evaluate_text, off_target
from concept_transfer.maps import fit_maps
from concept_transfer.measure import Bench, choices, neutral_text
from concept_transfer.models import load_model, model_info, tiny_model
from concept_transfer.moments import Moments, collect, robust_weight
from concept_transfer.ndif import Ndif, planes, served_mark, unplaned
from concept_transfer.remote import Job, Remote, hosted
from concept_transfer.selection import transplant
from concept_transfer.steering import Transplant, adding, generate, place
from concept_transfer.tasks import generation_task, load_task

SMALL = Remote(simulated=True, tokens=1500, batch=300, flight=2)


@pytest.fixture(scope="module")
def near():
    return tiny_model("llama", max_position_embeddings=512), tiny_model("gpt2", seed=3, n_positions=512)


@pytest.fixture(scope="module")
def distant(near):
    return tuple(load_model(m, remote=SMALL) for m in near)


def scenes(emotions, n=None):
    return Corpus("scenes", [x for e in emotions for x in load_pairs(f"emotions/{e}").texts][:n])


@pytest.fixture(scope="module")
def corpus():
    return scenes(("fear", "anger"), 160)


def close(a, b, eps=1e-5):
    assert float((a - b).abs().max()) <= eps * max(1.0, float(b.abs().max()))


def covariance(m):
    return m.xy[0, 0] / m.n[0] - torch.einsum("a,lb->alb", m.x[0, 0], m.y[0]) / m.n[0] ** 2


def failing_at(number, calls):
    "`Simulated.result`, which fails when it is called for this time."
    real = remote.Simulated.result

    def result(self):
        calls.append(1)
        if len(calls) == number:
            raise ConnectionError("the line is down")
        return real(self)

    return result


@pytest.mark.parametrize("position", ["last", "mean", "all"])
def test_activations(near, distant, position):
    texts = ["Rain.", "The cat sat on the mat.", "We walked home."] * 9
    a, b = (activations(m, texts, [3, 1], position) for m in (near[1], distant[1]))
    for x, y in zip(a, b, strict=True):
        close(y, x)


def test_interrupted_reading_goes_on(near, distant, tmp_path, monkeypatch):
    texts = [f"{x} Number {i}." for i, x in enumerate(load_pairs("emotions/fear").positive)]
    want, calls = activations(near[1], texts, [3]), []
    monkeypatch.setattr(remote.Simulated, "result", failing_at(2, calls))
    with pytest.raises(ConnectionError):
        activations(distant[1], texts, [3], path=tmp_path)
    assert len(list(tmp_path.iterdir())) > 0
    before = len(calls)
    close(activations(distant[1], texts, [3], path=tmp_path), want)
    again = len(calls) - before
    activations(distant[1], texts, [3])
    assert 0 < again < len(calls) - before - again  # fewer jobs than from the start
    before = len(calls)
    close(activations(distant[1], texts, [3], path=tmp_path), want)
    assert len(calls) == before
    with pytest.raises(ValueError, match="cannot be kept"):
        activations(near[1], texts, [3], lambda h: h[0], path=tmp_path)


def transplant_with(source, target, corpus):
    "The README's lines, with whichever models."
    joy = extract_concept(source, load_pairs("emotions/happiness"))
    maps = fit_maps(source, target, corpus, [1, 2], [2], template=joy.template)
    return place(joy, target, map=maps[1, 2], dose=0.5)


@pytest.mark.slow
def test_the_same_transplant_wherever_a_model_runs(near, distant, corpus):
    want, prompts = transplant_with(*near, corpus), ["The cat", "It rained all day and"]
    for source, target in ((near[0], distant[1]), (distant[0], near[1]), distant):
        got = transplant_with(source, target, corpus)
        close(got.direction, want.direction)
        close(got.shuffled, want.shuffled)
        close(got.vector(1), want.vector(1))
        assert got.generate(prompts, max_new_tokens=5) == want.generate(prompts, max_new_tokens=5)
    assert generate(distant[1], "The cat", 4) == generate(near[1], "The cat", 4)


@pytest.mark.slow
def test_the_readme_with_layers_and_dose_chosen(near, distant, corpus):
    joy = extract_concept(near[0], load_pairs("emotions/happiness"))
    task = load_task("emotions/happiness", "tune").take(8)
    neutral = Corpus("some", load_corpus("neutral").texts[:8])
    maps = fit_maps(*near, corpus, [1, 2], [1, 2], template=joy.template)
    a, b = (transplant(joy, maps, m, task, neutral=neutral) for m in (near[1], distant[1]))
    assert (a.source_layer, a.layer, a.positions) == (b.source_layer, b.layer, b.positions)
    assert a.dose == pytest.approx(b.dose, rel=1e-3)
    close(b.direction, a.direction)
    for x, y in zip(a.notes["search"], b.notes["search"], strict=True):
        assert x.pop("layers") == y.pop("layers") and x.pop("positions") == y.pop("positions")
        assert x == pytest.approx(y, rel=1e-3, abs=1e-5)
    assert a.notes["texts_read"] <= b.notes["texts_read"]  # here several answers are read in one pass


@pytest.mark.slow
def test_everything_that_is_asked_of_a_transplant(near, distant, monkeypatch):
    monkeypatch.setattr("concept_transfer.arms.load_task", lambda *a: load_task(*a).take(12))
    monkeypatch.setattr("concept_transfer.arms.STARTS", STARTS[:2])
    v = torch.randn(48, generator=torch.Generator().manual_seed(0))
    tests, tune = (load_task("emotions/happiness", s).take(n) for s, n in (("test", 8), ("tune", 4)))
    talk = generation_task("length", ("The cat", "It rained all day and"), lambda x: len(x) / 100)
    neutral = Corpus("some", load_corpus("neutral").texts[:12])
    given = dict(pairs=load_pairs("emotions/happiness"), other=load_pairs("emotions/fear"), source=near[0])
    experiments, found = ("equal_damage", "equal_norm", "knowledge", "texts"), []
    for m in (near[1], distant[1]):
        t = place(v, m, 2, dose=0.5)
        e = evaluate(t, tests, neutral, None, experiments, Settings(random=1), examples=tune, **given)
        moved = off_target([t, replace(t, direction=-v)], [tests, load_task("emotions/fear").take(8)])
        found.append((moved, evaluate_text({"base": None, "steered": t}, talk, m, 5), e))
    ((shift, p), text, e), ((shift2, p2), text2, e2) = found
    assert (shift == shift2).all() and (p == p2).all() and text.equals(text2)
    assert e.capability == e2.capability
    ran = {k for k, a in e2.arms.items() if not a.reason}
    here_alone = {"unembedding", "gradient"}  # a server gives no gradients
    assert set(e.arms) == set(e2.arms) and ran | here_alone == {k for k, a in e.arms.items() if not a.reason}
    assert "logit_bias" in ran and all("not on this machine" in e2.arms[k].reason for k in here_alone)
    assert {"few_shot", "few_shot_rotated", "source", "native", "other_concept", "prompt"} <= ran
    chosen = [
        {(r.arm, r.experiment, r.draw): r.answers["chosen"] for r in x.runs if r.answers and r.arm in ran}
        for x in (e, e2)
    ]
    assert chosen[0] == chosen[1]
    for k in ran:
        for name in ("dose", "logit_shift", "kl", "perplexity_ratio"):
            a, b = getattr(e.arms[k], name), getattr(e2.arms[k], name)
            assert a is b is None or a == pytest.approx(b, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_no_request_is_larger_than_allowed(near, monkeypatch):
    "A direction over many texts goes in several requests, and many directions over few texts too."
    task, texts = load_task("emotions/happiness").take(60), load_corpus("neutral").texts[:60]
    draws = [torch.randn(48, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    fns, sizes = [adding(v) for v in draws], []

    class Counted(remote.Simulated):
        def __call__(self, tracer=None):
            batches = tracer.info.frame.f_locals["batches"]
            sizes.append(sum((len(fs) + (b.plain is not None)) * b.ids.numel() for b, fs in batches))
            super().__call__(tracer)

    monkeypatch.setattr(remote, "Simulated", Counted)
    m = load_model(near[1], remote=Remote(simulated=True, tokens=2048))
    (ask, local), (hurt, here) = (
        (f(m), f(near[1])) for f in (lambda m: choices(m, 2, task), lambda m: neutral_text(m, 2, texts))
    )
    for some in (fns[:1], fns):
        sizes.clear()
        got = ask(some)
        assert len(sizes) > 2 and max(sizes) <= 2048
        for x, y in zip(got, local(some), strict=True):
            assert (x.chosen == y.chosen).all() and abs(x.margin - y.margin).max() < 1e-4
        sizes.clear()
        got = hurt(some)
        assert len(sizes) > 1 and max(sizes) <= 2048
        for x, y in zip(got, here(some), strict=True):
            assert abs(x.kl - y.kl).max() < 1e-5 and abs(x.lost - y.lost).max() < 1e-4


@pytest.mark.slow
def test_benches_and_dose(near, distant):
    v = torch.randn(48, generator=torch.Generator().manual_seed(0))
    task, neutral = load_task("emotions/happiness").take(6), load_corpus("neutral").take(12)
    one, two = (Bench(m, 2, task, neutral, 0.2) for m in (near[1], distant[1]))
    a, b = (place(v, m, 2, dose=0.5) for m in (near[1], distant[1]))
    changes = [None, adding(a.vector(1)), replace(a, dose=-a.dose, positions="last")]
    for x, y in zip(one.ask(changes) * 2, [*map(two.ask, changes), *two.ask(changes)], strict=True):
        assert (x.chosen == y.chosen).all() and (x.first == y.first).all()
        assert abs(x.margin - y.margin).max() < 1e-4
    for x, y in zip(map(one.hurt, changes), two.hurt(changes), strict=True):
        assert abs(x.kl - y.kl).max() < 1e-5 and abs(x.lost - y.lost).max() < 1e-4
    assert two.at_damage(b).dose == pytest.approx(one.at_damage(a).dose, rel=1e-3)


@pytest.mark.slow
def test_an_interrupted_collection_goes_on(near, distant, tmp_path, monkeypatch):
    corpus, path, calls = scenes(EMOTIONS, 500), tmp_path / "m", []
    whole = collect(near[0], distant[1], corpus, [1], [2])
    monkeypatch.setattr(remote.Simulated, "result", failing_at(2, calls))
    with pytest.raises(ConnectionError):
        collect(near[0], distant[1], corpus, [1], [2], path=path)
    assert 0 < len(Moments.load(path).seen) < len(whole.seen)
    again = collect(near[0], distant[1], corpus, [1], [2], path=path)
    assert again.seen == whole.seen and [p.name for p in tmp_path.iterdir()] == ["m"]
    assert torch.equal(again.n, whole.n)
    close(covariance(again), covariance(whole), 1e-4)


@pytest.mark.slow
def test_rows_come_back_where_rows_are_kept(near, distant, corpus, monkeypatch):
    one, other = (collect(near[0], m, corpus, [1], [1, 2], products=False) for m in (near[1], distant[1]))
    monkeypatch.setattr("concept_transfer.moments.chosen", lambda *a: "rows")
    found = collect(near[0], distant[1], corpus, [1], [1, 2])
    assert (type(found).__name__, type(other).__name__) == ("Rows", "Moments") and found.seen == one.seen
    for m in (found.summed(), other):
        close(covariance(m), covariance(one), 1e-4)


@pytest.mark.parametrize(
    "layers, texts, rows",
    [
        (([1], [2]), 240, True),
        (([1], [0, 2, 3]), 240, False),
        (([1, 2], [2]), 240, True),
        (([1, 2], [1, 2, 3]), 40, True),
    ],
)
@pytest.mark.slow
def test_rows_or_sums_come_back_whichever_is_less(near, distant, layers, texts, rows, monkeypatch):
    "And both give what a model gives that runs here."
    corpus, moved, real = scenes(EMOTIONS, texts), {True: 0, False: 0}, Ndif.planned

    class Counted(remote.Simulated):
        def __call__(self, tracer=None):
            moved[way] += len(RequestModel.serialize(tracer, True))
            super().__call__(tracer)

        def result(self):
            got = super().result()
            assert (not got["kept"]) == way
            torch.save({k: got[k] for k in ("kept", "extra")}, packed := io.BytesIO())
            moved[way] += len(zstandard.compress(packed.getvalue()))
            return got

    def other_way(self, *how):
        plan, bring = real(self, *how)
        return plan, not bring

    monkeypatch.setattr(remote, "Simulated", Counted)
    want = collect(near[0], near[1], corpus, *layers, weight=robust_weight)
    for way in (rows, not rows):
        if way is not rows:
            monkeypatch.setattr(Ndif, "planned", other_way)
        got = collect(near[0], distant[1], corpus, *layers, weight=robust_weight, products=True)
        assert got.seen == want.seen and torch.equal(got.held_of, want.held_of)
        for k in ("n", "x", "y", "xx", "xy", "yy", "squares", "shuffled", "held_x", "held_y"):
            close(getattr(got, k), getattr(want, k))
    assert moved[rows] < moved[not rows]


@pytest.mark.parametrize("shape", [(300, 2, 48), (1, 1, 1), (0, 3, 5)])
def test_bytes_by_weight(shape):
    "Nothing is lost, and of a model in half precision only its own half travels."

    def size(t):
        return len(zstandard.compress(t.numpy().tobytes()))

    Z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    Z.view(-1)[:2] = torch.tensor([float("inf"), -0.0])[: Z.numel()]
    for X in (Z, Z.bfloat16(), Z.half()):
        assert torch.equal(unplaned(planes(X)), X.float())
    assert len(Z) < 300 or size(planes(Z.bfloat16())) < 0.55 * size(planes(Z)) < 0.55 * size(Z)


@pytest.mark.slow
def test_a_job_of_rows_keeps_to_its_bytes(near, monkeypatch):
    "Also where a chunk as large as those for sums would be too much."
    m, sizes, real = (
        load_model(near[1], remote=Remote(simulated=True, size=50_000)),
        [],
        remote.Simulated.result,
    )

    def counted(self):
        got = real(self)
        sizes.append(sum(own.numel() for _, own, _ in got["extra"]))
        return got

    monkeypatch.setattr(remote.Simulated, "result", counted)
    got, want = (collect(near[0], t, scenes(EMOTIONS[:2]), [1, 2], [2]) for t in (m, near[1]))
    assert max(sizes) < 100_000 < sum(sizes) / 10  # a token is four characters by rule of thumb only
    assert got.seen == want.seen and got.n.sum() == want.n.sum()
    close(got.held_y, want.held_y)


@pytest.mark.parametrize("bring", [True, False])
def test_rows_that_are_not_finite_are_named(bring, monkeypatch):
    "Whichever way they would go, and nothing of their job is added."
    a, b = tiny_model("llama"), tiny_model("gpt2", seed=3)
    odd, texts = "The cat sat on the mat, and left.", [f"It rained {i} times." for i in range(300)]
    token = (set(b.tokenizer(odd).input_ids) - {x for ids in b.tokenizer(texts).input_ids for x in ids}).pop()
    far = load_model(b, remote=SMALL)
    b._module.get_input_embeddings().weight.data[token] = float("nan")  # with it, loading is refused
    real = Ndif.planned
    monkeypatch.setattr(Ndif, "planned", lambda self, *how: (real(self, *how)[0], bring))
    with pytest.raises(
        ValueError, match="'The cat sat on the mat, and left.' gives states that are not finite"
    ):
        collect(a, far, Corpus("some", [*texts, odd]), [1], [2])


def test_what_is_too_much_for_the_server_is_halved(near, monkeypatch):
    "Batches first, then texts; an error that says something else is an error."
    texts, m = [f"It rained {i} times." for i in range(40)], load_model(near[1], remote=SMALL)
    real, asked = remote.Simulated.result, []

    def crowded(self):
        got = real(self)
        asked.append(sum(len(states[0]) for states in got["got"]))
        if asked[-1] > 3:
            raise RuntimeError("CUDA out of memory.")
        return got

    monkeypatch.setattr(remote.Simulated, "result", crowded)
    close(activations(m, texts, [2]), activations(near[1], texts, [2]))
    assert max(asked) > 3 >= min(asked)
    monkeypatch.setattr(ndif, "out_of_memory", lambda e: False)
    with pytest.raises(RuntimeError, match="out of memory"):
        activations(m, texts, [2])


def test_a_model_on_a_server_is_itself(near):
    module, own = near[1]._module, model_info(near[1])
    there = dict(repo_id="org/m", revision=None, dtype="bfloat16", config='{"hidden_size": 48, "dtype": "x"}')

    def hosted_as(**other):
        return replace(own, name="org/m", weights=served_mark(there | other, module))

    a = hosted_as()
    a.require(hosted_as(dtype="float32"), "it")  # precision is not identity
    a.require(replace(own, name="org/m"), "it")  # one that runs here is known by name and shape
    for other in (hosted_as(revision="x"), replace(own, name="org/other"), model_info(near[0])):
        with pytest.raises(ValueError, match="on a server in bfloat16"):
            a.require(other, "it")


@pytest.fixture
def site(monkeypatch):
    """A server on loopback that does what each test wants, at NDIF_HOST and with a key; `heard` has every
    request's path and headers."""

    class Site(BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append((self.path, dict(self.headers)))
            self.answer()

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.do_GET()

        def log_message(self, *a):
            pass

        def say(self, code, body=b"{}", **headers):
            self.send_response(code)
            for k, v in ({"content_length": len(body)} | headers).items():
                self.send_header(k.replace("_", "-"), v)
            self.end_headers()
            self.wfile.write(body)

    heard = Site.heard = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as s:
        threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True).start()
        Site.url = f"http://127.0.0.1:{s.server_port}"
        monkeypatch.setattr(nnsight.CONFIG.API, "HOST", Site.url)
        monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "secret-key")
        yield Site
        s.shutdown()


@pytest.fixture
def ask(site, near, tmp_path):
    "What makes a job that was sent and is asked about."
    folder = str(tmp_path / "asked")
    near[1]._module.config.save_pretrained(folder)
    nnsight.modeling.huggingface._ID_CACHE[folder] = "org/m"  # else nnsight asks the hub for the name
    model = wrapped(folder, near[1].tokenizer)

    def made(limits=Remote(attempts=3, read=5), end=60):  # noqa: B008
        job = Job(model, limits, wait=False)
        job.job_id, job.blob, job.sent, job.end = "1", b"", 1, time.monotonic() + end
        job.model_of = model
        return job

    return made


def test_the_key_is_never_shown(site, ask):
    refused = {400: PermissionError, 401: PermissionError, 403: PermissionError, 422: RuntimeError}
    for code, kind in (refused | {503: ConnectionError}).items():
        why = "Invalid API key format" if code == 400 else "odd"
        said = json.dumps({"detail": f"{why}: secret-key"}).encode()
        site.answer = lambda s, code=code, said=said: s.say(code, said)
        with pytest.raises(kind) as e:
            ask(Remote(attempts=1)).state()
        about_key = kind is PermissionError
        assert "secret" not in str(e.value) and ("NDIF_API_KEY" in str(e.value)) >= about_key
        assert ("***" in str(e.value)) != about_key


def test_the_key_goes_nowhere_else(site, ask):
    other = site.url.replace("127.0.0.1", "localhost")

    def elsewhere(s):
        s.say(200, b"{}") if "elsewhere" in s.path else s.say(307, location=f"{other}/elsewhere")

    site.answer = elsewhere
    for f in (ask().state, hosted):
        with pytest.raises(ConnectionError, match="elsewhere.*Set NDIF_HOST"):
            f()
    assert not any("elsewhere" in p for p, _ in site.heard)
    job = ask()
    job.finalize = lambda b: b
    assert job.saved_values(f"{site.url}/result") == b"{}"  # a result may lie elsewhere: no key goes there
    assert site.heard[-1][0] == "/elsewhere" and not any("secret" in str(h) for p, h in site.heard[-2:])


@pytest.mark.parametrize(
    "code, said, least",
    [
        (429, {"Retry_After": "7"}, 7),
        (429, {"Retry_After": "date"}, 25),
        (429, {}, 0),
        (408, {}, 0),
        (503, {"Retry_After": "7"}, 7),
    ],
)
def test_a_busy_server_is_asked_again(site, ask, monkeypatch, code, said, least):
    there, pauses = b'{"deployments": {"x": {"repo_id": "org/m"}}}', []
    when = formatdate(time.time() + 30, usegmt=True)
    said = {k: when if v == "date" else v for k, v in said.items()}
    site.answer = lambda s: s.say(code, **said) if len(site.heard) < 3 else s.say(200, there)
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    assert list(hosted(Remote(attempts=3))) == ["org/m"]
    assert len(pauses) == 2 and min(pauses) >= least and max(pauses) < least + 11
    site.heard.clear()
    pauses.clear()
    site.answer = lambda s: s.say(code, Retry_After="99999")
    with pytest.raises(ConnectionError, match=f"{code}.*2 attempts"):
        ask(Remote(attempts=2), end=5).state()
    assert max(pauses) <= 5  # not longer than the job may take


@pytest.mark.parametrize("body", [b"<html>Welcome</html>", b"[1]"])
def test_no_ndif_server_there(site, ask, body):
    site.answer = lambda s: s.say(200, body)
    for f in (hosted, ask().state):
        with pytest.raises(ConnectionError, match=r"(?s)no NDIF server is there.*NDIF_HOST"):
            f()


@pytest.mark.slow
def test_what_drips_has_an_end(site, ask):
    def drip(s):
        head = b"X-Long: 1\r\n" * 99 if s.path == "/head" else b"\r\n"
        with contextlib.suppress(OSError):
            for b in b"HTTP/1.0 200 OK\r\n" + head + b" " * 600:
                s.wfile.write(bytes([b]))
                time.sleep(0.02)

    site.answer = drip
    begin = time.monotonic()
    for path in ("head", "body"):
        with pytest.raises(TimeoutError, match="did not arrive within 1 s"):
            ask(Remote(total=1), end=1).saved_values(f"{site.url}/{path}")
    with pytest.raises(ConnectionError, match="1 attempts"):
        ask(Remote(total=1), end=1).state()
    assert time.monotonic() - begin < 15


def test_a_transplant_goes_back_to_its_server(site, near, tmp_path):
    "The folder has no weights: loading them here would fail."
    folder = tmp_path / "m"
    near[1]._module.config.save_pretrained(folder)
    near[1].tokenizer.save_pretrained(folder)
    assert not list(folder.glob("*.safetensors"))
    there = {"deployments": {"x": {"repo_id": str(folder), "dtype": "float32"}}, "packages": {}}
    site.answer = lambda s: s.say(200, json.dumps(there).encode())
    t = place(torch.ones(48), load_model(folder, remote=True), 2, norm=1.0)
    t.save(tmp_path / "t")
    with pytest.raises(ValueError, match="Load it yourself"):  # a file makes us ask no server
        Transplant.load(tmp_path / "t")
    back = Transplant.load(tmp_path / "t", load_model(folder, remote=True))
    assert isinstance(engine(back.model), Ndif) and engine(back.model).remote == Remote()


def test_nothing_is_fetched_for_a_server(site, tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    site.answer = lambda s: s.say(200, b'{"deployments": {}, "packages": {}}')
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path / "cache"))
    for name in ("gemma-3-270m", tmp_path / "m.gguf"):
        with pytest.raises(ValueError, match="leave remote= away"):
            load_model(name, remote=True)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="does not host"):
        load_model("org/model-that-nobody-made", remote=True)  # asked before the hub is


def test_limits_of_waiting(site, monkeypatch):
    site.answer = lambda s: s.say(503 if len(site.heard) < 2 else 200)
    assert Remote(attempts=2).call("GET", "/", 1e12) == {}
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="2 attempts"):
        Remote(attempts=2).call("GET", "/", 1e12)
    with pytest.raises(ConnectionError, match="1 attempts"):
        Remote(attempts=9).call("GET", "/", 1)  # that moment is past


def test_versions_are_compared_without_build_marks(site, caplog):
    there = {"torch": remote.version("torch").split("+")[0] + "+cu999", "nnsight": "0.0.1"}
    said = json.dumps({"packages": there, "deployments": {"x": {"repo_id": "org/m"}}}).encode()
    site.answer = lambda s: s.say(200, said)
    assert remote.other_versions() == {"nnsight": (remote.version("nnsight"), "0.0.1")}
    assert remote.server("m")["repo_id"] == "org/m" and "nnsight 0.0.1 (here" in caplog.text
    with pytest.raises(ValueError, match="it hosts org/m"):
        remote.server("org/other")


def test_words_of_the_server(ask, monkeypatch):
    job, sent = ask(), []
    monkeypatch.setattr(Job, "send", lambda self: sent.append(1))
    monkeypatch.setattr(remote.time, "sleep", lambda s: None)
    job.failed("Error submitting request to model deployment. Please try again later.")
    assert sent == [1]
    with pytest.raises(TimeoutError, match="tokens=8192"):
        job.failed("Your job exceeded the execution timeout of 8.0s.")
    with pytest.raises(RuntimeError, match="IndexError: 99"):
        job.failed("Traceback ...\nIndexError: 99")
    job.sent = 3
    with pytest.raises(ConnectionError, match="lost job 1 3 times"):
        job.failed("Replica was evicted while processing your request...")


def test_a_job_of_an_earlier_run_is_taken_up(site, ask, monkeypatch):
    "Unless it failed, its result is gone, or nobody knows it: then it is sent anew."
    there = {"1": ("COMPLETED", "gone"), "2": ("COMPLETED", "result"), "3": ("ERROR", "")}

    def answer(s):
        name = s.path.split("/")[-1]
        if name in there:
            status, where = there[name]
            s.say(200, json.dumps({"status": status, "data": f"{site.url}/{where}"}).encode())
        else:
            known = {"request": b'{"id": "2"}', "result": b"states"}
            s.say(200, known[name]) if name in known else s.say(404)

    site.answer = answer
    monkeypatch.setattr(remote.time, "sleep", lambda s: None)
    monkeypatch.setattr(Job, "_serialize", lambda self, tracer: b"")
    for before, sent in (("2", 0), ("1", 1), ("3", 1), ("gone", 1), (None, 1)):
        job = ask(Remote(attempts=2))
        job.job_id, job.sent, job.finalize = before, 0, lambda b: b
        job()
        assert job.result() == b"states" and job.sent == sent


class Evil:
    "A pickle that runs code where it is read."

    def __init__(self, where):
        self.where = where

    def __reduce__(self):
        return Path.touch, (self.where,)


def packed(saved, **how):
    "Bytes of a result as a server sends them."
    torch.save(saved, made := io.BytesIO(), **how)
    return zstandard.compress(made.getvalue())


def deflated(saved):
    "The same, its tensors packed once more in the file that torch reads."
    torch.save(saved, plain := io.BytesIO())
    with (
        zipfile.ZipFile(plain) as old,
        zipfile.ZipFile(new := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for name in old.namelist():
            out.writestr(name, old.read(name))
    return zstandard.compress(new.getvalue())


@contextlib.contextmanager
def little_memory(most=400 << 20):
    "Within: the process may grow by so many bytes at most."
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < most


@pytest.mark.parametrize("protocol", [2, 4])
def test_120_a_result_never_runs_code(site, ask, tmp_path, protocol):
    "From the server or its store; tensors and plain containers are read as ever."
    job = ask()
    good = {"h": torch.ones(2), "x": [1, 2.5, "a", None, True, (torch.zeros(1).bfloat16(), {"k": {3}})]}
    assert str(job.finalize(packed(good))) == str(good)
    evil = {"h": torch.ones(2), "got": [Evil(tmp_path / "ran")]}
    site.answer = lambda s: s.say(200, packed(evil, pickle_protocol=protocol))
    with pytest.raises(ConnectionError, match="127.0.0.1.*nothing|127.0.0.1.*holds more than tensors"):
        job.saved_values(f"{site.url}/result")
    bare = Job.__new__(Job)  # as the snippet of the attack has it
    bare.compress, bare.verbose = True, False
    with pytest.raises(ConnectionError):
        bare.finalize(packed(evil))
    assert not (tmp_path / "ran").exists()


def test_120_no_variable_is_set_but_those_of_the_block(site, ask, monkeypatch):
    model, secret = ask().model_of, "mine"
    monkeypatch.setattr(Job, "send", lambda self: None)
    monkeypatch.setattr(Job, "result", lambda self: {"h": torch.ones(1), "secret": "overwritten"})
    with model.trace(input_ids=torch.tensor([[3, 5]]), backend=Job(model, Remote())):
        h = nnsight.save(model.layers[1].output)
    assert secret == "mine" and torch.equal(h, torch.ones(1))


@pytest.mark.parametrize("bomb", ["zstd", "deflate", "plain"])
@pytest.mark.slow
def test_121_a_result_has_a_limit(ask, bomb):
    job, size = ask(Remote(answer=50 << 20)), 300 << 20
    content = {
        "zstd": lambda: zstandard.compress(bytes(size)),
        "deflate": lambda: deflated({"h": torch.zeros(size // 4)}),
        "plain": lambda: packed({"h": torch.zeros(size // 4)}),
    }[bomb]()
    assert len(content) < 1 << 20
    with pytest.raises(ConnectionError, match="larger than 52,428,800 bytes"):
        job.finalize(content)
    job.most = 1 << 30
    if bomb != "zstd":
        assert len(job.finalize(content)["h"]) == size // 4  # where it is allowed


@pytest.mark.parametrize("path", ["status", "result"])
@pytest.mark.slow
def test_121_a_body_without_end_has_a_limit(site, ask, path):
    sent = []

    def spaces(s):
        s.send_response(200)
        s.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(1000):  # 1 GB
                s.wfile.write(b" " * (1 << 20))
                sent.append(1)

    site.answer = spaces
    with little_memory(), pytest.raises(ConnectionError, match="127.0.0.1"):
        ask(Remote(answer=1 << 25)).saved_values(f"{site.url}/result") if path == "result" else hosted()
    assert len(sent) < 200


def test_121_packed_answers_are_not_unpacked(site):
    body = gzip.compress(b'{"deployments": {"x": {"repo_id": "org/m"}}}' + b" " * (1 << 24))
    site.answer = lambda s: s.say(200, body, Content_Encoding="gzip")
    with pytest.raises(ConnectionError, match="no NDIF server"):
        hosted()
    assert site.heard[0][1]["accept-encoding"] == "identity"


ODD = [
    ("sent", b"{}"),
    ("sent", b'{"id": 5}'),
    ("sent", b'{"id": null}'),
    ("sent", b'{"id": ""}'),
    ("sent", b'["1"]'),
    ("sent", b"[" * 100_000),
    ("standing", b"{}"),
    ("standing", b'{"status": "SOLD"}'),
    ("standing", b'{"status": 7}'),
    ("standing", b'{"status": "QUEUED", "description": 7}'),
    ("standing", b'{"status": "COMPLETED", "data": {"a": 1}}'),
    ("standing", b'{"status": "COMPLETED", "data": "x", "id"'),
    ("models", b'{"deployments": ["m"]}'),
    ("models", b'{"deployments": {"x": "m"}}'),
    ("models", b'{"deployments": {"x": {"repo_id": 1}}}'),
    ("models", b'{"deployments": {"x": {"repo_id": "org/m", "revision": []}}}'),
    ("models", b'{"deployments": {"x": {"repo_id": "org/m", "config": {}}}}'),
    ("versions", b'{"packages": {"torch": 2.6}}'),
    ("versions", b'{"packages": []}'),
    ("versions", b"\xff\xfe"),
]


@pytest.mark.parametrize("what, body", ODD)
def test_123_odd_answers_name_the_server(site, ask, what, body):
    site.answer = lambda s: s.say(200, body)
    job = ask()
    f = {"sent": job.send, "standing": job.result, "models": hosted, "versions": remote.other_versions}[what]
    with pytest.raises(ConnectionError, match="http://127.0.0.1"):
        f()


@pytest.mark.parametrize("config", ["{", "[]", "7", '"x"', "[" * 9999])
def test_123_an_odd_configuration(site, near, config):
    with pytest.raises(ConnectionError, match="http://127.0.0.1"):
        served_mark({"repo_id": "org/m", "config": config}, near[1]._module)


@pytest.mark.parametrize(
    "content",
    [b"", b"odd", zstandard.compress(b"odd"), zstandard.compress(b""), packed([1]), packed(torch.ones(2))],
)
def test_123_odd_results(ask, content):
    with pytest.raises(ConnectionError, match="http://127.0.0.1.*is broken"):
        ask().finalize(content)


@pytest.mark.parametrize("kind", ["none", "other", "short", "types", "shape"])
@pytest.mark.slow
def test_123_results_of_another_form(near, site, monkeypatch, kind):
    "Of whatever was asked: states, scores, text, rows, sums."
    m = load_model(near[1], remote=SMALL)
    odd = {
        "none": lambda x: None,
        "other": lambda x: "x",
        "short": lambda x: x[:-1] if isinstance(x, list) else {},
        "types": lambda x: [7] * len(x) if isinstance(x, list) else 7,
        "shape": lambda x: json.loads("[[[]]]") if isinstance(x, list) else torch.ones(7, 1, 1),
    }[kind]
    real = remote.Simulated.result
    monkeypatch.setattr(remote.Simulated, "result", lambda self: {k: odd(v) for k, v in real(self).items()})
    task = load_task("emotions/happiness").take(4)
    texts = [f"It rained {i} times." for i in range(40)]
    for f in (
        lambda: activations(m, texts, [2]),
        lambda: activations(m, texts, [2], "all"),
        lambda: choices(m, 2, task)([adding(torch.ones(48))]),
        lambda: generate(m, "The cat", 4),
        lambda: collect(near[0], m, Corpus("some", texts), [1], [2]),
    ):
        with pytest.raises(ConnectionError, match="http://127.0.0.1.*something else than was asked for"):
            f()


@pytest.mark.parametrize("name", ["../../../admin?x=", "..", "a/b", "a#b", "a b", "%2e%2e/x", "1\n2"])
def test_124_job_ids_stay_in_their_place(site, ask, name):
    "Those of the server are refused; those of a file of ours are quoted."
    site.answer = lambda s: s.say(200, json.dumps({"id": name, "status": "QUEUED"}).encode())
    with pytest.raises(ConnectionError, match="http://127.0.0.1"):
        ask().send()
    job = ask()
    job.job_id = name
    job.state()
    assert all(p.startswith("/response/") and p.count("/") == 2 for p, _ in site.heard[1:]) or name == ".."
    assert not any("admin" in p.split("%")[0] or "?" in p for p, _ in site.heard)


def test_125_no_secret_and_no_escape_in_messages(site, ask, monkeypatch):
    odd = "Traceback\nKeyError: secret-key \x1b[2J \u202e"
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", site.url.replace("//", "//me:pass%40word@"))
    job, status = ask(Remote(attempts=1)), "ERROR"
    site.answer = lambda s: s.say(200, json.dumps({"status": status, "description": odd}).encode())
    said = []
    for f in (job.result, lambda: job.failed(odd), lambda: job.again(odd.split("\n")[1])):
        job.sent = 9
        with pytest.raises((RuntimeError, ConnectionError)) as e:
            f()
        said.append(str(e.value))
    said.append(str(job.late("QUEUED", odd)))
    for code, body in ((200, odd), (422, odd), (500, odd), (307, "")):
        site.answer = lambda s, code=code, body=body: s.say(
            code, body.encode(), Location="http://x/secret-key"
        )
        with pytest.raises((RuntimeError, ConnectionError)) as e:
            job.state()
        said.append(str(e.value))
    bad = {"status": "secret-key \x1b", "deployments": {"secret-key": 1}}
    site.answer = lambda s: s.say(200, json.dumps(bad).encode())
    for f in (job.state, hosted, lambda: remote.server("m")):
        with pytest.raises(ConnectionError) as e:
            f()
        said.append(str(e.value))
    for text in said:
        assert "secret-key" not in text and "word" not in text.replace("more words", "") and "***" in text
        assert all(c.isprintable() or c == "\n" for c in text), text
    fake = type("J", (), dict(host="h", remote=None, name="n"))()
    with pytest.raises(RuntimeError, match=r"KeyError: \*\*\*"):
        Job.failed(fake, odd)


@pytest.mark.parametrize("key", ["secret-key\n", "secret key", "secret-ké", "secret\x00key"])
def test_125_a_key_that_is_none_is_not_shown(site, monkeypatch, key):
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", key)
    with pytest.raises(ValueError, match="NDIF_API_KEY") as e:
        hosted()
    assert "secret" not in str(e.value) and not site.heard


@pytest.mark.parametrize(
    "host", ["", "ndif.us", "http://", "https://u:pass/word@h", "http://[::1", "nonsense"]
)
def test_an_address_that_is_none(monkeypatch, host):
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", host)
    with pytest.raises(ValueError, match="NDIF_HOST has to be an address") as e:
        hosted()
    assert "word" not in str(e.value) and "pass" not in str(e.value)


def test_only_this_machine_is_asked_without_encryption(site, ask, monkeypatch):
    "Neither a host elsewhere, nor a store that an answer names or sends on to; unless that is allowed."
    for host in (
        "http://ndif.example",
        "http://127.0.0.1.example",
        "http://127.0.0.1@ndif.example",
        "http://10.1.1.1",
    ):
        monkeypatch.setattr(nnsight.CONFIG.API, "HOST", host)
        with pytest.raises(ConnectionError, match=r"not encrypted.*insecure=True"):
            hosted()
        with pytest.raises((ConnectionError, RuntimeError)) as e:  # asked, and not there
            Remote(insecure=True, attempts=1, connect=0.2).call("GET", "/status")
        assert "not encrypted" not in str(e.value)
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", site.url)
    site.answer = lambda s: s.say(302, Location="http://store.example/x")
    for url in ("http://store.example/x", f"{site.url}/x"):
        with pytest.raises(ConnectionError, match=r"store\.example is not encrypted"):
            ask().saved_values(url)
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "https://ndif.example")
    with pytest.raises(ConnectionError, match="not encrypted"):  # nor may a server elsewhere send us home
        ask().saved_values(f"{site.url}/x")


def test_what_stays_on_this_machine_takes_no_proxy(site, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    site.answer = lambda s: s.say(200, b'{"deployments": {}}')
    assert hosted() == {}


def test_without_a_network_it_is_said_once(monkeypatch):
    "No name is looked up again and again, before a job is under way."
    asked = []

    def lookup(*a, **k):
        asked.append(a)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "https://ndif.example")
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(remote.time, "sleep", lambda s: None)
    with pytest.raises(ConnectionError, match=r"ndif\.example.*\(1 attempts\).*network"):
        hosted()
    assert len(asked) == 1
    with pytest.raises(ConnectionError, match="3 attempts"):
        Remote(attempts=3).call("GET", "/response/1", time.monotonic() + 9)


def test_a_name_that_is_nearly_hosted(site):
    there = {"deployments": {"x": {"repo_id": "openai-community/gpt2"}}, "packages": {}}
    site.answer = lambda s: s.say(200, json.dumps(there).encode())
    with pytest.raises(ValueError, match="Did you mean 'openai-community/gpt2'"):
        remote.server("gpt-2")


@pytest.mark.parametrize(
    "given",
    [dict(attempts=0), dict(total=-1), dict(read=float("nan")), dict(tokens="many"), dict(flight=1.5)],
)
def test_limits_that_are_none(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        Remote(**given)


@pytest.mark.slow
def test_others_do_not_steer_a_model_on_a_server(distant):
    "Eight threads and fifty tasks: each its own result, or an error at once."
    m, x, mask = distant[1], torch.tensor([[3, 5, 7]]), torch.ones(1, 3, dtype=torch.long)

    def text(v):
        options = dict(max_new_tokens=3, do_sample=False, pad_token_id=1)
        with engine(m).steer(2, lambda h: h + v) if v is not None else contextlib.nullcontext():
            return engine(m).generate(x, mask, **options).tolist()

    vectors = [None, *torch.randn(3, 48, generator=torch.Generator().manual_seed(0)) * 9]
    want, wrong, refused = [text(v) for v in vectors], [], []

    def work(k):
        for _ in range(2):
            try:
                if text(vectors[k % 4]) != want[k % 4]:
                    wrong.append(k)
            except RuntimeError as e:
                refused.append(str(e))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()

    async def task(k):
        with contextlib.suppress(RuntimeError), engine(m).steer(2, lambda h: h + vectors[k]):
            await asyncio.sleep(0)
            out = engine(m).generate(x, mask, max_new_tokens=3, do_sample=False, pad_token_id=1)
            if out.tolist() != want[k]:
                wrong.append(k)

    async def all_of_them():
        await asyncio.gather(*(task(1 + k % 3) for k in range(50)))

    asyncio.run(all_of_them())
    assert not wrong and all("another thread or task" in r for r in refused)
    assert [text(v) for v in vectors] == want
