"""The one progress display: a bar on a terminal, and lines in a log. Imports no jax."""

import logging
import time
from typing import Self

from rich import progress
from rich.console import Console

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows one piece of work after the other: what is being done, how far it is, and the time left.

    It is a bar where ``console`` is a terminal. ``log`` gets a line at times: as a message where there is no bar, and
    else for the file only. Use it in a ``with`` block.
    """

    def __init__(self, console: Console, log: logging.Logger | None = None):
        self._log, self._level = log, logging.DEBUG if console.file.isatty() else logging.INFO
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[text]}"),
        )
        self._bar = progress.Progress(*columns, console=console, transient=True, disable=not console.file.isatty())
        self._last_line = time.monotonic()
        self._task: progress.TaskID | None = None
        self.done = 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def start(self, name: str, total: int | None, done: int = 0) -> None:
        """Begins another piece of work, of ``total`` units, None: as many as there are."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(name, total=total, completed=done, text="")
        self.name, self._total, self.done = name, total, done
        # Speed and time left are of this work alone: the clock stands still before its first update, and in between.
        self._seconds, self._units, self._clock = 0.0, 0, None

    def update(self, done: int, text: str, tokens_per_unit: int | None = None) -> None:
        """After ``done`` units, of which each has as many tokens as the last, where their speed is of interest."""
        assert self._task is not None, "start comes first"
        now = time.monotonic()
        if self._clock is not None:
            self._seconds += now - self._clock
            self._units += done - self.done
        self._clock, self.done = now, done
        if self._seconds and self._units:
            pace = self._seconds / self._units
            if tokens_per_unit is not None:
                text += f", {tokens_per_unit / pace:,.0f} tokens/s"
            if self._total is not None:
                left = int((self._total - done) * pace)
                text += f", {left // 60}:{left % 60:02d} left"
        self._bar.update(self._task, completed=done, description=self.name, text=text)
        if self._log is not None and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._log.log(self._level, text)

    def describe(self, what: str) -> None:
        """Names what is done beside the work, until the next ``update``; it counts in no speed."""
        assert self._task is not None, "start comes first"
        self._clock = None
        self._bar.update(self._task, description=what)
