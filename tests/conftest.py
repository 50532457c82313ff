"""Eight fake CPU devices for every test, and no network."""

import os
import socket

import pytest

from tests.compiling import XLA_FLAGS


def pytest_configure(config: pytest.Config) -> None:
    # Before any test module imports jax. A GPU test has to see the GPU.
    wants_gpu = "gpu" in config.getoption("-m") and "not gpu" not in config.getoption("-m")
    if not wants_gpu:
        os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    if not wants_gpu:
        jax.config.update("jax_num_cpu_devices", 8)
        jax.config.update("jax_disable_most_optimizations", True)
        with pytest.MonkeyPatch.context() as here:  # and not in the commands that tests start as a user does
            here.setenv("XLA_FLAGS", XLA_FLAGS)
            jax.devices()  # takes up the flags
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection to another machine fails."""
    connect = socket.socket.connect

    def guarded(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test must not reach the network, but connects to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def rotary():
    """An untrained model, ready to sample from, with a context of 16."""
    from tests.sampling.tiny import CONFIG, make

    return make(CONFIG)
