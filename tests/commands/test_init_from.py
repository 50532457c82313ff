"""A new run from the parameters of another one."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from moe_jax.commands.training import train
from moe_jax.errors import UserError
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.opened import open_run
from moe_jax.sampling.api import load_variables
from moe_jax.training.loop import Loop
from tests.oracles.runs import write_run
from tests.oracles.texts import VERSE


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    """A run whose best checkpoint is not its newest one."""
    return write_run(tmp_path_factory.mktemp("runs") / "source", tiny, losses=(3.0, 5.0))


def test_a_new_run_begins_with_the_best_parameters_of_another_and_goes_on_without_it(
    source, change, tmp_path, monkeypatch, capsys
):
    (tmp_path / "verse.txt").write_text(VERSE.replace("quick", "kciuq") * 80)
    begun, original = [], Loop.run

    def run(self, request):
        begun.append(jax.device_get(self.state.variables))
        original(self, request)

    monkeypatch.setattr(Loop, "run", run)
    copy, tuned = RunDirectory(tmp_path / "copy"), RunDirectory(tmp_path / "tuned")
    shutil.copytree(source.path, copy.path)
    config = change(
        # Other text of the same characters, another rate; a GPU's option, which XLA knows on a processor too.
        data={"path": str(tmp_path / "verse.txt")},
        optimizer={"learning_rate": 1e-3, "warmup_steps": 0},
        mesh={"data": 1},
        train={"num_steps": 1, "init_from": str(copy.path), "deterministic": True},
    )
    train(config, tuned.path)
    assert "parameters are those of the best checkpoint of" in capsys.readouterr().out
    want = load_variables(open_run(source.path, "best"))
    for got, expected in zip(jax.tree.leaves(begun[0]), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert np.any(jax.tree.leaves(load_variables(open_run(source.path, "newest")))[0] != jax.tree.leaves(want)[0])
    shutil.rmtree(copy.path)  # from here on it goes on without
    with pytest.raises(UserError, match=r"train.init_from was .*copy, now elsewhere"):
        train(dataclasses.replace(config, train=dataclasses.replace(config.train, init_from="elsewhere")), tuned.path)
    train(config, tuned.path)
    assert "is finished: 1 steps are done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"embed_dim": 64, "num_layers": 1}}, "model.num_layers is 2 there, 1 here; model.embed_dim is 32"),
        ({"model": {"activation": "gelu"}}, "model.activation is swiglu there, gelu here"),
        ({"data": {"tokenizer": "byte"}}, "has other tokens than the text here; set data.tokenizer to"),
        ({"train": {"init_from": "nowhere"}}, "nowhere is not a run directory"),
    ],
)
def test_another_model_or_other_tokens_are_refused_and_nothing_is_made(source, change, tmp_path, sections, words):
    sections = {**sections, "train": {"init_from": str(source.path), **sections.get("train", {})}}
    with pytest.raises(UserError) as caught:
        train(change(**sections), tmp_path / "new")
    assert words in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_run_cannot_begin_with_itself(change, tmp_path):
    with pytest.raises(UserError, match=r"train.init_from must be another run than --workdir"):
        train(change(train={"init_from": str(tmp_path / "run")}), tmp_path / "run")


@pytest.mark.slow
def test_dropout_and_the_context_may_be_others(source, change, tmp_path):
    config = change(
        model={"context_length": 8, "dropout_rate": 0.3, "remat": "full"},
        train={"init_from": str(source.path), "num_steps": 2, "log_every": 1},
        optimizer={"warmup_steps": 1},
    )
    train(config, tmp_path / "new")
    assert "parameters are those of the best checkpoint" in RunDirectory(tmp_path / "new").log_file.read_text()
