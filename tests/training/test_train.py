"""Whole runs: they learn, leave what the contract says, resume bit for bit and answer signals."""

import collections
import dataclasses
import json
import math
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from moe_jax.config import MoEConfig
from moe_jax.data.dataset import open_prepared
from moe_jax.errors import Interrupted, UserError
from moe_jax.files import cache_folder
from moe_jax.prepare.folder import prepare_folder
from moe_jax.prepare.settings import PrepareConfig
from moe_jax.runs.layout import RunDirectory, saved_steps
from moe_jax.runs.metrics_file import read_metrics
from moe_jax.sampling.engine import load_generator, load_variables
from moe_jax.training.loop import Loop
from moe_jax.training.train import train
from tests.oracles.texts import VERSE


def column(run, name):
    return {line["step"]: line[name] for line in read_metrics(run.metrics_file) if name in line}


def test_thirty_steps_beat_the_unigram_entropy(finished):
    counts = np.array(list(collections.Counter(VERSE).values())) / len(VERSE)
    entropy = -np.sum(counts * np.log(counts))
    losses = column(finished, "val/loss")
    assert list(losses) == [10, 20, 30]
    assert losses[30] < entropy - 0.5
    assert losses[30] < losses[10]


def test_the_run_directory_is_as_the_contract_says(finished, tiny):
    names = {item.name for item in finished.path.iterdir()}
    assert names == {
        *("config.json", "tokenizer", "checkpoints", "metrics.jsonl", "train.log", "tensorboard", ".lock"),
        *("loss_curve.png", "expert_load.png"),
    }
    saved = finished.load_config()
    assert saved.optimizer.decay_steps == 30
    unresolved = dataclasses.replace(saved.optimizer, decay_steps=None)
    assert dataclasses.replace(saved, optimizer=unresolved) == tiny
    assert sorted(int(item.name) for item in finished.checkpoints.iterdir()) == [20, 30]
    log = finished.log_file.read_text()
    for words in ("active for a token", "step 30: train", "sample:", "python sample.py --workdir"):
        assert words in log


def test_metrics_hold_every_promised_name(finished):
    lines = read_metrics(finished.metrics_file)
    train_line = next(line for line in lines if line["step"] == 25)
    assert set(train_line) == {
        *("step", "train/loss", "train/grad_norm", "train/learning_rate", "train/tokens_per_second"),
        *("moe/load_balancing_loss", "moe/importance_loss", "moe/router_z_loss", "moe/expert_usage", "moe/sparsity"),
        *("moe/dropped_fraction", "moe/router_entropy", "moe/max_load", "moe/dead_experts"),
    }
    evaluation = next(line for line in lines if "val/loss" in line)
    assert set(evaluation) == {
        *("step", "train_eval/loss", "train_eval/perplexity", "val/loss", "val/perplexity", "val/bits_per_byte"),
        *("moe/load", "moe/layer_max_load", "moe/layer_dead_experts", "moe/layer_router_entropy"),
    }
    load = np.array(evaluation["moe/load"])
    assert load.shape == (2, 4)
    np.testing.assert_allclose(load.sum(axis=1), 1, rtol=1e-5)
    # One token a character, one byte a character.
    np.testing.assert_allclose(evaluation["val/bits_per_byte"], evaluation["val/loss"] / math.log(2), rtol=1e-9)
    np.testing.assert_allclose(evaluation["val/perplexity"], math.exp(evaluation["val/loss"]), rtol=1e-9)


def parameters(run):
    return load_variables(run, "newest")


