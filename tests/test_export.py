"Transplants on their way out and back: files that others read, receipts, and what is refused."

import base64
import dataclasses
import json
import os
import sys
import threading
import types
import warnings
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file

from concept_transfer import cli
from concept_transfer import export as room
from concept_transfer.artefacts import file_hash
from concept_transfer.concepts import Concept
from concept_transfer.export import (
    COMPARED,
    FORMATS,
    NotCompared,
    Receipt,
    answers,
    export,
    import_vector,
    push_to_hub,
    server_command,
    write_target,
)
from concept_transfer.models import tiny_model
from concept_transfer.steering import Transplant, generate, place


def planted(family, layer=2, seed=0, **more):
    v = torch.randn(48, generator=torch.Generator().manual_seed(seed))
    return place(v, tiny_model(family), layer, dose=0.5, name="joy", **more)


@pytest.fixture(scope="module")
def llama():
    return planted("llama")


@pytest.fixture
def nothing_installed(monkeypatch, tmp_path):
    monkeypatch.setenv("CONCEPT_TRANSFER_ENGINES", str(tmp_path / "engines"))


def like(t):
    "A format whose engine answers as that transplant does."

    return replace(FORMATS["vllm"], ask=lambda *_: ("an engine", answers(t)))


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_baked_checkpoint_is_an_ordinary_one(tmp_path, layer):
    t = planted("llama", layer)
    receipt = t.export(tmp_path / "baked", to="baked")
    assert receipt.difference < 1e-5 and all(x["equal"] == 12 for x in receipt.strengths.values())
    assert receipt.strengths[1.0]["moved"] > 0.1 and receipt.strengths[0.0]["moved"] == 0
    weights = load_file(tmp_path / "baked" / "model.safetensors")
    assert torch.equal(weights[f"model.layers.{layer}.mlp.down_proj.bias"], t.vector(1))
    assert json.loads((tmp_path / "baked" / "config.json").read_text())["mlp_bias"]
    assert {"receipt.json", "tokenizer.json"} <= {f.name for f in (tmp_path / "baked").iterdir()}
    assert t.model._module.config.mlp_bias is False  # the target is as it was


def test_the_receipt_says_what_was_compared(llama, tmp_path):
    receipt = export(llama, tmp_path / "hub", to="hub")
    kept = json.loads((tmp_path / "hub" / "receipt.json").read_text())
    assert {f.name for f in dataclasses.fields(Receipt)} == kept.keys()
    assert kept["versions"]["concept_transfer"] and kept["prompts"] and len(kept["vector"]) == 64
    assert [*kept["strengths"]] == ["0.0", "1.0", "2.0", "-1.0"] and kept["engine"] == "concept_transfer"
    assert kept["files"].keys() == {"README.md", "transplant.safetensors"}
    assert receipt.difference == 0 and "48 of 48 texts equal" in repr(receipt)


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize("to", ["gguf", "vllm"])
def test_an_engine_that_is_not_here_is_said_and_not_installed(llama, tmp_path, to):
    with pytest.warns(UserWarning, match=r"compared with nothing: .* is not installed .*pip install"):
        receipt = llama.export(tmp_path / "out", to=to)
    assert not receipt.strengths and np.isnan(receipt.difference) and "not compared" in repr(receipt)
    kept = json.loads((tmp_path / "out.receipt.json").read_text())
    assert kept["strengths"] == {} and "is not installed" in kept["engine"]
    assert {f.name for f in tmp_path.iterdir()} == {"out", "out.receipt.json"}


