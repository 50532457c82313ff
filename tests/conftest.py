"""Eight fake CPU devices for every test, and no network."""

import fcntl
import gc
import os
import socket
from collections.abc import Callable
from pathlib import Path

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


def pytest_collection_finish() -> None:
    # What is imported by now stays: a tenth of the time went into looking for garbage in it while programs are traced.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


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
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """A function of a name and of what makes a new folder: that folder, which one process of this run has made."""
    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        with open(common / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
            if not (common / name).exists():
                make(common / f"{name}.unfinished")
                (common / f"{name}.unfinished").rename(common / name)
        return common / name

    return folder


@pytest.fixture(scope="session")
def rotary():
    """An untrained model, ready to sample from, with a context of 16."""
    from tests.sampling.tiny import CONFIG, make

    return make(CONFIG)