# Step 15 is one that is only logged: the signal comes between the decision not to save and the end of the turn.
@pytest.mark.parametrize(
    ("number", "at"), [pytest.param(signal.SIGINT, 7, marks=pytest.mark.slow), (signal.SIGTERM, 15)]
)
def test_an_interrupted_run_goes_on_and_ends_bit_identical(tiny, finished, tmp_path, monkeypatch, number, at):
    run = RunDirectory(tmp_path / "run")
    read, sent = Loop._read, []

    def interrupt(self, output, bar, done):
        read(self, output, bar, done)
        if done == at and not sent:
            sent.append(done)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Loop, "_read", interrupt)
    with pytest.raises(Interrupted) as caught:
        train(tiny, run.path)
    assert caught.value.exit_code == 128 + number
    monkeypatch.setattr(Loop, "_read", read)
    shutil.rmtree(cache_folder("data"))  # the same text, prepared anew
    saved = saved_steps(run.checkpoints)[-1]
    assert at <= saved <= at + 2
    assert f"interrupted: the checkpoint of step {saved} is on disk" in run.log_file.read_text()
    train(tiny, run.path)
    # A line that the interruption made averages over fewer steps; what it averaged is the same.
    assert f"going on from step {saved}" in run.log_file.read_text()
    final = read_metrics(run.metrics_file)[-1]
    assert final == read_metrics(finished.metrics_file)[-1]
    for got, want in zip(jax.tree.leaves(parameters(run)), jax.tree.leaves(parameters(finished)), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_a_mixture_in_packed_rows_goes_on_and_ends_bit_identical(change, tmp_path, monkeypatch):
    """Corpora of documents, epochs instead of steps, token dropout, Muon, WSD: stopped in the second epoch."""
    for name, texts in (("long", [VERSE * 3, VERSE * 2] * 12), ("short", [VERSE[: 9 + n] for n in range(30)])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    inputs = tuple(f"{name}={tmp_path / name}.jsonl" for name in ("long", "short"))
    prepare_folder(
        PrepareConfig(input=inputs, out=str(tmp_path / "data"), tokenizer="bpe:300", weights=("long=1", "short=1"))
    )
    config = change(
        model={"num_layers": 1},
        data={
            "path": str(tmp_path / "data"),
            "tokenizer": None,
            "val_fraction": None,
            "mode": "packed",
            "batch_size": 8,
            "token_dropout": 0.1,
        },
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
    data = open_prepared(tmp_path / "data")
    tokens, size = (sum(getattr(s, name) for s in data.splits("val")) for name in ("num_tokens", "num_bytes"))
    np.testing.assert_allclose(last["val/bits_per_byte"], last["val/loss"] * tokens / size / math.log(2), rtol=1e-9)
    read, at, sent = Loop._read, steps // 2 + 1, []

    def interrupt(self, output, bar, done):
        read(self, output, bar, done)
        if done == at and not sent:
            sent.append(done)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Loop, "_read", interrupt)
    with pytest.raises(Interrupted):
        train(config, run.path)
    monkeypatch.setattr(Loop, "_read", read)
    train(config, run.path)
    assert "going on from step" in run.log_file.read_text()
    assert read_metrics(run.metrics_file)[-1] == last
    for got, want in zip(jax.tree.leaves(parameters(run)), jax.tree.leaves(parameters(straight)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_finished_run_says_so_and_can_be_extended(tiny, finished, change, tmp_path, capsys):
    before = finished.metrics_file.read_bytes()
    train(tiny, finished.path)
    assert "is finished: 30 steps are done" in capsys.readouterr().out
    assert finished.metrics_file.read_bytes() == before
    run = RunDirectory(tmp_path / "longer")
    shutil.copytree(finished.path, run.path)
    train(change(train={"num_steps": 36}), run.path)
    assert list(column(run, "val/loss")) == [10, 20, 30, 36]
    # The schedule ended where the first start had its end: the rate stays at a tenth of the peak.
    assert run.load_config().optimizer.decay_steps == 30
    np.testing.assert_allclose(column(run, "train/learning_rate")[36], 1e-3, rtol=1e-5)


def test_a_run_stops_when_its_patience_ends(change, tmp_path, capsys):
    # A learning rate of almost nothing: no evaluation is better than the first by more than rounding.
    config = change(
        optimizer={"learning_rate": 1e-12}, train={"num_steps": 50, "eval_every": 2, "patience": 2, "log_every": 2}
    )
    train(config, tmp_path / "run")
    output = capsys.readouterr().out
    assert "stopped early: 2 evaluations without a lower validation loss" in output
    losses = column(RunDirectory(tmp_path / "run"), "val/loss")
    assert max(losses) < 50
    train(config, tmp_path / "run")
    assert "stopped early at step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"seed": 5}}, "train.seed was 0, now 5"),
        ({"optimizer": {"learning_rate": 0.5}}, "optimizer.learning_rate was 0.01, now 0.5"),
        ({"data": {"batch_size": 8}}, "data.batch_size was 16, now 8"),
    ],
)
def test_a_run_cannot_go_on_with_other_settings(finished, change, sections, words):
    before = {item: item.stat().st_mtime_ns for item in finished.path.rglob("*")}
    with pytest.raises(UserError) as caught:
        train(change(**sections), finished.path)
    assert words in str(caught.value)
    assert {item: item.stat().st_mtime_ns for item in finished.path.rglob("*")} == before


def test_stop_tokens_that_are_none_are_told_before_the_first_step(change, tmp_path, capsys):
    with pytest.raises(UserError, match=r"each of stop_tokens must be in \[0, \d+\], got 99999"):
        train(change(sample={"stop_tokens": (99999,)}), tmp_path / "run")
    assert not read_metrics(tmp_path / "run" / "metrics.jsonl")


def test_a_run_cannot_go_on_with_other_text(finished, change, tmp_path):
    (tmp_path / "verse.txt").write_text(VERSE.replace("quick", "quack") * 100)
    with pytest.raises(UserError, match="is not the one this run was trained on"):
        train(change(data={"path": str(tmp_path / "verse.txt")}, train={"num_steps": 40}), finished.path)


def test_the_same_text_elsewhere_is_the_same_text(finished, change, tmp_path, capsys):
    (tmp_path / "verse.txt").write_text(VERSE * 100)
    train(change(data={"path": str(tmp_path / "verse.txt")}), finished.path)
    assert "is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_router_state_is_saved_restored_and_sampled_with(change, tiny, tmp_path):
    moe = MoEConfig(num_experts=4, expert_dim=32, router="sigmoid_bias", bias_update_rate=0.01)
    short = {"num_steps": 4, "eval_every": 2, "checkpoint_every": 2, "log_every": 2}
    config = change(model={"moe": moe}, train=short, optimizer={"warmup_steps": 1, "decay_steps": 4})
    train(config, tmp_path / "whole")
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=2)), tmp_path / "parts")
    train(config, tmp_path / "parts")
    whole, parts = (parameters(RunDirectory(tmp_path / name)) for name in ("whole", "parts"))
    for got, want in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(got, want)
    # Four steps of 0.01 up or down, in every layer and for every expert but those at the mean.
    assert whole.expert_bias_NE.shape == (2, 4)
    assert 0.01 < float(np.max(np.abs(whole.expert_bias_NE))) <= 0.0401
    log = RunDirectory(tmp_path / "whole").log_file.read_text()
    assert "dispatch in training: blocked, the fastest measured on a CPU" in log