@pytest.mark.usefixtures("nothing_installed")
def test_a_family_that_llama_cpp_cannot_be_given_is_not_compared(tmp_path):
    t = planted("qwen2")
    with warnings.catch_warnings(action="ignore"):
        t.export(tmp_path / "joy.gguf")
    with pytest.raises(NotCompared, match="a qwen2 model cannot be written"):
        write_target(t.model, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    "family, odd, say",
    [
        ("llama", dict(hidden_act="gelu"), "hidden_act='gelu'"),
        ("llama", dict(attention_bias=True), "q_proj.bias"),
        ("llama", dict(mlp_bias=True), "gate_proj.bias"),
        (
            "llama",
            dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4)),
            "rope_type='linear'",
        ),
        ("gemma3_text", dict(query_pre_attn_scalar=30), "query_pre_attn_scalar=30"),
        ("gemma3_text", dict(layer_types=["full_attention"] * 4), "layer_types"),
        ("gemma3_text", dict(final_logit_softcapping=5.0), "final_logit_softcapping=5.0"),
        ("gemma3_text", dict(attn_logit_softcapping=5.0), "attn_logit_softcapping=5.0"),
        ("gemma3_text", dict(rope_local_base_freq=500.0), "sliding rope_theta=500.0"),
        ("gemma3_text", dict(attention_bias=True), "q_proj.bias"),
    ],
)
def test_a_target_that_llama_cpp_would_compute_otherwise_is_refused(tmp_path, family, odd, say):
    with pytest.raises(NotCompared, match=say):
        write_target(tiny_model(family, **odd), tmp_path / "model.gguf")
    assert not [*tmp_path.iterdir()]


def test_several_ends_of_a_text_keep_their_names(tmp_path):
    write_target(tiny_model("llama", eos_token_id=[1, 5]), tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert [fields[f"tokenizer.ggml.{k}_token_id"].contents() for k in ("eos", "eot")] == [1, 5]


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.filterwarnings("ignore:the export to")
def test_a_gguf_holds_what_we_know_and_comes_back(llama, tmp_path):
    t = replace(llama, notes={"kl": 0.1, "said": "so"})
    t.export(tmp_path / "joy.gguf")
    read = gguf.GGUFReader(tmp_path / "joy.gguf")
    fields = {k: f.contents() for k, f in read.fields.items()}
    assert fields["general.architecture"] == "controlvector" and fields["controlvector.model_hint"] == "llama"
    head = json.loads(fields["concept_transfer.transplant"])
    assert head["target"]["weights"] == t.target.weights and head["notes"] == t.notes
    assert json.loads(fields["concept_transfer.receipt"])["to"] == "gguf"
    back = import_vector(tmp_path / "joy.gguf", t.model)
    for s in (1, 2, -1):
        assert torch.equal(back.vector(s), back.vector(1) * s)
        assert torch.allclose(back.vector(s), t.vector(s), rtol=1e-6)
    assert torch.equal(back.vector(1), t.vector(1)) and back.generate("It rained") == t.generate("It rained")
    same = [f.name for f in dataclasses.fields(t) if f.name not in ("direction", "shuffled", "dose", "model")]
    assert [getattr(back, k) for k in same] == [getattr(t, k) for k in same]
    with pytest.raises(ValueError, match="belongs to tiny-llama-0"):
        import_vector(tmp_path / "joy.gguf", tiny_model("llama", 1))
    (tmp_path / "joy.gguf").rename(tmp_path / "joy of any name")
    assert torch.equal(import_vector(tmp_path / "joy of any name", t.model).vector(1), t.vector(1))


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.filterwarnings("ignore:the export to")
@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw[:-40] + bytes([raw[-40] ^ 1]) + raw[-39:],
        lambda raw: raw.replace(b'"norm"', b'"nprm"'),
        lambda raw: raw.replace(b'"vector"', b'"vectpr"'),
        lambda raw: raw.replace(b'"name": "joy"', b'"name": "toy"'),
        lambda raw: raw.replace(b"concept_transfer.transplant", b"concept_transfer.transplanu"),
        lambda raw: raw.replace(b"concept_transfer.digest", b"concept_transfer.digesu"),
    ],
)
def test_our_own_gguf_that_was_changed_is_refused(llama, tmp_path, change):
    llama.export(tmp_path / "joy.gguf")
    (tmp_path / "bad.gguf").write_bytes(change((tmp_path / "joy.gguf").read_bytes()))
    assert (tmp_path / "bad.gguf").read_bytes() != (tmp_path / "joy.gguf").read_bytes()
    with pytest.raises(ValueError, match="bad.gguf was changed since it was exported"):
        import_vector(tmp_path / "bad.gguf", llama.model)
    write_target(llama.model, tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="bad.gguf was changed since it was exported"):
        server_command("llama.cpp", tmp_path / "bad.gguf", tmp_path / "model.gguf")


