"""One server for the tests that do not change it."""

import pytest

from tests.sampling.server.harness import BYTES, MODEL, Pace, serving
from tests.sampling.tiny import make


@pytest.fixture(scope="session")
def made():
    """(generator, its variables, the decoder that takes them) of a model of bytes with a context of 64."""
    return make(MODEL, BYTES)


@pytest.fixture(scope="session")
def server(made):
    with serving(made) as running:
        yield running


@pytest.fixture
def pace():
    """The pace of the batch, which is as before after the test."""
    yield Pace
    Pace.delay = 0.0
    Pace.gate.set()
