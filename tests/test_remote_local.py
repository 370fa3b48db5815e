"Every stage through requests that are packed and unpacked as for a server (nnsight's remote='local'), against the same without."
import contextlib, io, json, threading, time
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import nnsight
import pytest
import torch
import zstandard
from nnsight.schema.request import RequestModel

from concept_transfer import evaluation, moments, remote
from concept_transfer.alignment import fit_maps
from concept_transfer.data import EMOTIONS, Corpus, load_corpus, load_pairs, load_task
from concept_transfer.evaluation import ChoiceProbe, DamageProbe, at_damage, capability, evaluate, evaluate_text, off_target
from concept_transfer.extraction import activations, extract_concept
from concept_transfer.injection import Transplant, _adder, generate, graft
from concept_transfer.models import _remote_hash, load_model, model_info, tiny_model
from concept_transfer.moments import Moments, collect, robust_weight
from concept_transfer.remote import Job, Remote, far, hosted
from concept_transfer.selection import transplant
from concept_transfer.tasks import GenerationTask, load_knowledge

SMALL = Remote(simulated=True, tokens=1500, batch=300, flight=2)


@pytest.fixture(scope="module")
def near(): return tiny_model("llama", max_position_embeddings=512), tiny_model("gpt2", seed=3, n_positions=512)

@pytest.fixture(scope="module")
def distant(near): return tuple(load_model(m, remote=SMALL) for m in near)

@pytest.fixture(scope="module")
def corpus(): return Corpus("scenes", [x for e in ("fear", "anger") for x in load_pairs(f"emotions/{e}").texts][:160])


def close(a, b, eps=1e-5): assert float((a - b).abs().max()) <= eps * max(1., float(b.abs().max()))


@pytest.mark.parametrize("position", ["last", "mean", "all"])
def test_activations(near, distant, position):
    texts = ["Rain.", "The cat sat on the mat.", "We walked home."] * 9
    a, b = (activations(m, texts, [3, 1], position) for m in (near[1], distant[1]))
    for x, y in zip(a, b): close(y, x)


def test_interrupted_reading_goes_on(near, distant, tmp_path, monkeypatch):
    texts = [f"{x} Number {i}." for i, x in enumerate(load_pairs("emotions/fear").positive)]; want, real, calls = activations(near[1], texts, [3]), remote.Simulated.result, []
    def failing(self):
        calls.append(1)
        if len(calls) == 2: raise ConnectionError("the line is down")
        return real(self)
    monkeypatch.setattr(remote.Simulated, "result", failing)
    with pytest.raises(ConnectionError): activations(distant[1], texts, [3], path=tmp_path)
    assert len(list(tmp_path.iterdir())) > 0
    before = len(calls); close(activations(distant[1], texts, [3], path=tmp_path), want); again = len(calls) - before
    activations(distant[1], texts, [3]); assert 0 < again < len(calls) - before - again      # fewer jobs than from the start
    before = len(calls); close(activations(distant[1], texts, [3], path=tmp_path), want); assert len(calls) == before
    with pytest.raises(ValueError, match="cannot be kept"): activations(near[1], texts, [3], lambda h: h[0], path=tmp_path)


def transplant_with(source, target, corpus):
    "The README's lines, with whichever models."
    joy = extract_concept(source, load_pairs("emotions/happiness"))
    maps = fit_maps(source, target, corpus, [1, 2], [2])
    return graft(joy, target, map=maps[1, 2], dose=.5)


def test_the_same_transplant_wherever_a_model_runs(near, distant, corpus):
    want = transplant_with(*near, corpus)
    for source, target in ((near[0], distant[1]), (distant[0], near[1]), distant):
        got = transplant_with(source, target, corpus)
        close(got.direction, want.direction); close(got.shuffled, want.shuffled); close(got.vector(1), want.vector(1))
        assert got.generate(["The cat", "It rained all day and"], max_new_tokens=5) == want.generate(["The cat", "It rained all day and"], max_new_tokens=5)
    assert generate(distant[1], "The cat", 4) == generate(near[1], "The cat", 4)


def test_the_readme_with_layers_and_dose_chosen(near, distant, corpus):
    joy, task = extract_concept(near[0], load_pairs("emotions/happiness")), load_task("emotions/happiness", "tune").take(8); neutral = Corpus("some", load_corpus("neutral").texts[:8])
    maps = fit_maps(*near, corpus, [1, 2], [1, 2]); a, b = (transplant(joy, maps, m, task, neutral=neutral) for m in (near[1], distant[1]))
    assert (a.source_layer, a.layer, a.positions) == (b.source_layer, b.layer, b.positions) and a.dose == pytest.approx(b.dose, rel=1e-3); close(b.direction, a.direction)
    for x, y in zip(a.notes["search"], b.notes["search"], strict=True): assert x.pop("layers") == y.pop("layers") and x.pop("positions") == y.pop("positions") and x == pytest.approx(y, rel=1e-3, abs=1e-5)
    assert a.notes["texts_read"] <= b.notes["texts_read"]          # here several answers are read in one pass