def write_words(path, words):
    "A GGUF file of a model, as far as how it cuts texts."
    w = gguf.GGUFWriter(path, "llama")
    w.add_token_list(words)
    w.add_token_merges(["a b"])
    w.add_tokenizer_pre("smollm")
    w.add_add_bos_token(True)
    w.add_context_length(7)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()


def words_of(model):
    found = model.tokenizer.convert_ids_to_tokens([*range(model.config.vocab_size)])
    return [w or "[unused]" for w in found]


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.filterwarnings("ignore:the export to")
def test_a_baked_gguf_cuts_texts_as_the_file_of_the_target_does(llama, tmp_path):
    "Its weights, its numbers and its biases are ours."
    write_words(tmp_path / "like.gguf", words_of(llama.model))
    write_target(llama.model, tmp_path / "plain.gguf")
    llama.export(tmp_path / "joy.gguf", "baked-gguf", like=tmp_path / "like.gguf")
    made, plain = (gguf.GGUFReader(tmp_path / f"{k}.gguf") for k in ("joy", "plain"))
    told = {k: f.contents() for k, f in made.fields.items()}
    assert told["tokenizer.ggml.pre"] == "smollm" and told["tokenizer.ggml.merges"] == ["a b"]
    assert told["tokenizer.ggml.add_bos_token"] is True
    assert told["llama.context_length"] == llama.model.config.max_position_embeddings
    found, known = ({x.name: x.data for x in file.tensors} for file in (made, plain))
    assert np.array_equal(found.pop("blk.2.ffn_down.bias"), llama.vector(1).numpy())
    assert found.keys() == known.keys() and all(np.array_equal(found[k], known[k]) for k in known)


def test_a_baked_gguf_needs_a_file_of_the_target(llama, tmp_path):
    with pytest.raises(ValueError, match="give like="):
        llama.export(tmp_path / "joy.gguf", "baked-gguf")
    for words in (words_of(llama.model)[::-1], words_of(llama.model)[:-1]):
        write_words(tmp_path / "other.gguf", words)
        with pytest.raises(ValueError, match="give a GGUF file of the target"):
            llama.export(tmp_path / "joy.gguf", "baked-gguf", like=tmp_path / "other.gguf")
    with pytest.raises(ValueError, match="take baked-gguf"):
        llama.export(tmp_path / "joy.gguf", "baked")
    assert not (tmp_path / "joy.gguf").exists()


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.filterwarnings("ignore:the export to")
def test_the_file_of_vllm_is_our_own(llama, tmp_path):
    llama.export(tmp_path / "joy.safetensors", to="vllm")
    assert torch.equal(Transplant.load(tmp_path / "joy.safetensors", llama.model).vector(1), llama.vector(1))


@pytest.mark.slow
def test_the_folder_for_the_hub_reads_as_a_model_card(llama, tmp_path):
    llama.export(tmp_path / "hub", to="hub")
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.base_model_relation == "adapter" and card.data.model_name == "joy"
    assert 'load_model("tiny-llama-0")' in card.text
    back = Transplant.load(tmp_path / "hub" / "transplant.safetensors", llama.model)
    assert torch.equal(back.direction, llama.direction)


def test_82_a_name_is_neither_markup_nor_code_on_a_model_card(llama, tmp_path):
    name = 'x")\nimport os\n# <script>'
    t = replace(llama, name=name, target=replace(llama.target, name=name), model=None)
    FORMATS["hub"].write(t, tmp_path / "hub")
    text = ModelCard.load(tmp_path / "hub" / "README.md").text
    assert "<script>" not in text.partition("```")[0] and "\nimport os" not in text


@pytest.fixture
def hub(monkeypatch):
    "The Hub's addresses for a push, on loopback: what was asked, and the files that were committed."

    class Hub(BaseHTTPRequestHandler):
        asked, files = [], {}

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            self.asked.append((self.path, self.headers["authorization"], body))
            known = self.headers["authorization"] == "Bearer secret"
            said = json.dumps(self.answer(body)).encode() if known else b"{}"
            self.send_response(200 if known else 401)
            self.send_header("content-length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def answer(self, body):
            if "/preupload/" in self.path:
                files = json.loads(body)["files"]
                return {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
                    ]
                }
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            where = f"{Hub.url}/me/joy"
            return {"url": where, "commitUrl": f"{where}/commit/abc", "commitOid": "abc"}

        def log_message(self, *a):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        Hub.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(room, "HfApi", partial(HfApi, endpoint=Hub.url))
        yield Hub
        server.shutdown()


