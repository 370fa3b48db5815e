"One server for all tests of this folder, behind two proxies that count bytes and make faults."

import sys
from dataclasses import dataclass
from pathlib import Path

import nnsight
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from proxy import Proxy  # noqa: E402
from stack import Stack, missing, ndif_stack  # noqa: E402

KEY = "12345678-1234-1234-1234-123456789abc"


@dataclass
class Server:
    stack: Stack
    api: Proxy  # what the client talks to
    store: Proxy  # where results are fetched
    folders: dict  # family -> folder of a hosted model


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    if why := missing():
        pytest.skip(f"no NDIF server to start: {why}; `make test-remote` installs it")
    from concept_transfer.models import tiny_model

    base, folders, old = (
        tmp_path_factory.mktemp("ndif"),
        {},
        (nnsight.CONFIG.API.HOST, nnsight.CONFIG.API.APIKEY),
    )
    for family, size in (
        ("llama", dict(hidden_size=32, max_position_embeddings=512)),
        ("gpt2", dict(n_embd=64, n_layer=16, n_positions=512)),
    ):  # from small to large
        m = tiny_model(family, **size)
        folders[family] = base / family
        m._module.save_pretrained(folders[family])
        m.tokenizer.save_pretrained(folders[family])
    with Proxy(1) as store:
        env = {
            "NDIF_OBJECT_STORE_PUBLIC_URL": store.url,
            "NDIF_MIN_NNSIGHT_VERSION": "0.8.0",
            "NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS": "20",
        }
        with ndif_stack(
            {f: 2_000_000 for f in folders.values()}, base / "logs", keys=[KEY], env=env
        ) as stack:
            store.target = ("127.0.0.1", stack.store)
            with Proxy(stack.api) as api:
                yield Server(stack, api, store, folders)
    nnsight.CONFIG.API.HOST, nnsight.CONFIG.API.APIKEY = old


@pytest.fixture(autouse=True)
def asked(request, monkeypatch):
    "Every test starts with the right host and key, and no fault."
    s = request.getfixturevalue("server")
    s.api.faults, s.store.faults = [], []
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", s.api.url)
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", KEY)
    monkeypatch.setattr(nnsight.CONFIG.APP, "REMOTE_LOGGING", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