def test_everything_that_is_asked_of_a_transplant(near, distant):
    v = torch.randn(48, generator=torch.Generator().manual_seed(0)); tests, tune = (load_task("emotions/happiness", s).take(n) for s, n in (("test", 8), ("tune", 4)))
    talk = GenerationTask("length", ("The cat", "It rained all day and"), lambda x: len(x) / 100); neutral = Corpus("some", load_corpus("neutral").texts[:12]); found = []
    for m in (near[1], distant[1]):
        t = graft(v, m, 2, dose=.5); arms = {"base": None, "steered": t}
        found.append((capability(arms, m, 2, load_knowledge().take(12), tokens=4), off_target([t, replace(t, direction=-v)], [tests, load_task("emotions/fear").take(8)]), evaluate_text(arms, talk, m, 5),
                      evaluate(t, tests, neutral, load_pairs("emotions/happiness"), load_pairs("emotions/fear"), random=1, examples=tune, source=near[0], strengths=(), knowledge=False)))
    (cap, (shift, p), text, e), (cap2, (shift2, p2), text2, e2) = found
    assert cap == cap2 and (shift == shift2).all() and (p == p2).all() and text == text2
    assert set(e.arms) == set(e2.arms) and {"few_shot", "few_shot_rotated", "source", "native", "other_concept", "prompt"} <= {k for k, a in e.arms.items() if not a.get("reason")}
    for k, a in e.arms.items(): assert a.get("reason") or (a["items"] == e2.arms[k]["items"] and all(a[x] == pytest.approx(e2.arms[k][x], rel=1e-3, abs=1e-5) for x in ("dose", "logit_shift", "kl", "perplexity_ratio") if a[x] is not None))


def test_no_request_is_larger_than_allowed(near, distant, monkeypatch):
    "A direction over many texts goes in several requests, and many directions over few texts too."
    task, fns, sizes = load_task("emotions/happiness").take(60), [_adder(torch.randn(48, generator=torch.Generator().manual_seed(i)), "all") for i in range(3)], []
    m = load_model(near[1], remote=Remote(simulated=True, tokens=2048)); real = evaluation.asking
    def counted(model, layer, batches, *a):
        sizes.append(sum(ids.numel() for passes, _ in batches for ids, *_ in passes)); return real(model, layer, batches, *a)
    monkeypatch.setattr(evaluation, "asking", counted); (probe, local), (hurt, here) = ((f(m), f(near[1])) for f in (lambda m: ChoiceProbe(m, task, 2), lambda m: DamageProbe(m, load_corpus("neutral").texts[:60], 2)))
    for some in (fns[:1], fns):
        sizes.clear(); got = probe.many(some); assert len(sizes) > 2 and max(sizes) <= 2048
        for x, y in zip(got, local.many(some)): assert (x.chosen == y.chosen).all() and abs(x.margin - y.margin).max() < 1e-4
        sizes.clear(); got = hurt.many(some); assert len(sizes) > 1 and max(sizes) <= 2048
        for x, y in zip(got, here.many(some)): assert x == pytest.approx(y, abs=1e-5)


def test_probes_and_dose(near, distant):
    v = torch.randn(48, generator=torch.Generator().manual_seed(0)); task, texts = load_task("emotions/happiness").take(6), load_corpus("neutral").texts[:6]
    a, b = (graft(v, m, 2, dose=.5) for m in (near[1], distant[1])); fns = [None, _adder(a.vector(1), "all"), replace(a, dose=-a.dose, positions="last")]
    want, got = ([f for f in map(ChoiceProbe(m, task, 2), fns)] for m in (near[1], distant[1]))
    for x, y in zip(want + want, got + ChoiceProbe(distant[1], task, 2).many(fns)):
        assert (x.chosen == y.chosen).all() and (x.first == y.first).all() and abs(x.margin - y.margin).max() < 1e-4
    one, two = DamageProbe(near[1], texts, 2), DamageProbe(distant[1], texts, 2)
    for x, y in zip(map(one, fns), two.many(fns)): assert x == pytest.approx(y, abs=1e-5)
    assert at_damage(b, two, .2).dose == pytest.approx(at_damage(a, one, .2).dose, rel=1e-3)


