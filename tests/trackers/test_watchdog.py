"""The watchdog writes stacks when a step hangs, and only then."""

import time

import pytest

from moe_jax.trackers import watchdog
from moe_jax.trackers.watchdog import Watchdog


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(watchdog, "LEAST_SECONDS", 0.2)


@pytest.fixture
def dog(tmp_path):
    return Watchdog(20.0, tmp_path / "stacks.log")


def steps(dog, count):
    for step in range(count):
        dog.step_begins(step)
        time.sleep(0.001)
        dog.step_ends(step)


def hang_in_this_function():
    time.sleep(0.6)


def test_a_step_that_hangs_leaves_the_stacks_of_all_threads(dog, tmp_path, caplog):
    steps(dog, 6)
    dog.step_begins(6)
    hang_in_this_function()
    written = (tmp_path / "stacks.log").read_text()  # while it still hangs
    dog.step_ends(7)
    steps(dog, 3)
    dog.close("finished", ())
    assert "hang_in_this_function" in written
    assert "Timeout (0:00:00" in written
    (warning,) = caplog.messages
    assert "step 7 took 0." in warning
    assert (tmp_path / "stacks.log").read_text() == written


def test_ordinary_steps_and_what_is_done_between_them_leave_nothing(dog, tmp_path, caplog):
    steps(dog, 10)
    time.sleep(0.5)
    steps(dog, 10)
    dog.close("finished", ())
    assert not (tmp_path / "stacks.log").exists()
    assert caplog.messages == []


def test_a_file_that_somebody_removed_ends_nothing(dog, tmp_path):
    (tmp_path / "stacks.log").unlink()
    steps(dog, 8)
    dog.close("failed", ())
    assert not (tmp_path / "stacks.log").exists()


def test_before_there_are_peers_nothing_is_watched(dog, tmp_path):
    dog.step_begins(0)
    time.sleep(0.4)
    dog.step_ends(1)
    dog.close("finished", ())
    assert not (tmp_path / "stacks.log").exists()
