"""A tiny text and a tiny configuration that trains in seconds."""

import dataclasses

import pytest

from moe_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)
from tests.oracles.texts import VERSE


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Config:
    """Characters, two layers, noisy routing and dropout, on eight devices."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "verse.txt").write_text(VERSE * 100)
    return Config(
        model=ModelConfig(
            context_length=16,
            num_layers=2,
            embed_dim=32,
            num_heads=2,
            dropout_rate=0.05,
            moe=MoEConfig(num_experts=4, expert_dim=32, router="noisy_top_k", dispatch="einsum"),
        ),
        data=DataConfig(path=str(folder / "verse.txt"), tokenizer="char", val_fraction=0.1, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        train=TrainConfig(num_steps=30, eval_every=10, checkpoint_every=10, log_every=5),
        sample=SampleConfig(max_new_tokens=20),
    )


def cache_home(tmp_path_factory) -> str:
    return str(tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(autouse=True)
def one_cache_for_all(monkeypatch, tmp_path_factory):
    """Neither the user's cache nor an old one; the runs here share their compiled programs."""
    monkeypatch.setenv("XDG_CACHE_HOME", cache_home(tmp_path_factory))


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """The run directory of ``tiny``, trained without interruption."""
    from moe_jax.commands.training import train
    from moe_jax.runs.layout import RunDirectory

    folder = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", cache_home(tmp_path_factory))
        train(tiny, folder)
    return RunDirectory(folder)


@pytest.fixture
def change(tiny):
    """``tiny`` with some fields of some sections replaced: change(train={"num_steps": 3})."""

    def make(**sections) -> Config:
        replaced = {name: dataclasses.replace(getattr(tiny, name), **values) for name, values in sections.items()}
        return dataclasses.replace(tiny, **replaced)

    return make
