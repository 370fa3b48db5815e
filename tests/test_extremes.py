"""What each part must stand: a clear error or the right result, and never a half-written file."""

import copy, os, subprocess, sys, warnings
import numpy as np, pytest, torch
from concept_transfer.alignment import LayerGrid, contrans, fit_maps
from concept_transfer.moments import last_token, paired_states, shared_boundaries
from concept_transfer.data import ContrastPairs, Corpus, load_pairs
from concept_transfer.extraction import Concept, activations, extract_concept
from concept_transfer.injection import graft, generate
from concept_transfer.models import (
    TINY,
    encode,
    load_model,
    logits,
    model_info,
    pad,
    read,
    tiny_model,
    tiny_tokenizer,
    wrap,
)
import concept_transfer.extraction as extraction

SCENES = Corpus("scenes", [t for e in ("sadness", "fear") for t in load_pairs(f"emotions/{e}").texts])


def test_identical_sides_have_no_direction():
    same = ContrastPairs("same", ["It rained."] * 5, ["It rained."] * 5)
    with pytest.raises(ValueError, match="identical"):
        extract_concept(tiny_model("llama"), same)


def test_duplicate_pairs_keep_together_in_the_folds():
    twice = ContrastPairs(
        "twice",
        ["We hugged."] * 6 + ["We sang."] * 6,
        ["We left."] * 6 + ["We slept."] * 6,
        (["a"] * 6 + ["b"] * 6) * 2,
    )
    assert np.isfinite(extract_concept(tiny_model("llama"), twice).auc).all()


def test_one_scenario_gives_no_held_out_score():
    one = ContrastPairs("one", ["We hugged."], ["We left."])
    assert np.isnan(extract_concept(tiny_model("llama"), one).auc).all()


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
@pytest.mark.parametrize("text", ["😀🎉 ok", "مرحبا بالعالم", "שלום, what a day", "é\u0301clair naïve", "a"])
def test_emoji_and_right_to_left_text(family, text):
    m = tiny_model(family)
    alone = activations(m, [text])
    assert torch.allclose(
        alone[0], activations(m, ["Something much longer than that one.", text])[1], atol=1e-4
    )
    assert isinstance(generate(m, text, 3), str)


@pytest.mark.parametrize("text", ["😀🎉 ok", "مرحبا بالعالم", "naïve café", "a\tb\n\nc", "  two  spaces  "])
def test_shared_boundaries_mean_the_same_characters(text):
    a, b = (
        tiny_tokenizer(k)(text, return_offsets_mapping=True).offset_mapping for k in ("byte", "sentencepiece")
    )
    for i, j in shared_boundaries(a, b):
        assert a[i][1] == b[j][1]


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
def test_the_tokenizers_padding_side_does_not_matter(family, side):
    m = tiny_model(family)
    m.tokenizer.padding_side = side
    texts = ["Rain.", "The cat sat on the mat and looked at me."]
    assert torch.allclose(activations(m, texts), torch.cat([activations(m, [t]) for t in texts]), atol=1e-4)
    assert generate(m, texts, 4) == [generate(m, t, 4) for t in texts]


def test_memory_running_out_halves_the_batch(monkeypatch):
    m, calls = tiny_model("llama"), []

    def scarce(model, ids, mask, layers, at=None):
        calls.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(model, ids, mask, layers, at)

    whole = activations(m, SCENES.texts[:9])
    monkeypatch.setattr(extraction, "read", scarce)
    assert torch.allclose(activations(m, SCENES.texts[:9]), whole, atol=1e-5) and max(calls) > 2
    monkeypatch.setattr(
        extraction, "read", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory"))
    )
    with pytest.raises(torch.OutOfMemoryError):
        activations(m, ["one"])


def test_kept_states_are_those_of_a_precision(tmp_path):
    m = tiny_model("llama")
    half = wrap(copy.deepcopy(m._module).bfloat16(), m.tokenizer)
    texts = SCENES.texts[:5]
    assert model_info(half).weights == model_info(m).weights
    kept = [activations(x, texts, path=tmp_path) for x in (m, half)]
    assert torch.equal(kept[1], activations(half, texts)) and not torch.equal(*kept)


