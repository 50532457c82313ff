"""What a preparation says while it works: bars on a terminal, and notes anywhere. Imports no jax."""

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Bars:
    """What a preparation says on a terminal: nothing elsewhere, but for notes."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"))
        self._progress = Progress(
            *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
        )
        self._task: TaskID | None = None
        self._description, self._done = "", 0

    def __enter__(self) -> "Bars":
        self._progress.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._progress.__exit__(*exception)

    def say(self, text: str) -> None:
        print(text, file=sys.stderr)

    def start(self, description: str, total: int | None, done: int = 0) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(description, total=total, completed=done, done="")
        self._description, self._done = description, done

    def advance(self, characters: int) -> None:
        self._done += characters
        if self._task is not None:
            self._progress.update(self._task, completed=self._done, done=f"{self._done / 1e6:,.0f} M characters")

    def count(self, description: str, documents: int, characters: int) -> None:
        if description != self._description:
            self.start(description, None)
        self._done += characters
        if documents % 256 == 0 or characters > 4096:
            text = f"{documents:,} documents, {self._done / 1e6:,.0f} M characters"
            assert self._task is not None
            self._progress.update(self._task, done=text)
