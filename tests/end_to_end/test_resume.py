"""Stopped and gone on with, a run ends as one that was not, in every data mode and on one device as on eight."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from moe_jax.commands.training import train
from moe_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)
from moe_jax.errors import Interrupted, UserError
from moe_jax.runs.layout import saved_steps
from moe_jax.runs.metrics_file import read_metrics
from moe_jax.runs.opened import open_run
from moe_jax.sampling.api import load_variables
from moe_jax.training.loop import Loop
from tests.oracles.texts import VERSE


@pytest.fixture(scope="module", autouse=True)
def one_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def config_of(folder, mode="windows", devices=8, **settings):
    """Noisy routing and dropout everywhere, in three epochs of documents; written into ``folder``."""
    documents = [VERSE[: 20 + 7 * n] for n in range(40)]
    (folder / "verse.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return Config(
        model=ModelConfig(
            context_length=16,
            num_layers=1,
            embed_dim=16,
            num_heads=2,
            dropout_rate=0.1,
            moe=MoEConfig(num_experts=4, expert_dim=16, router="noisy_top_k"),
        ),
        data=DataConfig(
            path=str(folder / "verse.jsonl"),
            tokenizer="char",
            val_fraction=0.2,
            mode=mode,
            batch_size=8,
            token_dropout=0.1,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=3),
        mesh=MeshConfig(data=devices),
        train=TrainConfig(**{"num_steps": 14, "eval_every": 14, "checkpoint_every": 4, "log_every": 3, **settings}),
        sample=SampleConfig(max_new_tokens=2),
    )


def stop_and_go_on(config, workdir, at, monkeypatch, going_on=None):
    """SIGTERM after step ``at``, then the same command, or ``going_on``."""
    read, sent = Loop._read, []

    def interrupt(self, output, done):
        read(self, output, done)
        if done == at and not sent:  # a second signal would be the end of this process
            sent.append(done)
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_read", interrupt)
        with pytest.raises(Interrupted):
            train(config, workdir)
    train(going_on or config, workdir)


def parameters(workdir):
    return jax.tree.leaves(load_variables(open_run(workdir, "newest")))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("mode", ["windows", "packed", "padded"])
def test_a_run_that_was_stopped_ends_bit_identical(tmp_path, monkeypatch, mode, devices):
    config = config_of(tmp_path, mode, devices)
    train(config, tmp_path / "straight")
    stop_and_go_on(config, tmp_path / "stopped", 6, monkeypatch)
    lines = [read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("straight", "stopped")]
    assert lines[0] == lines[1]
    for got, want in zip(parameters(tmp_path / "stopped"), parameters(tmp_path / "straight"), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_on_other_devices_a_run_goes_on_from_the_same_values(tmp_path, monkeypatch):
    eight, one = config_of(tmp_path, devices=8), config_of(tmp_path, devices=1)
    train(eight, tmp_path / "straight")
    stop_and_go_on(eight, tmp_path / "moved", 6, monkeypatch, going_on=one)
    for got, want in zip(parameters(tmp_path / "moved"), parameters(tmp_path / "straight"), strict=True):
        np.testing.assert_allclose(got, want, rtol=0.1, atol=2e-3)  # sums of other orders, through Adam


@pytest.mark.slow
def test_checkpoints_for_good_and_random_numbers_of_another_kind(tmp_path):
    keep = {"keep_every": 3, "keep_epochs": True, "keep_checkpoints": 1}
    config = config_of(tmp_path, "padded", 1, num_steps=13, eval_every=13, **keep)
    train(config, tmp_path / "run")
    # 32 documents in rows of 8 make an epoch of more than 4 steps, for the longer ones are cut into parts.
    log = (tmp_path / "run" / "train.log").read_text()
    (epoch,) = {int(line.split("padded; ")[1].split()[0]) for line in log.splitlines() if "rows: padded" in line}
    assert saved_steps(tmp_path / "run" / "checkpoints") == sorted({3, 6, 9, 12, 13, *range(epoch, 14, epoch)})
    longer = config_of(tmp_path, "padded", 1, num_steps=15, eval_every=15)
    with jax.default_prng_impl("rbg"), pytest.raises(UserError, match="a run cannot go on with other random numbers"):
        train(longer, tmp_path / "run")
    assert saved_steps(tmp_path / "run" / "checkpoints")[-1] == 13


@pytest.mark.gpu
def test_on_a_gpu_deterministic_runs_give_the_same_bits(tmp_path):
    for name in ("one", "two"):
        train(config_of(tmp_path, devices=1, deterministic=True, num_steps=30, compile_cache=False), tmp_path / name)
    for got, want in zip(parameters(tmp_path / "one"), parameters(tmp_path / "two"), strict=True):
        np.testing.assert_array_equal(got, want)