def test_an_interrupted_collection_goes_on(near, distant, tmp_path, monkeypatch):
    corpus = Corpus("scenes", [x for e in EMOTIONS for x in load_pairs(f"emotions/{e}").texts])
    whole, real, calls = collect(near[0], distant[1], corpus, [1], [2]), remote.Simulated.result, []
    def failing(self):
        calls.append(1)
        if len(calls) == 3: raise ConnectionError("the line is down")
        return real(self)
    monkeypatch.setattr(remote.Simulated, "result", failing)
    with pytest.raises(ConnectionError): collect(near[0], distant[1], corpus, [1], [2], path=tmp_path/"m")
    assert 0 < len(Moments.load(tmp_path/"m").seen) < len(whole.seen)
    calls.clear(); calls += [1] * 3; again = collect(near[0], distant[1], corpus, [1], [2], path=tmp_path/"m")
    assert again.seen == whole.seen and [p.name for p in tmp_path.iterdir()] == ["m"]
    assert torch.equal(again.n, whole.n)
    cov = lambda m: m.xy[0, 0] / m.n[0] - torch.einsum("a,lb->alb", m.x[0, 0], m.y[0]) / m.n[0] ** 2
    close(cov(again), cov(whole), 1e-4)


@pytest.mark.parametrize("layers, texts, rows", [(([1], [2]), 900, True), (([1], [0, 2, 3]), 900, False), (([1, 2], [2]), 900, True), (([1, 2], [1, 2, 3]), 40, True)])
def test_rows_or_sums_come_back_whichever_is_less(near, distant, layers, texts, rows, monkeypatch):
    "And both give what a model gives that runs here."
    corpus, moved = Corpus("scenes", [x for e in EMOTIONS for x in load_pairs(f"emotions/{e}").texts][:texts]), {True: 0, False: 0}
    class Counted(remote.Simulated):
        def __call__(self, tracer=None): moved[way] += len(RequestModel.serialize(tracer, True)); super().__call__(tracer)
        def result(self):
            got = super().result(); assert (got["kept"]["xy"].numel() == 0) == way; torch.save({k: got[k] for k in ("kept", "extra")}, packed := io.BytesIO())
            moved[way] += len(zstandard.compress(packed.getvalue())); return got
    monkeypatch.setattr(remote, "Simulated", Counted); real, want = moments._groups, collect(near[0], near[1], corpus, *layers, weight=robust_weight)
    for way in (rows, not rows):
        if way is not rows: monkeypatch.setattr(moments, "_groups", lambda *a: (real(*a)[0], way))
        got = collect(near[0], distant[1], corpus, *layers, weight=robust_weight, products=True)
        assert got.seen == want.seen and torch.equal(got.held_of, want.held_of)
        for k in ("n", "x", "y", "xx", "xy", "yy", "null", "held_x", "held_y"): close(getattr(got, k), getattr(want, k))
    assert moved[rows] < moved[not rows]


@pytest.mark.parametrize("shape", [(300, 2, 48), (1, 1, 1), (0, 3, 5)])
def test_bytes_by_weight(shape):
    "Nothing is lost, and of a model in half precision only its own half travels."
    Z = torch.randn(shape, generator=torch.Generator().manual_seed(0)); Z.view(-1)[:2] = torch.tensor([float("inf"), -0.])[:Z.numel()]; size = lambda X: len(zstandard.compress(moments._planes(X).numpy().tobytes()))
    for X in (Z, Z.bfloat16(), Z.half()): assert torch.equal(moments._whole(moments._planes(X)), X.float())
    assert len(Z) < 300 or size(Z.bfloat16()) < .55 * size(Z) < .55 * len(zstandard.compress(Z.numpy().tobytes()))


def test_a_job_of_rows_keeps_to_its_bytes(near, monkeypatch):
    "Also where a chunk as large as those for sums would be too much."
    m, sizes, real, corpus = load_model(near[1], remote=Remote(simulated=True, size=50_000)), [], remote.Simulated.result, Corpus("scenes", [x for e in EMOTIONS[:2] for x in load_pairs(f"emotions/{e}").texts])
    def counted(self):
        got = real(self); sizes.append(sum(own.numel() for _, own, _ in got["extra"])); return got
    monkeypatch.setattr(remote.Simulated, "result", counted); got, want = (collect(near[0], t, corpus, [1, 2], [2]) for t in (m, near[1]))
    assert max(sizes) < 100_000 < sum(sizes) / 10                # a token is four characters by rule of thumb only
    assert got.seen == want.seen and got.n.sum() == want.n.sum(); close(got.held_y, want.held_y)


