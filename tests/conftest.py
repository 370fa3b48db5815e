"Fixtures for tests on real weights, each loaded once by a worker; and the mark of the tests that use them."

import pytest

REAL = {"smol", "gemma"}


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    for item in items:
        if REAL & set(getattr(item, "fixturenames", ())):
            item.add_marker("real")
    items.sort(
        key=lambda item: "study" not in item.keywords
    )  # the longest first, so that no worker waits for one


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
