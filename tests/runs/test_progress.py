"""The progress display: a bar on a terminal, lines in a log."""

import io
import logging
import types

import pytest
from rich.console import Console

from moe_jax.runs import progress
from moe_jax.runs.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


LINES = [
    "step 13, 100 tokens/s, 5:48 left",  # two steps in 8 seconds; 87 are left
    "step 15, 120 tokens/s, 4:43 left",  # three in 10
    "step 17, 95 tokens/s, 5:48 left",  # five in 21
]


@pytest.mark.parametrize(("screen", "level"), [(io.StringIO(), logging.INFO), (Terminal(), logging.DEBUG)])
def test_a_line_is_logged_at_times_and_the_bar_shows_the_same(monkeypatch, caplog, screen, level):
    clock = types.SimpleNamespace(seconds=0.0, monotonic=lambda: clock.seconds)
    # The module's name for it, and not the clock itself: event loops of other threads wait by that.
    monkeypatch.setattr(progress, "time", clock)
    caplog.set_level(logging.DEBUG)
    with Progress(Console(file=screen, width=100), logging.getLogger("moe_jax")) as shown:
        shown.start("training", 100, 10)
        shown.describe("compiling")
        for done, clock.seconds in zip(range(11, 18), (5.0, 9.0, 13.0, 15.0, 1000.0, 1002.0, 1011.0), strict=True):
            if done == 15:
                shown.describe("evaluating")  # its 985 seconds count in no speed
            shown.update(done, f"step {done}", 400)
        shown.describe("drawing")
    assert caplog.record_tuples == [("moe_jax", level, line) for line in LINES]
    for text in ("drawing", LINES[-1]):
        assert (text in screen.getvalue()) == screen.isatty()


def test_work_of_unknown_size_has_no_time_left():
    screen = Terminal()
    with Progress(Console(file=screen, width=100)) as shown:
        shown.start("looking", None)
        shown.start("reading", None)
        for done in (1, 2, 3):
            shown.update(done, f"{done} documents")
        assert shown.done == 3
    assert "3 documents" in screen.getvalue()
    assert "left" not in screen.getvalue()