def test_a_text_given_twice_loses_nothing_that_was_kept(tmp_path, monkeypatch):
    m = tiny_model("gpt2")
    a, b, c = [m.tokenizer.decode(x[:20]) for x in encode(m, SCENES.texts[:3])]
    texts = [a, b, a, c]
    whole = activations(m, texts, budget=40, path=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # both batches begin with the same text
    monkeypatch.setattr(extraction, "read", lambda *a: pytest.fail("read again"))
    assert torch.equal(activations(m, texts, path=tmp_path), whole)


def test_a_resumed_run_names_the_right_text(tmp_path):
    m, texts = tiny_model("llama"), ["Rain.", "A kettle sang in the kitchen.", "He slept.", "The zebra."]
    activations(m, texts[:3], path=tmp_path)
    m._module.model.embed_tokens.weight.data[m.tokenizer(texts[3]).input_ids[-2]] = torch.nan
    with pytest.raises(ValueError, match=r"text 3, .*zebra"):
        activations(m, texts, path=tmp_path)


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    monkeypatch.setattr(extraction, "read", lambda *a: (_ for _ in ()).throw(RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape"):
        activations(tiny_model("llama"), ["one", "two"])


def test_fewer_rows_than_dimensions():
    a, b = tiny_model("llama", hidden_size=192), tiny_model("gpt2")
    maps = fit_maps(a, b, SCENES.take(5), [1], [1], folds=2, held_out=0.3)
    assert maps.rows < 192 and torch.isfinite(maps.W).all() and maps.r2[0, 0] > -1


@pytest.mark.parametrize("d1, d2", [(48, 48), (48, 96), (96, 48)])
def test_equal_wider_and_narrower_targets(d1, d2):
    a, b = tiny_model("llama", hidden_size=d1), tiny_model("mistral", hidden_size=d2)
    maps = fit_maps(a, b, SCENES.take(40), [1], [2])
    assert maps.W.shape == (1, 1, d1, d2)
    assert graft(extract_concept(a, load_pairs("honesty"), [1]), b, map=maps[1, 2]).vector().shape == (d2,)


def test_contrans_warns_near_its_collapse():
    with pytest.warns(UserWarning, match="n = d"):
        contrans(torch.randn(50, 48), torch.randn(50, 8))


def test_tied_layers_are_read_and_steered_at_each_place():
    m = tiny_model("llama")
    layers = m._module.model.layers
    for k in (2, 3):
        layers[k].mlp = layers[1].mlp
    tied = wrap(m._module, m.tokenizer)
    x = pad(tied, encode(tied, ["It rained."]), True)
    base = logits(tied, *x)
    seen = [graft(torch.ones(48), tied, k, dose=0.5) for k in (1, 2)]
    with seen[0]():
        one = logits(tied, *x)
    with seen[1]():
        two = logits(tied, *x)
    assert not torch.equal(one, two) and not torch.equal(one, base) and torch.equal(logits(tied, *x), base)


def test_a_tokenizer_without_padding_token():
    m = tiny_model("gpt2")
    assert tiny_tokenizer("byte").pad_token is None
    assert len(generate(m, ["Rain", "The cat sat on"], 3)) == 2


def test_batch_of_one_and_one_token():
    m = tiny_model("gpt2")
    assert activations(m, ["a"], position="mean").shape == (1, 4, 48)


def test_too_little_text_for_a_map():
    with pytest.raises(ValueError, match="too few"):
        fit_maps(tiny_model("llama"), tiny_model("gpt2"), SCENES.take(3))


def test_the_wrong_models_are_refused():
    a, b, c = tiny_model("llama"), tiny_model("gpt2"), tiny_model("opt")
    maps = fit_maps(a, b, SCENES.take(30), [1], [1])
    joy = extract_concept(a, load_pairs("emotions/happiness"))
    with pytest.raises(ValueError, match="belongs to tiny-gpt2-0"):
        graft(joy, c, map=maps[1, 1])
    with pytest.raises(ValueError, match="belongs to tiny-llama-0"):
        maps[1, 1].direction(extract_concept(c, load_pairs("honesty")))


@pytest.mark.parametrize("damage", ["truncated", "flipped header", "empty", "foreign"])
def test_damaged_files_are_named(tmp_path, damage):
    f = tmp_path / "joy.safetensors"
    extract_concept(tiny_model("llama"), load_pairs("honesty")).save(f)
    raw = f.read_bytes()
    if damage == "foreign":
        from safetensors.torch import save_file

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


def test_a_full_disk_leaves_nothing(tmp_path):
    code = f"""
import resource, signal, torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
from concept_transfer.extraction import save_artefact
save_artefact({str(tmp_path / "big.safetensors")!r}, "concept", {{"x": torch.zeros(100000)}}, {{}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.returncode
        and "OSError" in done.stderr
        and "File too large" in done.stderr
        and "Free some space" in done.stderr
        and not list(tmp_path.iterdir())
    )


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