@pytest.mark.slow
def test_a_folder_is_pushed_to_the_hub_as_it_is(llama, tmp_path, hub):
    llama.export(tmp_path / "hub", to="hub")
    assert push_to_hub(tmp_path / "hub", "me/joy", token="secret").startswith(f"{hub.url}/me/joy")
    path, _, first = hub.asked[0]
    assert path == "/api/repos/create" and json.loads(first)["visibility"] == "private"
    assert hub.files == {f.name: f.read_bytes() for f in (tmp_path / "hub").iterdir()}
    (tmp_path / "back").write_bytes(hub.files["transplant.safetensors"])
    assert torch.equal(Transplant.load(tmp_path / "back", llama.model).direction, llama.direction)
    with pytest.raises(HfHubHTTPError, match="401"):
        push_to_hub(tmp_path / "hub", "me/joy", token="wrong")


@pytest.mark.parametrize("to", ["gguf", "baked", "baked-gguf", "vllm", "lm-eval"])
def test_positions_that_others_cannot_steer_are_refused(llama, tmp_path, to):
    with pytest.raises(ValueError, match="'last'. What can: hub"):
        replace(llama, positions="last").export(tmp_path / "out", to=to)
    with pytest.raises(ValueError, match="'half'. What can: hub"):
        half = replace(llama, positions=lambda h, mask: mask > 0)
        half.positions.__name__ = "half"
        half.export(tmp_path / "out", to=to)
    assert not [*tmp_path.iterdir()]


def test_what_cannot_be_expressed_is_refused_with_what_can(llama, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(
        ValueError, match="block 0 cannot be steered there. What can: baked, baked-gguf, vllm, lm-eval, hub"
    ):
        planted("llama", 0).export(out)
    with pytest.raises(ValueError, match="no bias at their end.* What can: gguf, vllm, lm-eval, hub"):
        planted("gemma3_text").export(out, to="baked")
    with pytest.raises(ValueError, match="use one of gguf, baked"):
        llama.export(out, to="onnx")
    with pytest.raises(ValueError, match="the target is needed here"):
        replace(llama, model=None).export(out)
    with pytest.raises(ValueError, match="in float32"):
        coarse = tiny_model("llama")
        coarse._module.bfloat16()
        place(llama.direction, coarse, 2).export(out)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="is a folder already"):
        llama.export(tmp_path / "there", to="hub")
    assert [f.name for f in tmp_path.iterdir()] == ["there"]


@pytest.mark.slow
def test_an_engine_that_does_something_else_is_found_and_leaves_nothing(llama, tmp_path, monkeypatch):
    "Another dose, another layer, unsteered, and steered where it should not be."
    monkeypatch.setitem(FORMATS, "wrong", like(replace(llama, dose=0.49)))
    monkeypatch.setitem(FORMATS, "elsewhere", like(replace(llama, layer=1)))
    monkeypatch.setitem(FORMATS, "idle", like(replace(llama, dose=1e-9)))
    stuck = dict.fromkeys(COMPARED, answers(llama)[1.0])
    monkeypatch.setitem(FORMATS, "stuck", replace(FORMATS["vllm"], ask=lambda *_: ("an engine", stuck)))
    for to, say in {
        "wrong": "more than the 0.001 for wrong",
        "elsewhere": "more than the 0.001",
        "idle": "an engine serves unsteered",
        "stuck": "an engine serves unsteered",
    }.items():
        with pytest.raises(ValueError, match=say):
            llama.export(tmp_path / "joy.gguf", to=to)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("base, steered, fits", [(0.8, 1.5, True), (0.1, 1.5, False), (1.2, 1.2, False)])
def test_an_engine_may_be_off_by_itself_within_the_same_tolerance(
    llama, tmp_path, monkeypatch, base, steered, fits
):
    def ask(*_):
        told = answers(llama)
        return "an engine", {
            s: (z + 1e-3 * (steered if s else base), texts) for s, (z, texts) in told.items()
        }

    monkeypatch.setitem(FORMATS, "rounded", replace(FORMATS["vllm"], ask=ask))
    if fits:
        assert llama.export(tmp_path / "joy.safetensors", to="rounded").difference > 1.4e-3
    else:
        with pytest.raises(ValueError, match="more than the 0.001 for rounded"):
            llama.export(tmp_path / "joy.safetensors", to="rounded")


