"""metrics.jsonl and the trackers together: what each step's values are handed to."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.metrics_file import MetricsFile
from moe_jax.trackers.trackers import Ending, Tracker


class MetricsWriter:
    """Writes each step's values to metrics.jsonl, and hands its scalars to the trackers.

    Use it in a ``with`` block; without ``finish`` the trackers are given a run that failed.
    """

    def __init__(
        self,
        run: RunDirectory,
        restored_step: int | None,
        open_trackers: Callable[[], Sequence[Tracker]] = tuple,
    ):
        self._file = MetricsFile(run, restored_step)
        # After what may be wrong with the file, so that no tracker is left with a run that never began.
        self._trackers = open_trackers()
        self._ending: Ending = "failed"
        self.sync = self._file.sync

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close(self._ending)

    def write(self, step: int, values: Mapping[str, float | list]) -> None:
        """``values`` after ``step`` optimizer steps: numbers, or nested lists, which only metrics.jsonl gets."""
        self._file.write(step, values)
        scalars = {name: value for name, value in values.items() if not isinstance(value, list)}
        for tracker in self._trackers:
            tracker.scalars(step, scalars)

    def write_text(self, step: int, name: str, text: str) -> None:
        """A text for the trackers."""
        for tracker in self._trackers:
            tracker.text(step, name, text)

    def finish(self, files: Sequence[Path], ending: Ending) -> None:
        """Hands over the run's ``files`` and says how it ended."""
        for tracker in self._trackers:
            tracker.files(files)
        self._ending = ending
