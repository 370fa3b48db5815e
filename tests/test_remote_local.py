"Every stage through requests that are packed and unpacked as for a server (nnsight's remote='local'), against the same without."
from dataclasses import replace

import httpx
import pytest
import torch

from concept_transfer import remote
from concept_transfer.alignment import fit_maps
from concept_transfer.data import EMOTIONS, Corpus, load_corpus, load_pairs, load_task
from concept_transfer.evaluation import ChoiceProbe, DamageProbe, at_damage
from concept_transfer.extraction import activations, extract_concept
from concept_transfer.injection import _adder, generate, graft
from concept_transfer.models import _remote_hash, load_model, model_info, tiny_model
from concept_transfer.moments import Moments, collect
from concept_transfer.remote import Job, Remote

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


def test_probes_and_dose(near, distant):
    v = torch.randn(48, generator=torch.Generator().manual_seed(0)); task, texts = load_task("emotions/happiness").take(6), load_corpus("neutral").texts[:6]
    a, b = (graft(v, m, 2, dose=.5) for m in (near[1], distant[1])); fns = [None, _adder(a.vector(1), "all"), _adder(a.vector(-1), "last")]
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


def test_a_model_on_a_server_is_itself(near):
    there = dict(repo_id="org/m", revision=None, dtype="bfloat16", config='{"hidden_size": 48, "dtype": "x"}'); mark = _remote_hash(there, near[1]._module)
    a = replace(model_info(near[1]), name="org/m", weights=mark); half = replace(a, weights=_remote_hash(there | {"dtype": "float32"}, near[1]._module))
    a.require(half, "it"); a.require(replace(model_info(near[1]), name="org/m"), "it")        # precision is not identity; a local one is known by name and shape
    for other in (replace(a, weights=_remote_hash(there | {"revision": "x"}, near[1]._module)), replace(model_info(near[1]), name="org/other"), model_info(near[0])):
        with pytest.raises(ValueError, match="on a server in bfloat16"): a.require(other, "it")


def test_the_key_is_never_shown(monkeypatch):
    monkeypatch.setattr(remote.CONFIG.API, "APIKEY", "secret-key")
    for code in (400, 401, 403):
        r = httpx.Response(code, json={"detail": "Invalid API key format: 'secret-key'."})
        e = remote._refusal(r); assert isinstance(e, PermissionError) and "secret" not in str(e) and "NDIF_API_KEY" in str(e)


def test_limits_of_waiting(monkeypatch):
    def down(): raise httpx.ConnectError("refused")
    with pytest.raises(ConnectionError, match="2 attempts"): remote._call(down, Remote(attempts=2), 1e12)
    with pytest.raises(ConnectionError, match="1 attempts"): remote._call(down, Remote(attempts=9), 0)
    answers = iter([httpx.Response(503), httpx.Response(200, json={})])
    assert remote._call(lambda: next(answers), Remote(attempts=2), 1e12).status_code == 200


def test_versions_are_compared_without_build_marks(monkeypatch, caplog):
    monkeypatch.setattr(remote, "_call", lambda send, *a: httpx.Response(200, json={"packages": {"torch": remote.version("torch").split("+")[0] + "+cu999", "nnsight": "0.0.1"}}))
    assert remote.other_versions() == {"nnsight": (remote.version("nnsight"), "0.0.1")}
    monkeypatch.setattr(remote, "hosted", lambda *a: {"org/m": {"repo_id": "org/m"}})
    assert remote.server("m")["repo_id"] == "org/m" and "nnsight 0.0.1 (here" in caplog.text
    with pytest.raises(ValueError, match="it hosts org/m"): remote.server("org/other")


def test_words_of_the_server(monkeypatch):
    job = Job.__new__(Job); job.host, job.name, job.remote, job.job_id, job.blob, job.sent, job.end = "http://h", "org/m", Remote(attempts=3), "1", b"", 1, 0
    sent = []; monkeypatch.setattr(Job, "send", lambda self: sent.append(1)); monkeypatch.setattr(remote.time, "sleep", lambda s: None)
    job._failed("Error submitting request to model deployment. Please try again later."); assert sent == [1]
    with pytest.raises(TimeoutError, match="tokens=8192"): job._failed("Your job exceeded the execution timeout of 8.0s.")
    with pytest.raises(RuntimeError, match="IndexError: 99"): job._failed("Traceback ...\nIndexError: 99")
    job.sent = 3
    with pytest.raises(ConnectionError, match="lost job 1 3 times"): job._failed("Replica was evicted while processing your request...")
