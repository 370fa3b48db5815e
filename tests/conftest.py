"Fixtures for tests on real weights; each worker loads a model once."
import pytest


@pytest.fixture(scope="session")
def smol():
    "SmolLM2-135M-Instruct: Llama family, small, aligned."
    from concept_transfer.models import load_model
    return load_model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def gemma():
    "Gemma-3-270m base: another family, wider, not aligned."
    from concept_transfer.models import load_model
    return load_model("gemma-3-270m")
