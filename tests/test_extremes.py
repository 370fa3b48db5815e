"What each part must stand: a clear error or the right result, and never a half-written file."

import os
import warnings

import pytest
import torch
from safetensors.torch import save_file

from concept_transfer.concepts import Concept, activations, extract_concept
from concept_transfer.data import load_pairs
from concept_transfer.engine import encode
from concept_transfer.maps import LayerGrid
from concept_transfer.models import ModelInfo, load_model, model_info, tiny_model, wrap
from concept_transfer.pairing import last_token, paired_states
from concept_transfer.steering import generate
from concept_transfer.toys import TINY, tiny_tokenizer


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_text_longer_than_the_context_keeps_its_end(family):
    m = tiny_model(family)
    long = "rain " * 400 + "and then the cat sat"
    with pytest.warns(UserWarning, match="longer than the context of 128"):
        (ids,) = encode(m, [long])
    assert len(ids) == 128 and m.tokenizer.decode(ids).endswith("cat sat")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert activations(m, [long, "short"]).shape[0] == 2


@pytest.mark.parametrize("family", list(TINY))
@pytest.mark.slow
def test_emoji_and_right_to_left_text(family):
    m = tiny_model(family)
    texts = ["😀🎉 ok", "مرحبا بالعالم", "שלום, what a day", "é\u0301clair naïve", "a"]
    together = activations(m, ["Something much longer than any one of those.", *texts])[1:]
    assert torch.allclose(torch.cat([activations(m, [t]) for t in texts]), together, atol=1e-4)
    assert generate(m, texts, 3) == [generate(m, t, 3) for t in texts]


def test_empty_string_is_named():
    with pytest.raises(ValueError, match="text 1 is empty"):
        activations(tiny_model("gpt2"), ["fine", "", "fine"])
    with pytest.raises(ValueError, match="empty"):
        generate(tiny_model("gpt2"), "")


def test_a_text_of_which_only_the_start_token_is_left_is_named():
    m, other = tiny_model("llama"), tiny_model("gpt2")
    assert m.tokenizer("").input_ids == [0]
    with pytest.raises(ValueError, match="text 1 is empty"):
        activations(m, ["fine", "", "fine"])
    with pytest.raises(ValueError, match="text 0 is empty"):
        paired_states(other, m, ["", "fine"], [1], [1], last_token)
    assert isinstance(generate(m, "", 3), str)  # from nothing but the start token


def test_no_text_at_all_is_said():
    for ask in (activations, generate):
        with pytest.raises(ValueError, match="at least one"):
            ask(tiny_model("gpt2"), [])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", list(TINY))
@pytest.mark.slow
def test_the_tokenizers_padding_side_does_not_matter(family, side):
    m = tiny_model(family)
    m.tokenizer.padding_side = side
    texts = ["Rain.", "The cat sat on the mat and looked at me."]
    assert torch.allclose(activations(m, texts), torch.cat([activations(m, [t]) for t in texts]), atol=1e-4)
    assert generate(m, texts, 4) == [generate(m, t, 4) for t in texts]


def test_other_errors_are_not_taken_for_memory():
    m = tiny_model("llama")

    def broken(block, args, kwargs):
        raise RuntimeError("shape mismatch")

    hook = m._module.model.layers[0].register_forward_pre_hook(broken, with_kwargs=True)
    with pytest.raises(RuntimeError, match="shape"):
        activations(m, ["one", "two"])
    hook.remove()


def test_a_tokenizer_without_padding_token():
    m = tiny_model("gpt2")
    assert tiny_tokenizer("byte").pad_token is None
    assert len(generate(m, ["Rain", "The cat sat on"], 3)) == 2


@pytest.mark.parametrize("damage", ["truncated", "flipped header", "empty", "foreign"])
@pytest.mark.slow
def test_damaged_files_are_named(tmp_path, damage):
    f = tmp_path / "joy.safetensors"
    extract_concept(tiny_model("llama"), load_pairs("honesty")).save(f)
    raw = f.read_bytes()
    if damage == "foreign":
        save_file({"x": torch.zeros(2)}, f)
    else:
        f.write_bytes(
            {"truncated": raw[:-50], "flipped header": bytes([raw[0] ^ 255]) + raw[1:], "empty": b""}[damage]
        )
    with pytest.raises(ValueError, match="joy.safetensors"):
        Concept.load(f)
    with pytest.raises(ValueError, match="is a concept|joy.safetensors"):
        LayerGrid.load(f)


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    c, f = extract_concept(tiny_model("llama"), load_pairs("honesty")), tmp_path / "c.safetensors"
    c.save(f)
    old = f.read_bytes()

    def interrupted(*a):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        c.save(f)
    assert f.read_bytes() == old and list(tmp_path.iterdir()) == [f]


def test_a_full_disk_leaves_nothing(tmp_path, full_disk):
    info = ModelInfo("m", "m", 2, 50_000, "a", "b")
    big = Concept("big", torch.ones(2, 50_000), (0, 1), (0.5, 0.5), info, 3)
    with full_disk(20_000), pytest.raises(OSError, match="File too large.*Free some space"):
        big.save(tmp_path / "big.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_loaded_model_can_be_given_in_every_way(tmp_path):
    m = tiny_model("llama")
    m._module.save_pretrained(tmp_path)
    m.tokenizer.save_pretrained(tmp_path)
    for ref, tok in ((str(tmp_path), None), (tmp_path, None), (m._module, m.tokenizer), (m, None)):
        assert model_info(load_model(ref, tok)).weights == model_info(m).weights


def test_a_changed_weight_is_another_model(tmp_path):
    m = tiny_model("llama")
    before = model_info(m).weights
    m._module.model.layers[0].mlp.up_proj.weight.data[0, 0] += 0.1
    assert model_info(wrap(m._module, m.tokenizer)).weights != before