def test_a_file_that_was_there_stays_when_an_export_fails(llama, tmp_path, monkeypatch):
    (tmp_path / "joy.gguf").write_text("mine")
    monkeypatch.setitem(FORMATS, "wrong", like(replace(llama, dose=0.4)))
    with pytest.raises(ValueError, match="Nothing was written"):
        llama.export(tmp_path / "joy.gguf", to="wrong")
    assert (tmp_path / "joy.gguf").read_text() == "mine" and len([*tmp_path.iterdir()]) == 1


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.filterwarnings("ignore:the export to")
def test_links_and_modes_stay(llama, tmp_path):
    (tmp_path / "far").mkdir()
    (far := tmp_path / "far" / "real.gguf").write_text("old")
    far.chmod(0o600)
    (link := tmp_path / "joy.gguf").symlink_to(far)
    receipt = llama.export(link)
    assert link.is_symlink() and far.stat().st_mode & 0o777 == 0o600
    assert torch.equal(import_vector(link, llama.model).vector(1), llama.vector(1))
    assert receipt.files == {"joy.gguf": file_hash(far)}
    assert {f.name for f in tmp_path.rglob("*")} == {"far", "real.gguf", "joy.gguf", "joy.gguf.receipt.json"}


@pytest.mark.parametrize("to", ["gguf", "hub", "baked"])
@pytest.mark.parametrize(
    "name, say",
    [
        ("pipe", "pipe is there already, and is no"),
        ("pipe link", "pipe link is there already, and is no"),
        ("folder", "folder is a folder already"),
        ("folder link", "folder link is a folder already"),
        ("none/out", "none/out: there is no folder .*/none; make it first"),
    ],
)
def test_where_nothing_can_be_put_is_said_before_it_is_compared(llama, tmp_path, monkeypatch, to, name, say):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for k in ("pipe", "folder"):
        (tmp_path / f"{k} link").symlink_to(k)

    def there():  # looking into a folder may change when it was last looked into
        return {f: (f.lstat().st_mode, f.lstat().st_ino, f.lstat().st_mtime_ns) for f in tmp_path.rglob("*")}

    before = there()
    monkeypatch.setitem(FORMATS, to, replace(FORMATS[to], ask=None))
    with pytest.raises(ValueError, match=say):
        llama.export(tmp_path / name, to)
    assert there() == before


def test_a_folder_does_not_take_the_place_of_a_file_or_a_link(llama, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(ValueError, match=f"{name} is there already, and is no folder"):
            llama.export(tmp_path / name, "hub")
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "link").is_symlink()


def test_a_file_that_is_read_is_not_written_over(llama, tmp_path):
    like, link = tmp_path / "like.gguf", tmp_path / "link.gguf"
    write_words(like, words_of(llama.model))
    link.symlink_to(like)
    before = like.read_bytes()
    for out in (like, link):
        with pytest.raises(ValueError, match="is the file that like= names"):
            llama.export(out, "baked-gguf", like=like)
        with pytest.raises(ValueError, match="is the file that like= names"):
            write_target(llama.model, out, like)
    assert like.read_bytes() == before and len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize(
    "to, more, say",
    [
        ("gguf", {"evidence": 1}, "gguf takes no options: leave evidence= away"),
        ("gguf", {"receipt": 1}, "gguf takes no options: leave receipt= away"),
        ("hub", {"like": "x"}, "hub takes evidence: leave like= away"),
        ("hub", {"evidence": 1}, "'evidence'"),
        ("baked-gguf", {"like": 5}, "'like'"),
    ],
)
def test_options_that_a_format_does_not_take_are_refused(llama, tmp_path, to, more, say):
    with pytest.raises(ValueError, match=say):
        llama.export(tmp_path / "out", to, **more)
    assert not [*tmp_path.iterdir()]


