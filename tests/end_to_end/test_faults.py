"""What goes wrong in a training or around it: losses that are NaN, hanging steps, saves, permissions, clocks."""

import re

import numpy as np
import pytest

from moe_jax.runs.checkpoint.seal import find_damage
from moe_jax.runs.layout import saved_steps
from tests.tiny import assert_same_arrays, logged, make_home, train


@pytest.mark.slow  # each part of it has a test in tests/end_to_end/test_full_disk.py
def test_saves_on_a_full_disk_are_reported_tried_again_and_harm_nothing(home):
    space = home / "space"
    faults = {
        "file_size_limit": {"bytes": 6000, "until": str(space)},
        "space_after_failures": {"number": 2, "file": str(space)},
    }
    result = train(home, home / "full", faults=faults)
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
    result = train(home, home / "never", faults={"file_size_limit": {"bytes": 6000}})
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: the checkpoint of step 40 could not be saved (")
    assert "none is on disk: free space in" in result.stderr
    assert "Traceback" not in result.stderr
    assert saved_steps(home / "never" / "checkpoints") == []
    assert train(home, home / "never").returncode == 0
    assert_same_arrays(home / "never", straight)


@pytest.mark.slow
def test_steps_without_a_finite_loss_are_left_out_and_counted(home):
    result = train(home, home / "two_bad", faults={"not_a_number": {"first": 7, "last": 8}})
    assert result.returncode == 0, result.stderr
    assert "warning: step 7 has no finite loss and gradient and is left out (1 so far)" in result.stdout
    assert "2 steps had no finite loss and gradient and were left out" in result.stdout
    by_step = {line["step"]: line for line in logged(home / "two_bad") if "train/loss" in line}
    assert "train/skipped_steps" not in by_step[5]
    assert by_step[10]["train/skipped_steps"] == by_step[40]["train/skipped_steps"] == 2
    assert all(np.isfinite(line["train/loss"]) for line in by_step.values())


@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run_which_goes_on_from_before(home):
    # The same program as with faults, which rounds in its own way.
    no_faults = {"not_a_number": {"first": 0, "last": 0}}
    assert train(home, home / "good", faults=no_faults).returncode == 0
    flags = ("--train.max-skipped-steps", 3)
    result = train(home, home / "bad", *flags, faults={"not_a_number": {"first": 7, "last": 99}})
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: 3 steps in a row, from step 7, had no finite loss and gradient; in step 7 the loss")
    assert "was not finite: the outputs of all layers were finite" in line
    assert saved_steps(home / "bad" / "checkpoints") == [5]
    assert train(home, home / "bad", *flags, faults=no_faults).returncode == 0
    assert_same_arrays(home / "bad", home / "good")


@pytest.mark.slow
def test_a_step_that_hangs_leaves_its_stacks(home, straight):
    hang = {"hang_at": {"moment": "step", "number": 15, "seconds": 3, "least_seconds": 1.0}}
    result = train(home, home / "hung", faults=hang)
    assert result.returncode == 0, result.stderr
    assert "its peers" in result.stdout
    stacks = (home / "hung" / "stacks.log").read_text()
    assert "in hang" in stacks
    assert "in run" in stacks
    assert_same_arrays(home / "hung", straight)


@pytest.mark.parametrize(
    ("forbidden", "workdir", "named"),
    [
        ("mine", "mine", "Permission denied: mine/.lock"),
        pytest.param("theirs", "theirs/run", "Permission denied: theirs/run", marks=pytest.mark.slow),
        pytest.param(
            "cache/moe_jax",
            "new",
            r"\S*/cache/moe_jax/data, where the tokens of a text are kept, cannot be written \(Permission denied\); "
            "set XDG_CACHE_HOME to a folder that can, or prepare the text .*",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_folder_that_may_not_be_written_is_one_line_and_nothing_changes(tmp_path, forbidden, workdir, named):
    home = make_home(tmp_path)
    folder = home / forbidden
    folder.mkdir(parents=True)
    folder.chmod(0o555)
    try:
        done = train(home, workdir, faults={"no_privileges": {}})
        assert list(folder.iterdir()) == []
    finally:
        folder.chmod(0o755)
    assert done.returncode == 1
    *warnings, error = done.stderr.splitlines()
    assert re.fullmatch(f"error: {named}", error), done.stderr
    # The folder of compiled programs is in the same place, but a run does without it.
    assert len(warnings) == (forbidden == "cache/moe_jax")
    assert all("compiled programs are not kept" in warning for warning in warnings), done.stderr
    assert done.stdout == ""
    assert (home / workdir).exists() == (workdir == forbidden)


@pytest.mark.slow
def test_a_clock_that_goes_backwards_changes_nothing(home):
    straight, back = home / "runs" / "forwards", home / "runs" / "back"
    assert train(home, straight, "--train.num-steps", 20).returncode == 0
    for steps in (10, 20):
        flags = ("--train.num-steps", steps, "--optimizer.decay-steps", 20)
        done = train(home, back, *flags, faults={"clock_backwards": {}})
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert f"step {steps}: train" in done.stdout
    assert "going on from step 10" in done.stdout
    expected = logged(straight)
    assert [line["step"] for line in expected] == [5, 10, 10, 15, 20, 20]
    assert logged(back) == expected
    times = [line[:19] for line in (back / "train.log").read_text().splitlines() if line.startswith("20")]
    assert times[0] > times[-1], "the clock went backwards"
