"""What goes wrong inside of a training: losses that are no numbers, steps that hang, saves on a full disk."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from moe_jax.runs.checkpoint.seal import find_damage
from moe_jax.runs.layout import saved_steps
from tests.end_to_end.tiny import train


def check_same_end(workdir, straight):
    """The arrays of both last checkpoints have the same bits."""
    leaves = []
    for folder in (workdir / "checkpoints", straight / "checkpoints"):
        step = folder / str(saved_steps(folder)[-1])
        assert step.name == "40"
        with ocp.StandardCheckpointer() as checkpointer:
            leaves.append(
                [jax.tree.leaves(checkpointer.restore(step / item)) for item in ("params", "optimizer_state")]
            )
    for got, want in zip(jax.tree.leaves(leaves[0]), jax.tree.leaves(leaves[1]), strict=True):
        np.testing.assert_array_equal(got, want)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_saves_on_a_full_disk_are_told_tried_again_and_harm_nothing(home):
    space = home / "space"
    faults = {
        "file_size_limit": {"bytes": 6000, "until": str(space)},
        "space_after_failures": {"number": 2, "file": str(space)},
    }
    result = train(home, home / "full", faults)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    told = [line for line in result.stdout.splitlines() if "is not saved" in line]
    assert ["of step 5 " in told[0], "of step 10 " in told[1], len(told)] == [True, True, 2], told
    assert "File too large" in told[0]
    assert "none is on disk yet" in told[0]
    assert saved_steps(home / "full" / "checkpoints") == [35, 40]
    assert find_damage(home / "full" / "checkpoints" / "40") is None


@pytest.mark.slow
def test_a_run_whose_end_cannot_be_saved_says_so_and_goes_on_later(home, straight):
    faults = {"file_size_limit": {"bytes": 6000}}
    result = train(home, home / "never", faults)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: the checkpoint of step 40 could not be saved (")
    assert "none is on disk: free space in" in result.stderr
    assert "Traceback" not in result.stderr
    assert saved_steps(home / "never" / "checkpoints") == []
    assert train(home, home / "never", {}).returncode == 0
    check_same_end(home / "never", straight)


@pytest.mark.slow
def test_steps_without_a_finite_loss_are_left_out_and_counted(home):
    result = train(home, home / "two_bad", {"not_a_number": {"first": 7, "last": 8}})
    assert result.returncode == 0, result.stderr
    assert "warning: step 7 has no finite loss and gradient and is left out (1 so far)" in result.stdout
    assert "2 steps had no finite loss and gradient and were left out" in result.stdout
    by_step = {line["step"]: line for line in lines(home / "two_bad") if "train/loss" in line}
    assert "train/skipped_steps" not in by_step[5]
    assert by_step[10]["train/skipped_steps"] == by_step[40]["train/skipped_steps"] == 2
    assert all(np.isfinite(line["train/loss"]) for line in by_step.values())


@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run_which_goes_on_from_before(home):
    # The same program as with faults, which rounds in its own way.
    no_faults = {"not_a_number": {"first": 0, "last": 0}}
    assert train(home, home / "good", no_faults).returncode == 0
    flags = ("--train.max-skipped-steps", 3)
    result = train(home, home / "bad", {"not_a_number": {"first": 7, "last": 99}}, *flags)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: 3 steps in a row, from step 7, had no finite loss and gradient; in step 7 the loss")
    assert "was not finite: the outputs of all layers were finite" in line
    assert saved_steps(home / "bad" / "checkpoints") == [5]
    assert train(home, home / "bad", no_faults, *flags).returncode == 0
    check_same_end(home / "bad", home / "good")


@pytest.mark.slow
def test_a_step_that_hangs_leaves_its_stacks(home, straight):
    hang = {"hang_at": {"moment": "step", "number": 15, "seconds": 3, "least_seconds": 1.0}}
    result = train(home, home / "hung", hang)
    assert result.returncode == 0, result.stderr
    assert "its peers" in result.stdout
    stacks = (home / "hung" / "stacks.log").read_text()
    assert "in hang" in stacks
    assert "in run" in stacks
    check_same_end(home / "hung", straight)
