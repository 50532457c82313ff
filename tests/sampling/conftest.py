"""The untrained model that tests here sample from."""

import pytest

from tests.sampling.tiny import CONFIG, make


@pytest.fixture(scope="session")
def rotary():
    """(generator, variables, training decoder), with rotary positions and a context of 16."""
    return make(CONFIG)
