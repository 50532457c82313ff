"""A text and a run of it that learned something."""

from pathlib import Path

import pytest

from moe_jax.commands.training import train
from moe_jax.config import Config
from moe_jax.runs.layout import RunDirectory
from tests import tiny as runs
from tests.oracles.texts import VERSE


@pytest.fixture(scope="session", autouse=True)
def one_cache_for_all(tmp_path_factory):
    """Neither the user's cache nor an old one; the runs here share their compiled programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session")
def tiny(made_once) -> Config:
    """Characters, two layers, noisy routing and dropout, on two devices: it trains in seconds."""

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "verse.txt").write_text(VERSE * 100)

    file = made_once("text", write) / "verse.txt"
    return runs.change(
        runs.CONFIG,
        model={"num_layers": 2, "embed_dim": 32, "dropout_rate": 0.05},
        moe={"expert_dim": 32, "dispatch": "einsum"},
        data={"path": str(file), "val_fraction": 0.1, "batch_size": 16},
        mesh={"data": 2},
        train={"num_steps": 30, "checkpoint_every": 10},
    )


@pytest.fixture
def change(tiny):
    """``tiny`` with some fields replaced: change(train={"num_steps": 3})."""
    return lambda **sections: runs.change(tiny, **sections)


@pytest.fixture(scope="session")
def small(tiny):
    """The same of one layer on one device, for runs of which only the files matter: it compiles in less time."""
    config = runs.change(
        tiny, model={"num_layers": 1, "embed_dim": 16}, mesh={"data": 1}, optimizer={"warmup_steps": 0}
    )
    return lambda **sections: runs.change(config, **sections)


@pytest.fixture(scope="session")
def finished(tiny, made_once) -> RunDirectory:
    """The run directory of ``tiny``, trained without interruption."""
    return RunDirectory(made_once("finished", lambda folder: train(tiny, folder)))
