"Exported transplants in the engines that `make test-engines` installs; skipped where one is not."

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import httpx
import pytest
import torch

from concept_transfer import export as room
from concept_transfer.concepts import activations
from concept_transfer.data import load_corpus, load_pairs
from concept_transfer.export import NotCompared, engine_program, serving, write_target
from concept_transfer.models import tiny_model
from concept_transfer.steering import joined, place

pytestmark = [pytest.mark.engines, pytest.mark.slow]
HOME = Path(os.environ.get("CONCEPT_TRANSFER_ENGINES", "nowhere"))
WIDE = dict(
    hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32
)  # vLLM wants such heads


def planted(family, layer=2, seed=0, name="joy", **config):
    model = tiny_model(family, **config)
    v = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    return place(v, model, layer, dose=0.5, name=name)


def need(name):
    try:
        return engine_program(name)
    except NotCompared as e:
        pytest.skip(str(e))


@pytest.fixture
def llama_cpp():
    return need("llama.cpp")


@pytest.fixture
def vllm(monkeypatch):
    "It asks nothing of the network, and takes one gigabyte for what it keeps of prompts."
    alone = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    return need("vllm")


@contextmanager
def command_line(folder, *asked):
    "Within: `concept-transfer serve` runs, and a client that reaches its server; interrupted at the end."
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = [os.path.join(os.path.dirname(sys.executable), "concept-transfer"), "serve"]
    command = [*program, *map(str, asked), "--port", str(port), "--json"]
    how = dict(cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with (
        subprocess.Popen(command, start_new_session=True, **how) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600, trust_env=False) as client,
    ):
        try:
            while server.poll() is None:
                with suppress(httpx.TransportError):
                    if client.get("/health").is_success:
                        break
                time.sleep(0.1)
            yield client
        finally:
            os.killpg(server.pid, signal.SIGINT)
            out, _ = server.communicate(timeout=200)
    assert server.returncode == 0 and json.loads(out)["url"].startswith("http://127.0.0.1")