def test_a_run_trained_on_another_kind_of_device_can_be_sampled_from(finished, tmp_path):
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(finished.path, run.path)
    saved = finished.load_config()
    moe = dataclasses.replace(saved.model.moe, dispatch="tokamax", capacity_factor=None)
    run.save_config(dataclasses.replace(saved, model=dataclasses.replace(saved.model, moe=moe)))
    generator, variables = load_generator(run, "best")
    (sample,) = generator.generate(variables, "the", dataclasses.replace(saved.sample, max_new_tokens=3))
    assert len(sample.tokens) <= 3


def test_experts_that_choose_train_but_cannot_be_sampled_from(change, tmp_path):
    moe = MoEConfig(num_experts=4, expert_dim=32, router="expert_choice", capacity_factor=1.0)
    run = RunDirectory(tmp_path / "run")
    train(change(model={"moe": moe}, train={"num_steps": 2, "log_every": 1}, optimizer={"warmup_steps": 1}), run.path)
    log = run.log_file.read_text()
    assert "the validation loss has seen the future, and no text can be sampled" in log
    assert "dispatch in evaluation: gather" in log
    assert "sample" not in log.replace("no text can be sampled", "")
    with pytest.raises(UserError, match="expert_choice cannot be sampled from: its experts choose among all tokens"):
        load_generator(run, "best")
    assert {line.get("moe/dropped_fraction", 0.0) for line in read_metrics(run.metrics_file)} == {0.0}


def test_a_dense_run_with_a_profile_writes_no_moe_metrics_and_a_trace(change, tiny, tmp_path):
    moe = dataclasses.replace(tiny.model.moe, num_experts=0)
    train(
        change(
            model={"moe": moe}, train={"num_steps": 4, "log_every": 2, "profile": "2:3"}, optimizer={"warmup_steps": 1}
        ),
        tmp_path / "run",
    )
    run = RunDirectory(tmp_path / "run")
    assert not [name for line in read_metrics(run.metrics_file) for name in line if name.startswith("moe/")]
    assert not run.expert_load.exists()
    assert run.loss_curve.exists()
    assert list(run.profile.rglob("*.xplane.pb"))


def test_a_start_that_died_before_its_first_checkpoint_binds_to_nothing(change, tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.save_config(change(train={"seed": 5}))
    train(change(train={"num_steps": 6}), run.path)
    assert run.load_config().train.seed == 0


def test_a_work_directory_that_is_a_file_is_refused(tiny, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="--workdir must be a folder"):
        train(tiny, tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_unknown_characters_leave_bits_per_byte_out(change, tmp_path):
    (tmp_path / "verse.txt").write_text(VERSE * 20 + "é" * 30)
    config = change(data={"path": str(tmp_path / "verse.txt"), "val_fraction": 0.2}, train={"num_steps": 2})
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, warmup_steps=1))
    train(config, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    evaluation = json.loads(run.metrics_file.read_text().splitlines()[-1])
    assert "val/loss" in evaluation
    assert "val/bits_per_byte" not in evaluation
