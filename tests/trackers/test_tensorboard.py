"""TensorBoard's event files, read without TensorBoard."""

import math

from moe_jax.runs.layout import RunDirectory
from moe_jax.trackers.tensorboard import TensorBoard
from tests.end_to_end.faulty import no_file_over
from tests.oracles.events import events


def test_numbers_are_events_and_what_lies_past_the_restored_step_is_purged(tmp_path):
    run = RunDirectory(tmp_path)
    tracker = TensorBoard(run, None)
    tracker.line(5, {"train/loss": 2.5, "moe/load": [[0.5, math.nan]]})
    tracker.line(10, {"train/loss": math.inf})
    tracker.text(10, "sample", "To be,\nor")
    assert events(run)[0] == [(5, "train/loss", 2.5), (10, "train/loss", math.inf)], "at once, not only at the end"
    tracker.close("interrupted", ())
    tracker = TensorBoard(run, 5)
    tracker.line(15, {"train/loss": 0.5})
    tracker.close("finished", ())
    scalars, purged = events(run)
    assert scalars[-1] == (15, "train/loss", 0.5)
    assert purged == [1, 6]


def test_events_are_whole_once_there_is_space(tmp_path, caplog):
    run = RunDirectory(tmp_path)
    tracker = TensorBoard(run, None)
    tracker.line(1, {"train/loss": 1.0})
    with no_file_over(300):
        for step in range(2, 30):  # more than any queue holds
            tracker.line(step, {"train/loss": 1.0 * step})
            tracker.text(step, "sample", "To be")
        assert 1 < len(events(run)[0]) < 20
    tracker.line(30, {"train/loss": 30.0})
    assert events(run)[0] == [(step, "train/loss", 1.0 * step) for step in range(1, 31)]
    tracker.close("finished", ())
    first, second = caplog.messages
    assert "cannot be written (File too large); the run goes on" in first
    assert second.endswith("can be written again, and nothing of it is lost")


def test_what_is_lost_at_the_end_is_reported(tmp_path, caplog):
    tracker = TensorBoard(RunDirectory(tmp_path), None)
    with no_file_over(100):
        for step in range(5, 55, 5):
            tracker.line(step, {"train/loss": 1.0})
        tracker.close("finished", ())
    assert caplog.messages[1:] == ["warning: TensorBoard lacks the last 10 values, which could not be written"]
