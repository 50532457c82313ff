"""What a preparation prints while it works: a bar on a terminal, and notes anywhere. Imports no jax."""

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Bars:
    """One bar at a time, counted in characters; nothing but notes where standard error is no terminal."""

    def __init__(self) -> None:
        console, done = Console(stderr=True), TextColumn("{task.fields[done]}")
        columns = TextColumn("{task.description}"), BarColumn(), done, TimeRemainingColumn()
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task: TaskID | None = None
        self._new = 0

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        print(text, file=sys.stderr)

    def start(self, description: str, total: int | None = None) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task, self._new = self._progress.add_task(description, total=total, done=""), 0

    def advance(self, characters: int) -> None:
        self._new += characters
        if self._new >= 1 << 18 and self._task is not None:  # an update costs more than a short document
            self._progress.update(self._task, advance=self._new)
            done = self._progress.tasks[-1].completed
            self._progress.update(self._task, done=f"{done / 1e6:,.0f} M characters")
            self._new = 0