def write_control_vector(path, directions, hint="llama"):
    "As repeng writes it."
    w = gguf.GGUFWriter(path, "controlvector")
    w.add_string("controlvector.model_hint", hint)
    w.add_uint32("controlvector.layer_count", len(directions))
    for layer, v in directions.items():
        w.add_tensor(f"direction.{layer}", v)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_vectors_of_repeng_come_in(llama, tmp_path, kind):
    directions = {k: np.random.default_rng(k).normal(size=48).astype(kind) for k in (1, 2, 3)}
    write_control_vector(tmp_path / "many.gguf", directions)
    many = import_vector(tmp_path / "many.gguf", llama.model)
    assert isinstance(many, Concept) and many.layers == (1, 2, 3) and many.name == "many"
    assert all(torch.equal(many[k], torch.tensor(v).float()) for k, v in directions.items())
    many.save(tmp_path / "many.safetensors")
    assert torch.equal(Concept.load(tmp_path / "many.safetensors").directions, many.directions)
    write_control_vector(tmp_path / "one.gguf", {3: directions[3]})
    one = import_vector(tmp_path / "one.gguf", llama.model)
    assert one.layer == 3 and torch.allclose(one.vector(1), torch.tensor(directions[3]).float(), rtol=1e-6)


def test_75_a_vector_of_another_kind_of_model_is_said(llama, tmp_path):
    write_control_vector(tmp_path / "one.gguf", {3: np.ones(48, np.float32)}, "gpt2")
    with pytest.warns(UserWarning, match="made for a model of kind 'gpt2', not 'llama'"):
        import_vector(tmp_path / "one.gguf", llama.model)


