"""Stopped and gone on with, a run ends as one that was not, in every data mode and on one device as on eight."""

import json
import math
import shutil
import signal

import jax
import numpy as np
import pytest

from moe_jax.commands.training import train
from moe_jax.data.dataset import open_dataset
from moe_jax.errors import UserError
from moe_jax.files import cache_folder
from moe_jax.prepare.folder import prepare_folder
from moe_jax.prepare.settings import PrepareConfig
from moe_jax.runs.layout import RunDirectory, saved_steps
from moe_jax.runs.metrics_file import read_metrics
from tests import tiny as runs
from tests.oracles.texts import VERSE
from tests.tiny import arrays, assert_same_arrays, stop_at


# Step 15 is one that is only logged: the signal comes between the decision not to save and the end of the turn.
@pytest.mark.slow  # by kill -9, tests/end_to_end/test_kills.py does it in the default run
@pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, 7), (signal.SIGTERM, 15)])
def test_an_interrupted_run_goes_on_and_ends_bit_identical(tiny, finished, tmp_path, number, at):
    run = RunDirectory(tmp_path / "run")
    with stop_at(at, number):
        train(tiny, run.path)
    shutil.rmtree(cache_folder("data"))  # the same text, prepared anew
    saved = saved_steps(run.checkpoints)[-1]
    assert at <= saved <= at + 2
    assert f"interrupted: the checkpoint of step {saved} is on disk" in run.log_file.read_text()
    train(tiny, run.path)
    # A line that the interruption made averages over fewer steps; what it averaged is the same.
    assert f"going on from step {saved}" in run.log_file.read_text()
    assert read_metrics(run.metrics_file)[-1] == read_metrics(finished.metrics_file)[-1]
    assert_same_arrays(run.path, finished.path)


def test_moments_in_bfloat16_go_on_to_the_same_bits(small, tmp_path):
    train_settings = {"num_steps": 9, "eval_every": 9, "checkpoint_every": 9, "log_every": 3}
    config = small(train=train_settings, optimizer={"mu_dtype": "bfloat16", "warmup_steps": 0})
    train(config, tmp_path / "straight")
    with stop_at(4):
        train(config, tmp_path / "stopped")
    train(config, tmp_path / "stopped")
    assert "going on from step" in RunDirectory(tmp_path / "stopped").log_file.read_text()
    assert_same_arrays(tmp_path / "stopped", tmp_path / "straight")
    kept = arrays(tmp_path / "straight", "optimizer_state")
    assert {value.dtype.name for name, value in kept.items() if "'mu'" in name} == {"bfloat16"}
    with pytest.raises(UserError, match="mu_dtype was bfloat16, now float32"):
        train(runs.change(config, optimizer={"mu_dtype": "float32"}), tmp_path / "stopped")


def config_of(folder, mode="windows", devices=8, **train):
    """Noisy routing and dropout everywhere, in three epochs of documents; written into ``folder``."""
    documents = [VERSE[: 20 + 7 * n] for n in range(40)]
    (folder / "verse.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return runs.change(
        runs.CONFIG,
        data={
            "path": str(folder / "verse.jsonl"),
            "val_fraction": 0.2,
            "mode": mode,
            "batch_size": 8,
            "token_dropout": 0.1,
        },
        optimizer={"warmup_steps": 3},
        mesh={"data": devices},
        train={"num_steps": 14, "eval_every": 14, "checkpoint_every": 4, "log_every": 3, **train},
        sample={"max_new_tokens": 2},
    )


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("mode", ["windows", "packed", "padded"])
def test_a_run_that_was_stopped_ends_bit_identical_in_every_mode(tmp_path, mode, devices):
    config, straight, stopped = config_of(tmp_path, mode, devices), tmp_path / "straight", tmp_path / "stopped"
    train(config, straight)
    with stop_at(6):
        train(config, stopped)
    train(config, stopped)
    assert read_metrics(straight / "metrics.jsonl")[-1] == read_metrics(stopped / "metrics.jsonl")[-1]
    assert_same_arrays(stopped, straight)