def test_a_model_on_a_server_is_itself(near):
    there = dict(repo_id="org/m", revision=None, dtype="bfloat16", config='{"hidden_size": 48, "dtype": "x"}'); mark = _remote_hash(there, near[1]._module)
    a = replace(model_info(near[1]), name="org/m", weights=mark); half = replace(a, weights=_remote_hash(there | {"dtype": "float32"}, near[1]._module))
    a.require(half, "it"); a.require(replace(model_info(near[1]), name="org/m"), "it")        # precision is not identity; a local one is known by name and shape
    for other in (replace(a, weights=_remote_hash(there | {"revision": "x"}, near[1]._module)), replace(model_info(near[1]), name="org/other"), model_info(near[0])):
        with pytest.raises(ValueError, match="on a server in bfloat16"): a.require(other, "it")


@pytest.fixture
def site(monkeypatch):
    "A server on loopback that does what each test wants, at NDIF_HOST and with a key; `heard` has every request's path and headers."
    class Site(BaseHTTPRequestHandler):
        def do_GET(self): heard.append((self.path, dict(self.headers))); self.answer()
        def do_POST(self): self.rfile.read(int(self.headers["content-length"])); self.do_GET()
        def log_message(self, *a): pass
        def say(self, code, body=b"{}", **headers):
            self.send_response(code); [self.send_header(k.replace("_", "-"), v) for k, v in ({"content_length": len(body)} | headers).items()]; self.end_headers(); self.wfile.write(body)
    heard = Site.heard = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as s:
        threading.Thread(target=s.serve_forever, args=(.02,), daemon=True).start(); Site.url = f"http://127.0.0.1:{s.server_port}"
        monkeypatch.setattr(nnsight.CONFIG.API, "HOST", Site.url); monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "secret-key"); yield Site
        s.shutdown()

def ask(limits=Remote(attempts=3, read=5), end=60):
    "A job that was sent and is asked about."
    job = Job.__new__(Job); job.host, job.api_key, job.name, job.remote, job.job_id, job.blob, job.sent, job.end = nnsight.CONFIG.API.HOST, "secret-key", "org/m", limits, "1", b"", 1, time.monotonic() + end
    return job

def test_the_key_is_never_shown(site):
    for code, kind in ((400, PermissionError), (401, PermissionError), (403, PermissionError), (422, RuntimeError), (503, ConnectionError)):
        site.answer = lambda s: s.say(code, b'{"detail": "%s: secret-key"}' % (b"Invalid API key format" if code == 400 else b"odd"))
        with pytest.raises(kind) as e: ask(Remote(attempts=1))._ask()
        assert "secret" not in str(e.value) and (kind is not PermissionError or "NDIF_API_KEY" in str(e.value)) and ("***" in str(e.value)) == (kind is not PermissionError)

def test_the_key_goes_nowhere_else(site):
    other = site.url.replace("127.0.0.1", "localhost")
    site.answer = lambda s: s.say(200, b"{}") if "elsewhere" in s.path else s.say(307, location=f"{other}/elsewhere")
    for f in (ask()._ask, hosted):
        with pytest.raises(ConnectionError, match="elsewhere.*Set NDIF_HOST"): f()
    assert not any("elsewhere" in p for p, _ in site.heard)
    job = ask(); job.finalize = lambda b: b; assert job._fetch(f"{site.url}/result") == b"{}" and site.heard[-1][0] == "/elsewhere"      # a result may lie elsewhere: no key goes there
    assert not any("secret" in str(h) for p, h in site.heard[-2:])

@pytest.mark.parametrize("code, said, least", [(429, {"Retry_After": "7"}, 7), (429, {"Retry_After": "date"}, 25), (429, {}, 0), (408, {}, 0), (503, {"Retry_After": "7"}, 7)])
def test_a_busy_server_is_asked_again(site, monkeypatch, code, said, least):
    said, pauses = {k: formatdate(time.time() + 30, usegmt=True) if v == "date" else v for k, v in said.items()}, []
    site.answer = lambda s: s.say(code, **said) if len(site.heard) < 3 else s.say(200, b'{"deployments": {"x": {"repo_id": "org/m"}}}')
    monkeypatch.setattr(remote.time, "sleep", pauses.append); assert list(hosted(Remote(attempts=3))) == ["org/m"]
    assert len(pauses) == 2 and min(pauses) >= least and max(pauses) < least + 11
    site.heard.clear(); pauses.clear(); site.answer = lambda s: s.say(code, Retry_After="99999")
    with pytest.raises(ConnectionError, match=f"{code}.*2 attempts"): ask(Remote(attempts=2), end=5)._ask()
    assert max(pauses) <= 5                                                                            # not longer than the job may take

