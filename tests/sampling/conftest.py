"""The untrained model that tests here sample from."""

import pytest

from tests.sampling.tiny import CONFIG, make


@pytest.fixture(scope="session")
def rotary():
    """(generator, its variables, the decoder that takes them), with rotary positions and a context of 16."""
    return make(CONFIG)