@pytest.mark.slow
def test_on_other_devices_a_run_goes_on_from_the_same_values(tmp_path):
    eight, one = config_of(tmp_path, devices=8), config_of(tmp_path, devices=1)
    train(eight, tmp_path / "straight")
    with stop_at(6):
        train(eight, tmp_path / "moved")
    train(one, tmp_path / "moved")
    got, want = (arrays(tmp_path / name, "params") for name in ("moved", "straight"))
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=0.1, atol=2e-3)  # sums of other orders, through Adam


@pytest.mark.slow
def test_a_mixture_in_packed_rows_goes_on_and_ends_bit_identical(change, tmp_path):
    """Corpora of documents, epochs instead of steps, token dropout, Muon, WSD: stopped in the second epoch."""
    for name, texts in (("long", [VERSE * 3, VERSE * 2] * 12), ("short", [VERSE[: 9 + n] for n in range(30)])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    inputs = tuple(f"{name}={tmp_path / name}.jsonl" for name in ("long", "short"))
    prepare_folder(
        PrepareConfig(input=inputs, out=str(tmp_path / "data"), tokenizer="bpe:300", weights=("long=1", "short=1"))
    )
    data = {"path": str(tmp_path / "data"), "tokenizer": None, "val_fraction": None, "mode": "packed", "batch_size": 8}
    config = change(
        model={"num_layers": 1},
        data={**data, "token_dropout": 0.1},
        optimizer={"name": "muon", "schedule": "wsd"},
        train={"num_epochs": 2, "eval_every": 1000},
    )
    straight, run = RunDirectory(tmp_path / "straight"), RunDirectory(tmp_path / "run")
    train(config, straight.path)
    steps = straight.load_config().train.num_steps
    assert f"rows: packed; {steps // 2} steps are an epoch, 2.00 epochs in all" in straight.log_file.read_text()
    last = read_metrics(straight.metrics_file)[-1]
    assert {"val/loss", "val/loss/long", "val/loss/short", "val/bits_per_byte"} <= set(last)
    # Bits per byte of both texts from the bytes themselves: tokens scored are those of the documents and their ends.
    splits = open_dataset(tmp_path / "data").splits("val")
    tokens, size = (sum(getattr(split, name) for split in splits) for name in ("num_tokens", "num_bytes"))
    np.testing.assert_allclose(last["val/bits_per_byte"], last["val/loss"] * tokens / size / math.log(2), rtol=1e-9)
    with stop_at(steps // 2 + 1, signal.SIGINT):
        train(config, run.path)
    train(config, run.path)
    assert "going on from step" in run.log_file.read_text()
    assert read_metrics(run.metrics_file)[-1] == last
    assert_same_arrays(run.path, straight.path)


@pytest.mark.slow
def test_router_state_is_saved_restored_and_sampled_with(change, tmp_path):
    moe = {"router": "sigmoid_bias", "bias_update_rate": 0.01, "dispatch": "auto"}
    short = {"num_steps": 4, "eval_every": 2, "checkpoint_every": 2, "log_every": 2}
    config = change(moe=moe, train=short, optimizer={"warmup_steps": 1, "decay_steps": 4})
    train(config, tmp_path / "whole")
    train(runs.change(config, train={"num_steps": 2}), tmp_path / "parts")
    train(config, tmp_path / "parts")
    assert_same_arrays(tmp_path / "parts", tmp_path / "whole")
    # Four steps of 0.01 up or down, in every layer and for every expert but those at the mean.
    (bias_NE,) = arrays(tmp_path / "whole", "router_state").values()
    assert bias_NE.shape == (2, 4)
    assert 0.01 < np.max(np.abs(bias_NE)) <= 0.0401
    log = RunDirectory(tmp_path / "whole").log_file.read_text()
    assert "dispatch in training: blocked, the fastest measured on a CPU" in log
    assert "attention in training: full, in evaluation: full" in log


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
    assert_same_arrays(tmp_path / "one", tmp_path / "two")
