"Fixtures for tests on real weights, the mark of the tests that use them, and the order of all tests."

import resource
from contextlib import contextmanager

import pytest

REAL = {"smol", "gemma"}
LONG = [f"test_{x}" for x in "studies evidence models cli remote_local report steering drift docs".split()]


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    "A file is read by one worker, which makes its fixtures once; the longest go first, so that none is last."
    for item in items:
        if REAL & set(getattr(item, "fixturenames", ())):
            item.add_marker("real")
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


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


@pytest.fixture
def full_disk():
    "A context in which no file grows beyond some bytes, as on a full disk."

    @contextmanager
    def within(most):
        free = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, free[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, free)

    return within