@pytest.mark.parametrize("body", [b"<html>Welcome</html>", b"[1]"])
def test_no_ndif_server_there(site, body):
    site.answer = lambda s: s.say(200, body)
    for f in (hosted, ask()._ask):
        with pytest.raises(ConnectionError, match="no NDIF server is there.*NDIF_HOST"): f()

def test_what_drips_has_an_end(site):
    def drip(s):
        with contextlib.suppress(OSError):
            for b in b"HTTP/1.0 200 OK\r\n" + (b"X-Long: 1\r\n" * 99 if s.path == "/head" else b"\r\n") + b" " * 600: s.wfile.write(bytes([b])); time.sleep(.02)
    site.answer = drip; begin = time.monotonic()
    for path in ("head", "body"):
        with pytest.raises(TimeoutError, match="did not arrive within 1 s"): ask(Remote(total=1), end=1)._fetch(f"{site.url}/{path}")
    with pytest.raises(ConnectionError, match="1 attempts"): ask(Remote(total=1), end=1)._ask()
    assert time.monotonic() - begin < 15


def test_a_transplant_goes_back_to_its_server(site, near, tmp_path):
    "The folder has no weights: loading them here would fail."
    near[1]._module.config.save_pretrained(tmp_path/"m"); near[1].tokenizer.save_pretrained(tmp_path/"m"); assert not list((tmp_path/"m").glob("*.safetensors"))
    site.answer = lambda s: s.say(200, ('{"deployments": {"x": {"repo_id": "%s", "dtype": "float32"}}, "packages": {}}' % (tmp_path/"m")).encode())
    t = graft(torch.ones(48), load_model(tmp_path/"m", remote=True), 2, norm=1.); t.save(tmp_path/"t"); back = Transplant.load(tmp_path/"t")
    assert far(back.model) is not None and far(t.target.load()) == Remote()

def test_nothing_is_fetched_for_a_server(site, tmp_path, monkeypatch):
    (tmp_path/"m.gguf").write_bytes(b"GGUF"); site.answer = lambda s: s.say(200, b'{"deployments": {}, "packages": {}}')
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path/"cache"))
    for name in ("gemma-3-270m", tmp_path/"m.gguf"):
        with pytest.raises(ValueError, match="leave remote= away"): load_model(name, remote=True)
    assert not (tmp_path/"cache").exists()
    with pytest.raises(ValueError, match="does not host"): load_model("org/model-that-nobody-made", remote=True)        # asked before the hub is


def test_limits_of_waiting(site):
    with pytest.raises(ConnectionError, match="2 attempts"): remote._call(Remote(attempts=2), 1e12, "GET", "http://127.0.0.1:9/")
    with pytest.raises(ConnectionError, match="1 attempts"): remote._call(Remote(attempts=9), 0, "GET", "http://127.0.0.1:9/")
    site.answer = lambda s: s.say(503 if len(site.heard) < 2 else 200)
    assert remote._call(Remote(attempts=2), 1e12, "GET", site.url) == {}


def test_versions_are_compared_without_build_marks(site, caplog):
    there = {"torch": remote.version("torch").split("+")[0] + "+cu999", "nnsight": "0.0.1"}; site.answer = lambda s: s.say(200, json.dumps({"packages": there, "deployments": {"x": {"repo_id": "org/m"}}}).encode())
    assert remote.other_versions() == {"nnsight": (remote.version("nnsight"), "0.0.1")}
    assert remote.server("m")["repo_id"] == "org/m" and "nnsight 0.0.1 (here" in caplog.text
    with pytest.raises(ValueError, match="it hosts org/m"): remote.server("org/other")


def test_words_of_the_server(monkeypatch):
    job = ask()
    sent = []; monkeypatch.setattr(Job, "send", lambda self: sent.append(1)); monkeypatch.setattr(remote.time, "sleep", lambda s: None)
    job._failed("Error submitting request to model deployment. Please try again later."); assert sent == [1]
    with pytest.raises(TimeoutError, match="tokens=8192"): job._failed("Your job exceeded the execution timeout of 8.0s.")
    with pytest.raises(RuntimeError, match="IndexError: 99"): job._failed("Traceback ...\nIndexError: 99")
    job.sent = 3
    with pytest.raises(ConnectionError, match="lost job 1 3 times"): job._failed("Replica was evicted while processing your request...")
