"""A trained run, opened for reading."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import Config
from moe_jax.data.tokenizer import ByteTokenizer
from moe_jax.data.tokenizer_file import save_tokenizer
from moe_jax.errors import UserError
from moe_jax.runs.checkpoint import restore
from moe_jax.runs.checkpoint.record import Found, Record
from moe_jax.runs.checkpoint.save import Checkpoints, Retention
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.opened import open_run

PARAMS = {"params": {"w": jax.ShapeDtypeStruct((8,), jnp.float32)}}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The run runs/tiny of the working folder, whose better checkpoint is the older one."""
    monkeypatch.chdir(tmp_path)
    run = RunDirectory(tmp_path / "runs" / "tiny")
    run.path.mkdir(parents=True)
    run.save_config(Config())
    save_tokenizer(ByteTokenizer("endoftext"), run.tokenizer)
    with Checkpoints(run.checkpoints, None, Retention(2, 1)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(Record(step=step, val_loss=1.0 * step), {"params": {"w": jnp.full(8, 1.0 * step)}})
    return run


@pytest.mark.parametrize(("which", "step"), [("best", 1), ("newest", 2)])
def test_an_opened_run_has_all_that_sampling_needs(run, which, step):
    for workdir in (run.path, None):
        opened = open_run(workdir, which)
        assert (opened.directory.path.resolve(), opened.is_latest) == (run.path, workdir is None)
        assert (opened.config, opened.tokenizer.name, opened.checkpoint.record.step) == (Config(), "byte", step)
        assert opened.restore(PARAMS)["params"]["w"][0] == step


@pytest.mark.parametrize(("name", "words"), [
    ("config.json", "is not a run directory"),
    ("tokenizer/tokenizer.json", "no tokenizer at"),
    ("checkpoints/2/record/metadata", r"newest .* is damaged \(record/metadata is missing\).*--checkpoint best"),
])  # fmt: skip
def test_what_is_missing_is_found_before_any_array_is_read(run, name, words):
    (run.path / name).unlink()
    with pytest.raises(UserError, match=words):
        open_run(run.path, "newest")


def test_damaged_arrays_are_found_when_they_are_asked_for(run):
    next((run.checkpoints / "1" / "params").rglob("d/*")).unlink()
    opened = open_run(run.path, "best")
    with pytest.raises(UserError, match=r"is damaged \(params/.* is missing\).*, or use --checkpoint newest"):
        opened.restore(PARAMS)


@pytest.mark.parametrize(("owner", "name"), [(Found, "check"), (restore, "restore_items")])
def test_a_checkpoint_that_a_training_removes_meanwhile_is_chosen_anew(run, monkeypatch, owner, name):
    opened, read = open_run(run.path, "best"), getattr(owner, name)

    def late(*arguments):
        shutil.rmtree(run.checkpoints / "1", ignore_errors=True)
        return read(*arguments)

    monkeypatch.setattr(owner, name, late)
    opened.check(PARAMS)
    assert opened.restore(PARAMS)["params"]["w"][0] == 2
    assert opened.checkpoint.record.step == 2


def test_checkpoints_that_come_and_go_faster_than_they_are_read(run, monkeypatch):
    opened = open_run(run.path, "newest")
    monkeypatch.setattr(Path, "exists", lambda path: False)
    with pytest.raises(UserError, match=r"replaces the checkpoints of .* faster than they can be read; wait for it"):
        opened.check(["params"])
