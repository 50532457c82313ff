"""Whole runs: they learn, leave what the contract says, and end when they should."""

import collections
import dataclasses
import math
import os
import shutil

import numpy as np
import pytest

from moe_jax.commands import training
from moe_jax.commands.training import train
from moe_jax.errors import EnvironmentFault, UserError
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.metrics_file import read_metrics
from moe_jax.runs.opened import open_run
from moe_jax.sampling.api import load_engine
from moe_jax.training.loop import Loop
from moe_jax.training.observers import Observer
from tests import tiny as runs
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


def test_a_device_with_too_little_memory_is_one_line(tiny, tmp_path, monkeypatch):
    def exhausted(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1099511627776 bytes.")

    monkeypatch.setattr(training, "restore_or_init", exhausted)
    with pytest.raises(EnvironmentFault, match=r"1,048,576 MiB; raise --optimizer\.accumulation-steps or lower"):
        train(tiny, tmp_path / "run")


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


def test_a_finished_run_says_so_and_can_be_extended(tiny, finished, change, tmp_path, capsys):
    before = finished.metrics_file.read_bytes()
    (tmp_path / "verse.txt").write_text(VERSE * 100)  # the same text elsewhere is the same text
    train(change(data={"path": str(tmp_path / "verse.txt")}), finished.path)
    assert "is finished: 30 steps are done" in capsys.readouterr().out
    assert finished.metrics_file.read_bytes() == before
    run = RunDirectory(tmp_path / "longer")
    shutil.copytree(finished.path, run.path)
    train(change(train={"num_steps": 36}), run.path)
    assert list(column(run, "val/loss")) == [10, 20, 30, 36]
    # The schedule ended where the first start had its end: the rate stays at a tenth of the peak.
    assert run.load_config().optimizer.decay_steps == 30
    np.testing.assert_allclose(column(run, "train/learning_rate")[36], 1e-3, rtol=1e-5)


def test_a_finished_run_without_pictures_of_its_end_gets_them(tiny, finished, tmp_path, monkeypatch):
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(finished.path, run.path)
    run.loss_curve.unlink()  # as if it had been killed before it drew them
    train(tiny, run.path)
    picture = run.loss_curve.read_bytes()
    run.loss_curve.write_bytes(b"of an earlier step")
    os.utime(run.loss_curve, (0, 0))
    ended = []
    monkeypatch.setattr(training, "end_what_was_left", lambda *arguments: ended.append(arguments[1:]))
    train(runs.change(tiny, train={"trackers": ("mlflow",)}), run.path)
    assert run.loss_curve.read_bytes() == picture
    ((_, step, files),) = ended
    assert (step, files) == (30, [run.loss_curve, run.expert_load])


@pytest.mark.slow
def test_a_run_stops_when_its_patience_ends(small, tmp_path, capsys):
    # A learning rate of almost nothing: no evaluation is better than the first by more than rounding.
    config = small(
        optimizer={"learning_rate": 1e-12}, train={"num_steps": 50, "eval_every": 2, "patience": 2, "log_every": 2}
    )
    train(config, tmp_path / "run")
    output = capsys.readouterr().out
    assert "stopped early: 2 evaluations without a lower validation loss" in output
    assert list(column(RunDirectory(tmp_path / "run"), "val/loss")) == [2, 4, 6]
    train(config, tmp_path / "run")
    assert "stopped early at step" in capsys.readouterr().out


def test_stop_tokens_that_are_none_are_reported_before_anything_is_made(change, tmp_path):
    with pytest.raises(UserError, match=r"each of stop_tokens must be in \[0, \d+\], got 99999"):
        train(change(sample={"stop_tokens": (99999,)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_trained_on_another_kind_of_device_can_be_sampled_from(finished, tmp_path):
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(finished.path, run.path)
    saved = finished.load_config()
    moe = dataclasses.replace(saved.model.moe, dispatch="pallas", capacity_factor=None)
    run.save_config(dataclasses.replace(saved, model=dataclasses.replace(saved.model, moe=moe)))
    generator, variables = load_engine(open_run(run.path, "best"))
    (sample,) = generator.generate(variables, "the", dataclasses.replace(saved.sample, max_new_tokens=3))
    assert len(sample.tokens) <= 3


def test_experts_that_choose_train_but_cannot_be_sampled_from(small, tmp_path):
    moe = {"router": "expert_choice", "capacity_factor": 1.0, "dispatch": "auto"}
    run = RunDirectory(tmp_path / "run")
    train(small(moe=moe, train={"num_steps": 2, "log_every": 1}), run.path)
    log = run.log_file.read_text()
    assert "the validation loss has seen the future, and no text can be sampled" in log
    assert "dispatch in evaluation: gather" in log
    assert "sample" not in log.replace("no text can be sampled", "")
    with pytest.raises(UserError, match="expert_choice cannot be sampled from: its experts choose among all tokens"):
        load_engine(open_run(run.path, "best"))
    assert {line.get("moe/dropped_fraction", 0.0) for line in read_metrics(run.metrics_file)} == {0.0}


def test_a_dense_run_with_a_profile_and_unknown_characters_in_a_folder_of_any_name(small, tmp_path):
    folder = tmp_path / os.fsdecode(b"lr[0.1] $x_\xff")
    folder.mkdir()
    (folder / "verse.txt").write_text(VERSE * 20 + "é" * 30)
    run = RunDirectory(folder / folder.name)
    steps = {"num_steps": 4, "log_every": 2, "profile": "2:3"}
    data = {"path": str(folder / "verse.txt"), "val_fraction": 0.2}
    train(small(moe={"num_experts": 0}, data=data, train=steps), run.path)
    names = {name for line in read_metrics(run.metrics_file) for name in line}
    assert not [name for name in names if name.startswith("moe/")]
    assert not run.expert_load.exists()
    assert run.loss_curve.exists()
    assert list(run.profile.rglob("*.xplane.pb"))
    assert open_run(run.path, "newest").config.data.path == data["path"]
    # What unknown tokens stand for has no known size.
    assert "val/loss" in names
    assert "val/bits_per_byte" not in names


class Endings(Observer):
    """Notes how it was closed."""

    def __init__(self, found):
        self._found = found

    def close(self, ending, files):
        self._found.append((ending, [file.name for file in files]))


@pytest.mark.parametrize("error", [None, RuntimeError("a fault of ours"), KeyboardInterrupt()])
def test_observers_are_closed_with_how_the_run_ended(small, tmp_path, monkeypatch, error):
    found, run, observers = [], Loop.run, training._observers

    def fail(self):
        state = run(self)
        if error is not None:
            raise error
        return state

    monkeypatch.setattr(Loop, "run", fail)
    monkeypatch.setattr(training, "_observers", lambda *made: [Endings(found), *observers(*made), Endings(found)])
    config = small(train={"num_steps": 1, "log_every": 1})
    if error is None:
        train(config, tmp_path / "run")
        assert found == [("finished", ["loss_curve.png", "expert_load.png"])] * 2
    else:
        with pytest.raises(type(error)):
            train(config, tmp_path / "run")
        assert found == [("failed", [])] * 2
