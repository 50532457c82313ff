"""The console, train.log and the progress bar."""

import io
import logging
import re
import types

from rich.console import Console
from rich.progress import Progress, TextColumn

from moe_jax.runs import log as run_log
from moe_jax.runs.log import TrainingBar, start_log, training_bar

log = logging.getLogger("moe_jax")


def test_messages_go_to_the_console_and_with_their_time_to_the_file(tmp_path, capsys):
    for message in ("first start", "second start"):
        with start_log(tmp_path / "train.log"):
            log.info(message)
            log.debug("only in the file")
    assert capsys.readouterr().out == "first start\nsecond start\n"
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", line) for line in lines] == [
        "first start",
        "only in the file",
        "second start",
        "only in the file",
    ]
    assert log.handlers == []


def at(monkeypatch, seconds):
    # Its name for the module, and not the clock itself: the event loop of a server in another thread waits by that.
    monkeypatch.setattr(run_log, "time", types.SimpleNamespace(monotonic=lambda: seconds))


def test_without_a_terminal_a_line_is_logged_at_times(tmp_path, monkeypatch, capsys):
    at(monkeypatch, 0.0)
    with start_log(tmp_path / "train.log"), training_bar(100, 10) as bar:
        for done, seconds in ((11, 5.0), (12, 9.0), (13, 13.0), (14, 15.0)):
            at(monkeypatch, seconds)
            bar.update(done, 2.0, 400)
        bar.describe("evaluating")  # its 985 seconds count in no speed
        for done, seconds in ((15, 1000.0), (16, 1002.0), (17, 1011.0)):
            at(monkeypatch, seconds)
            bar.update(done, 1.0, 400)
    assert capsys.readouterr().out.splitlines() == [
        # Two steps in 8 seconds; 87 are left.
        "step 13/100: loss 2.0000, 100 tokens/s, 5:48 left",
        # Three steps in 10 seconds.
        "step 15/100: loss 1.0000, 120 tokens/s, 4:43 left",
        # Five steps in 21 seconds.
        "step 17/100: loss 1.0000, 95 tokens/s, 5:48 left",
    ]


def test_on_a_terminal_the_bar_shows_the_same(monkeypatch):
    screen = io.StringIO()
    progress = Progress(
        TextColumn("{task.description} {task.completed} {task.fields[values]}"), console=Console(file=screen)
    )
    at(monkeypatch, 0.0)
    bar = TrainingBar(progress, 100, 10)
    with progress:
        for done, seconds in ((11, 5.0), (12, 9.0)):
            at(monkeypatch, seconds)
            bar.update(done, 2.0, 400)
        bar.describe("evaluating")
    assert "evaluating 12 loss 2.0000, 100 tokens/s, 5:52 left" in screen.getvalue()
