"""A new run from the parameters of another one."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from moe_jax.command import UserError
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.metrics import read_metrics
from moe_jax.sampling.generator import load_generator
from moe_jax.training.loop import Loop
from moe_jax.training.run import train
from tests.oracles.texts import VERSE


def test_a_new_run_begins_with_the_best_parameters_of_another_and_goes_on_without_it(
    finished, change, tmp_path, monkeypatch, capsys
):
    (tmp_path / "verse.txt").write_text(VERSE.replace("quick", "kciuq") * 80)
    begun, original = [], Loop.run

    def run(self, request):
        begun.append(jax.device_get(self.state.variables))
        original(self, request)

    monkeypatch.setattr(Loop, "run", run)
    source, tuned = RunDirectory(tmp_path / "source"), RunDirectory(tmp_path / "tuned")
    shutil.copytree(finished.path, source.path)
    config = change(
        # Other text of the same characters, another rate.
        data={"path": str(tmp_path / "verse.txt")},
        optimizer={"learning_rate": 1e-3, "warmup_steps": 1},
        train={"num_steps": 4, "init_from": str(source.path), "eval_every": 2},
    )
    train(config, tuned.path)
    assert "parameters are those of the best checkpoint of" in capsys.readouterr().out
    want = load_generator(source, "best")[1]
    for got, expected in zip(jax.tree.leaves(begun[0]), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert read_metrics(tuned.metrics_file)[0]["train/loss"] < 3
    shutil.rmtree(source.path)
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=5)), tuned.path)
    assert "going on from step 4" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"train.init_from was .*source, now elsewhere"):
        train(dataclasses.replace(config, train=dataclasses.replace(config.train, init_from="elsewhere")), tuned.path)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"embed_dim": 64, "num_layers": 1}}, "model.num_layers is 2 there, 1 here; model.embed_dim is 32"),
        ({"model": {"activation": "gelu"}}, "model.activation is swiglu there, gelu here"),
        ({"data": {"tokenizer": "byte"}}, "has other tokens than the text here; set data.tokenizer to"),
        ({"train": {"init_from": "nowhere"}}, "nowhere is not a run directory"),
    ],
)
def test_another_model_or_other_tokens_are_refused_and_nothing_is_made(finished, change, tmp_path, sections, words):
    sections = {**sections, "train": {"init_from": str(finished.path), **sections.get("train", {})}}
    with pytest.raises(UserError) as caught:
        train(change(**sections), tmp_path / "new")
    assert words in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_run_cannot_begin_with_itself(change, tmp_path):
    with pytest.raises(UserError, match=r"train.init_from must be another run than --workdir"):
        train(change(train={"init_from": str(tmp_path / "run")}), tmp_path / "run")


def test_dropout_noise_and_the_context_may_be_others(finished, change, tmp_path):
    config = change(
        model={"context_length": 8, "dropout_rate": 0.3, "remat": "full"},
        # A GPU's option, which XLA knows on a processor too.
        train={"init_from": str(finished.path), "num_steps": 2, "log_every": 1, "deterministic": True},
        optimizer={"warmup_steps": 1},
    )
    train(config, tmp_path / "new")
    assert read_metrics(RunDirectory(tmp_path / "new").metrics_file)[0]["train/loss"] < 3
