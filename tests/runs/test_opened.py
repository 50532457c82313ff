"""A trained run, opened for reading."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import Config
from moe_jax.data.tokenizer import build_tokenizer, save_tokenizer
from moe_jax.errors import UserError
from moe_jax.runs.checkpoint.record import Record
from moe_jax.runs.checkpoint.save import Checkpoints, Retention
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.opened import open_run

PARAMS = {"params": {"w": jnp.ones(8)}}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The run runs/tiny of the working folder, whose better checkpoint is the older one."""
    monkeypatch.chdir(tmp_path)
    run = RunDirectory(tmp_path / "runs" / "tiny")
    run.path.mkdir(parents=True)
    run.save_config(Config())
    save_tokenizer(build_tokenizer("byte", []), run.tokenizer)
    with Checkpoints(run.checkpoints, None, Retention(2, 1)) as checkpoints:
        for step in (1, 2):
            record = Record(step=step, val_loss=1.0 * step)
            checkpoints.save(record, jax.tree.map(lambda leaf, step=step: leaf * step, PARAMS))
    return run


def test_an_opened_run_has_all_that_sampling_needs(run):
    for which, step in (("best", 1), ("newest", 2)):
        opened = open_run(run.path, which)
        assert (opened.config, opened.tokenizer.name, opened.is_latest) == (Config(), "byte", False)
        assert opened.checkpoint.record.step == step
        assert opened.restore(jax.eval_shape(lambda: PARAMS))["params"]["w"][0] == step
    latest = open_run(None, "best")
    assert (latest.directory.path.resolve(), latest.is_latest) == (run.path, True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config.json", "is not a run directory"),
        ("tokenizer/tokenizer.json", "no tokenizer at"),
        (
            "checkpoints/2/record/metadata",
            r"newest .* is damaged \(record/metadata is missing\).*--checkpoint best",
        ),
    ],
)
def test_what_is_missing_is_found_before_any_array_is_read(run, name, words):
    (run.path / name).unlink()
    with pytest.raises(UserError, match=words):
        open_run(run.path, "newest")


def test_damaged_arrays_are_found_when_they_are_asked_for(run):
    next((run.checkpoints / "1" / "params").rglob("d/*")).unlink()
    opened = open_run(run.path, "best")
    with pytest.raises(UserError, match=r"is damaged \(params/.* is missing\).*, or use --checkpoint newest"):
        opened.restore(jax.eval_shape(lambda: PARAMS))