@pytest.fixture
def steering_vectors(monkeypatch):
    "The class of steering-vectors, under its own name."

    @dataclasses.dataclass
    class SteeringVector:
        layer_activations: dict
        layer_type: str = "decoder_block"

    SteeringVector.__module__ = "steering_vectors.steering_vector"
    SteeringVector.__qualname__ = "SteeringVector"
    for name in ("steering_vectors", "steering_vectors.steering_vector"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["steering_vectors.steering_vector"].SteeringVector = SteeringVector
    return SteeringVector


def test_files_of_steering_vectors_come_in_without_it(llama, tmp_path, steering_vectors, monkeypatch):
    v = {2: torch.randn(1, 48), 3: torch.randn(1, 48)}
    torch.save(steering_vectors(v), tmp_path / "two.pt")
    torch.save(steering_vectors({2: v[2]}), tmp_path / "one.pt")
    torch.save(v, tmp_path / "bare.pt")
    for name in ("steering_vectors", "steering_vectors.steering_vector"):
        monkeypatch.delitem(sys.modules, name)
    two, one, bare = (import_vector(tmp_path / f"{k}.pt", llama.model) for k in ("two", "one", "bare"))
    assert torch.equal(two.directions, bare.directions) and two.layers == (2, 3)
    assert one.layer == 2 and torch.allclose(one.vector(1), v[2][0], rtol=1e-6)
    with one(1) as model:
        steered = generate(model, "It rained and")
    assert steered == one.generate("It rained and")


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


def test_foreign_files_are_refused_in_words(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({2: Harmful()}, "harm.pt")
    Path("text.pt").write_text("no vector")
    Path("text.gguf").write_text("no vector")
    torch.save({"a": 1}, "other.pt")
    torch.save({}, "empty.pt")
    write_control_vector("none.gguf", {})
    for name in ("harm.pt", "text.pt", "text.gguf", "other.pt", "empty.pt", "none.gguf"):
        with pytest.raises(ValueError, match="holds no vectors of repeng, llama.cpp or steering-vectors"):
            import_vector(name, llama.model)
    assert not Path("touched").exists()
    with pytest.raises(FileNotFoundError):
        import_vector("nowhere.gguf", llama.model)
    torch.save({2: torch.ones(47)}, "narrow.pt")
    torch.save({4: torch.ones(48)}, "deep.pt")
    for name in ("narrow.pt", "deep.pt"):
        with pytest.raises(ValueError, match="do not fit tiny-llama-0"):
            import_vector(name, llama.model)


def test_llama_cpp_is_not_given_what_it_would_pass_over(llama, tmp_path):
    write_target(llama.model, tmp_path / "model.gguf")
    v = llama.vector(1).numpy()
    bad = {"wide": {2: np.ones(96, np.float32)}, "first": {0: v}, "deep": {4: v}, "no": {}}
    for name, directions in bad.items():
        write_control_vector(tmp_path / f"{name}.gguf", directions)
        with pytest.raises(ValueError, match="does not fit .*layers 1 to 3: 48 wide"):
            server_command("llama.cpp", tmp_path / f"{name}.gguf", tmp_path / "model.gguf")
    with pytest.raises(FileNotFoundError):
        server_command("llama.cpp", tmp_path / "missing.gguf", tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="another name"):
        server_command("llama.cpp", tmp_path / "a:b.gguf", tmp_path / "model.gguf")


@pytest.fixture
def engines(tmp_path, monkeypatch):
    "Stand-ins for the programs of engines, which say how they were called, and end."
    for name, file in {"llama.cpp": "llama-server-vulkan", "vllm": "python"}.items():
        program = tmp_path / "engines" / name / "bin" / file
        program.parent.mkdir(parents=True)
        program.write_text(f'#!/bin/sh\n(echo "$@"; echo "$CONCEPT_TRANSFER_SERVED") >> {tmp_path}/called\n')
        program.chmod(0o755)
    monkeypatch.setenv("CONCEPT_TRANSFER_ENGINES", str(tmp_path / "engines"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_serve_starts_a_server_that_exists_and_says_how_to_ask(llama, engines, capsys):
    llama.save("joy.safetensors")
    write_control_vector("joy.gguf", {2: llama.vector(1).numpy()})
    write_target(llama.model, "model.gguf")
    asked = "serve --engine llama.cpp --transplant joy.gguf --model model.gguf --strength -1.5 --port 1234"
    assert cli.main(asked.split()) == 0
    called = (engines / "called").read_text()
    assert "--control-vector-scaled joy.gguf:-1.5" in called and "--port 1234" in called
    assert "curl http://127.0.0.1:1234/v1/completions" in capsys.readouterr().err
    (engines / "called").unlink()
    asked = "serve --engine vllm --transplant joy.safetensors --model folder --json"
    assert cli.main(asked.split()) == 0
    check, _, called, served = (engines / "called").read_text().splitlines()
    assert check == "-c import concept_transfer.vllm_plugin"
    assert "vllm.entrypoints.openai.api_server --enforce-eager --dtype float32 --model folder" in called
    assert served == str(engines / "joy.safetensors")
    out = json.loads(capsys.readouterr().out)
    assert out["request"]["vllm_xargs"] == {"steer": "joy", "strength": 1.0}
    assert cli.main([*asked.split(), "--strength", "2"]) == 1
    assert "leave it away" in json.loads(capsys.readouterr().out)["error"]


def test_serve_tells_when_the_server_or_the_plugin_fails(llama, engines, capsys):
    llama.save("joy.safetensors")
    write_control_vector("joy.gguf", {2: llama.vector(1).numpy()})
    write_target(llama.model, "model.gguf")
    for program in engines.glob("engines/*/bin/*"):
        program.write_text("#!/bin/sh\nexit 3\n")
    assert cli.main("serve --engine llama.cpp --transplant joy.gguf --model model.gguf".split()) == 1
    assert "llama.cpp ended with 3" in capsys.readouterr().err
    assert cli.main("serve --engine vllm --transplant joy.safetensors --model folder".split()) == 1
    assert "plugin" in capsys.readouterr().err


@pytest.mark.slow
def test_export_on_the_command_line(llama, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in (llama.model._module, llama.model.tokenizer):
        part.save_pretrained("tiny-llama-0")
    llama.save("joy.safetensors")
    asked = ["export", "--transplant", "joy.safetensors", "--out", "baked"]
    assert cli.main([*asked, "--to", "baked", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["out"] == "baked" and out["strengths"]["1.0"]["equal"] == 12
    assert cli.main([*asked, "--to", "baked", "--json"]) == 1
    assert cli.main([*asked, "--to", "onnx"]) == 2
    assert cli.main([*asked, "--to", "gguf", "--evidence", "evidence.json"]) == 2
    assert cli.main([*asked, "--to", "baked-gguf"]) == cli.main([*asked, "--to", "gguf", "--like", "x"]) == 2
    said = capsys.readouterr().err
    assert "gguf takes no options: leave evidence= away" in said and "baked-gguf needs like" in said