@pytest.mark.parametrize("family, most", [("llama", 1e-4), ("gemma3_text", 1e-2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_llama_cpp_does_what_we_do(llama_cpp, tmp_path, family, most, seed):
    receipt = planted(family, seed=seed).export(tmp_path / "joy.gguf")
    assert receipt.difference < most and receipt.strengths[1.0]["moved"] > 0.1
    assert sum(x["equal"] for x in receipt.strengths.values()) >= 46
    assert receipt.engine.startswith("llama.cpp ")


def test_llama_cpp_steers_at_several_layers(llama_cpp, tmp_path):
    receipt = joined([planted("llama", k, k) for k in (1, 2, 3)]).export(tmp_path / "joy.gguf")
    assert receipt.difference < 1e-4 and receipt.strengths[1.0]["moved"] > 0.1


def test_a_baked_file_in_llama_cpp(llama_cpp, tmp_path):
    "At two layers, the first among them, and served as any other model."
    t = joined([planted("llama", k, k) for k in (0, 2)])
    write_target(t.model, tmp_path / "target.gguf")
    receipt = t.export(tmp_path / "joy.gguf", "baked-gguf", like=tmp_path / "target.gguf")
    assert receipt.difference < 1e-4 and receipt.strengths[1.0]["moved"] > 0.1


@pytest.mark.parametrize("fault", ["away", "missing", "wide", "first"])
def test_llama_cpp_that_serves_unsteered_is_caught(llama_cpp, tmp_path, monkeypatch, fault):
    "It starts, is in good health, and says nothing."
    was = room.server_command

    def careless(engine, file, model, strength, port):
        command, *rest = was(engine, file, model, strength, port)
        at = command.index("--control-vector-scaled")
        if fault == "away":
            del command[at : at + 2]
        else:
            command[at + 1] = f"{bad[fault]}:{strength}"
        return command, *rest

    bad = {
        "missing": tmp_path / "missing.gguf",
        "wide": tmp_path / "wide.gguf",
        "first": tmp_path / "first.gguf",
    }
    for name, t in {"wide": planted("llama", hidden_size=96), "first": planted("llama", 0)}.items():
        room.FORMATS["gguf"].write(t, bad[name])
    monkeypatch.setattr(room, "server_command", careless)
    monkeypatch.setattr(room, "COMPARED", (0.0, 1.0))  # enough to tell; each is a server
    monkeypatch.setattr(room, "N_PROMPTS", 2)
    with pytest.raises((ValueError, RuntimeError), match="serves unsteered|llama.cpp ended"):
        planted("llama").export(tmp_path / "joy.gguf")
    assert not (tmp_path / "joy.gguf").exists()


ROPE = {"rope_type": "default", "rope_theta": 500.0}
NEAR = {"rope_type": "default", "rope_theta": 1e4}
HELD = {  # settings that a GGUF file tells llama.cpp
    "llama": dict(rope_parameters=ROPE, rms_norm_eps=1e-2, tie_word_embeddings=True, head_dim=20),
    "gemma3_text": dict(
        rope_parameters={"full_attention": ROPE, "sliding_attention": NEAR},
        num_hidden_layers=7,
        sliding_window=4,
        rms_norm_eps=1e-2,
        tie_word_embeddings=False,
        head_dim=20,
        query_pre_attn_scalar=20,
    ),
}


@pytest.mark.parametrize("family", HELD)
def test_llama_cpp_has_the_settings_of_the_target(llama_cpp, tmp_path, monkeypatch, family):
    monkeypatch.setattr(room, "COMPARED", (0.0, 1.0))
    assert planted(family, **HELD[family]).export(tmp_path / "joy.gguf").difference < 1e-2


def test_serve_with_llama_cpp(llama_cpp, tmp_path):
    t = planted("llama")
    room.FORMATS["gguf"].write(t, tmp_path / "joy.gguf")
    write_target(t.model, tmp_path / "model.gguf")
    ids = t.model.tokenizer("It rained and").input_ids
    told = "--engine llama.cpp --transplant joy.gguf --model model.gguf --strength 2".split()
    with command_line(tmp_path, *told) as client:
        ask = dict(prompt=ids, max_tokens=1, temperature=0, logprobs=5)
        (choice,) = client.post("/v1/completions", json=ask).json()["choices"]
    with t(2) as model, model.trace("It rained and"):
        top = model.output.logits[0, -1].log_softmax(-1).topk(5).save()
    said = choice["logprobs"]["content"][0]["top_logprobs"]
    assert [x["id"] for x in said] == top.indices.tolist()
    assert torch.allclose(torch.tensor([x["logprob"] for x in said]), top.values, atol=2e-2)


def test_vllm_does_what_we_do(vllm, tmp_path):
    for family in ("llama", "gemma3_text"):
        receipt = planted(family, **WIDE).export(tmp_path / f"{family}.safetensors", to="vllm")
        assert receipt.difference < 1e-3 and receipt.strengths[1.0]["moved"] > 0.1
        assert sum(x["equal"] for x in receipt.strengths.values()) >= 46


def test_vllm_steers_at_several_layers(vllm, tmp_path):
    t = joined([planted("llama", k, k, **WIDE) for k in (1, 2, 3)])
    receipt = t.export(tmp_path / "joy.safetensors", to="vllm")
    assert receipt.difference < 1e-3 and receipt.strengths[1.0]["moved"] > 0.1


def test_requests_to_vllm_do_not_disturb_each_other(vllm, tmp_path):
    "Strengths in one batch, a name that is not served, and states of a long prompt that are used again."
    t = planted("llama", max_position_embeddings=512, **WIDE)
    for part in (t.model._module, t.model.tokenizer):
        part.save_pretrained(tmp_path / "model")
    t.save(tmp_path / "joy.safetensors")
    long = " ".join(load_corpus("neutral").texts[:8])  # 386 tokens, several blocks of what vLLM keeps
    told = "--engine vllm --transplant joy.safetensors --model model".split()
    with command_line(tmp_path, *told) as client:

        def ask(prompt, **steer):
            asked = dict(
                model="model", prompt=prompt, max_tokens=8, temperature=0, logprobs=3, vllm_xargs=steer
            )
            return client.post("/v1/completions", json=asked)

        def says(strength, prompt="It rained and"):
            return ask(prompt, steer="joy", strength=strength).json()["choices"][0]["logprobs"]

        strengths = [0.0, 1.0, -1.0, 2.0] * 4
        alone = {s: says(s) for s in strengths}
        with ThreadPoolExecutor(16) as pool:
            together = [*pool.map(says, strengths)]
        assert [x["tokens"] for x in together] == [alone[s]["tokens"] for s in strengths]
        for bad in (dict(steer="jo"), dict(steer="joy", strength="much")):
            assert ask("It rained and", **bad).status_code == 400
        assert "ask for one of joy" in ask("It rained and", steer="jo").text
        assert says(1.0)["tokens"] == alone[1.0]["tokens"]  # the engine goes on
        plain, steered, again = says(0.0, long), says(2.0, long), ask(long).json()["choices"][0]["logprobs"]
        assert plain["tokens"] == again["tokens"]
        assert torch.allclose(*(torch.tensor(x["token_logprobs"]) for x in (plain, again)), atol=1e-4)
    with t(2) as model, model.trace(long):
        truth = model.output.logits[0, -1].log_softmax(-1).max().save()
    off = abs(truth.item() - steered["token_logprobs"][0])
    assert off < 1e-3


def test_two_copies_behind_one_address(vllm, tmp_path):
    "vLLM's own data parallelism: each request says what it wants, so any copy may answer."
    t = planted("llama", **WIDE)
    for part in (t.model._module, t.model.tokenizer):
        part.save_pretrained(tmp_path / "model")
    t.save(tmp_path / "joy.safetensors")
    with torch.no_grad():
        truth = {}
        for s in (0.0, 1.0, -1.0, 2.0):
            with t(s) as model, model.trace("It rained and"):
                top = model.output.logits[0, -1].log_softmax(-1).max().save()
            truth[s] = top.item()
    ids = t.model.tokenizer("It rained and").input_ids
    more = "--dtype float32 --data-parallel-size 2".split()
    file, model = tmp_path / "joy.safetensors", tmp_path / "model"
    with serving("vllm", file, model, None, *more) as (client, ask), ThreadPoolExecutor(16) as pool:

        def says(s):
            steer = {"vllm_xargs": {"steer": "joy", "strength": s}}
            asked = ask | steer | dict(prompt=ids, max_tokens=1, temperature=0, logprobs=1)
            (choice,) = client.post("/v1/completions", json=asked).json()["choices"]
            return choice["logprobs"]["token_logprobs"][0]

        for s, logp in zip([*truth] * 4, pool.map(says, [*truth] * 4), strict=True):
            assert abs(logp - truth[s]) < 1e-3
        loads = client.get("/metrics").text
    done = re.findall(r'request_success_total{engine="(\d)",finished_reason="length".*} (\S+)', loads)
    assert sum(float(n) > 0 for _, n in done) == 2


LM_EVAL = """
import torch
from concept_transfer.export import export
from concept_transfer.models import tiny_model
from concept_transfer.steering import joined, place
for family in ("llama", "gemma3_text"):
    v = torch.randn(48, generator=torch.Generator().manual_seed(0))
    receipt = export(place(v, tiny_model(family), 2, dose=0.5, name="joy"), f"{family}.pt", to="lm-eval")
    assert receipt.difference < 1e-4 and receipt.strengths[1.0]["moved"] > 0.1, receipt
    print(receipt)
"""


def beside(name, program, folder):
    "What a program says that runs beside this package, in the environment of a harness."
    python = HOME / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{name} is not installed in {python.parents[1]}")
    done = subprocess.run([python, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_lm_eval_does_what_we_do(tmp_path):
    assert beside("lm-eval", LM_EVAL, tmp_path).count("48 of 48 texts equal; lm-eval") == 2


INSPECT = """
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, ModelAPI, ModelOutput, get_model, modelapi
from inspect_ai.scorer import exact
from inspect_ai.solver import generate
from concept_transfer.data import load_corpus
from concept_transfer.models import load_model, tiny_model
from concept_transfer.steering import Transplant, place
import torch


@modelapi(name="transplant")
class Steered(ModelAPI):
    def __init__(self, model_name, base_url=None, api_key=None, config=None, path=None, strength=1.0):
        super().__init__(model_name, base_url, api_key, [], config)
        self.transplant, self.strength = Transplant.load(path, load_model(model_name)), strength

    def max_connections(self):
        return 1  # one steering is open at a time

    async def generate(self, input, tools, tool_choice, config):
        text = "".join(message.text for message in input)
        said = self.transplant.generate(text, strength=self.strength, max_new_tokens=config.max_tokens)
        return ModelOutput.from_content(self.model_name, said)


model = tiny_model("llama")
t = place(torch.randn(48, generator=torch.Generator().manual_seed(0)), model, 2, dose=0.5, name="joy")
for part in (model._module, model.tokenizer):
    part.save_pretrained("tiny-llama-0")
t.save("joy.safetensors")
texts, said = load_corpus("neutral").texts[:3], {}
for s in (0.0, 1.0, -1.0):
    said[s] = [t.generate(x, strength=s, max_new_tokens=8) for x in texts]
    task = Task([Sample(x, target=y) for x, y in zip(texts, said[s])], solver=generate(), scorer=exact())
    how = dict(path="joy.safetensors", strength=s, memoize=False)
    there = get_model("transplant/tiny-llama-0", config=GenerateConfig(max_tokens=8), **how)
    (log,) = eval(task, model=there, display="none", log_dir="logs", log_format="json")
    assert log.status == "success", log.error
    assert [x.output.completion for x in log.samples] == said[s]
    assert log.eval.model_args["strength"] == s
assert said[0.0] != said[1.0] != said[-1.0]
"""


def test_inspect_ai_gets_what_we_say(tmp_path):
    "A provider of a dozen lines makes a transplant one of its models; the log says which, and how strong."
    beside("inspect-ai", INSPECT, tmp_path)


def carried(model, layer, emotion):
    "A direction of the model's own, from a few pairs."
    pairs = load_pairs(f"emotions/{emotion}")
    read = partial(activations, model, layers=[layer])
    v = read(pairs.positive[:8])[:, 0].mean(0) - read(pairs.negative[:8])[:, 0].mean(0)
    return place(v, model, layer, dose=0.07, name=emotion)


def test_real_llama(smol, tmp_path):
    t = carried(smol, 20, "happiness")
    assert t.export(tmp_path / "baked", to="baked").difference < 1e-4
    need("llama.cpp")
    assert t.export(tmp_path / "joy.gguf").difference < 1e-2


@pytest.mark.parametrize("emotion", ["happiness", "sadness"])
def test_real_gemma(gemma, llama_cpp, tmp_path, emotion):
    assert carried(gemma, 13, emotion).export(tmp_path / "joy.gguf").difference < 1e-2
