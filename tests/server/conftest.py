"""One server for the tests that do not change it."""

import pytest

from tests.server.harness import Pace, make_endless, serving


@pytest.fixture(scope="session")
def made():
    """(engine, variables) of a model of bytes with a context of 64."""
    return make_endless()


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
