"""metrics.jsonl, and the trackers that get its scalars too. Imports no jax."""

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from moe_jax.errors import UserError
from moe_jax.files import GrowingFile, atomic_write_text
from moe_jax.runs.layout import RunDirectory
from moe_jax.trackers.trackers import Ending, Tracker

log = logging.getLogger("moe_jax")


class MetricsWriter:
    """Writes each step's values as a line of metrics.jsonl, at once, and hands its scalars to the trackers.

    ``restored_step`` is the step that the run goes on from, None for a new run: what a start that died wrote past it
    is cut. Use it in a ``with`` block; without ``finish`` the trackers are told that the run failed. A disk that is
    full, or fails, is told and ends no run: lines wait in memory until they can be written.
    """

    def __init__(
        self,
        run: RunDirectory,
        restored_step: int | None,
        open_trackers: Callable[[], Sequence[Tracker]] = tuple,
    ):
        kept = restored_step or 0
        if run.metrics_file.exists():
            lines = [line for line in _sound_lines(run.metrics_file) if line["step"] <= kept]
            atomic_write_text(run.metrics_file, "".join(json.dumps(line) + "\n" for line in lines))
        # After what may be wrong with the file, so that no tracker is left with a run that never began.
        self._trackers = open_trackers()
        self._path = run.metrics_file
        self._file = GrowingFile(run.metrics_file, log.warning)
        self._ending: Ending = "failed"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        lost = self._file.close()
        if lost:
            log.warning(
                f"warning: {self._path} lacks its last {len(lost)} lines, from step {json.loads(lost[0])['step']} on, "
                "which could not be written to the end"
            )
        for tracker in self._trackers:
            tracker.close(self._ending)

    def write(self, step: int, values: Mapping[str, float | list]) -> None:
        """``values`` after ``step`` optimizer steps: numbers, or nested lists, which only metrics.jsonl gets.

        What is not finite is written as null, for JSON has no word for it.
        """
        line = json.dumps({"step": step, **finite(values)}, allow_nan=False) + "\n"
        self._file.append(line.encode())
        scalars = {name: value for name, value in values.items() if not isinstance(value, list)}
        for tracker in self._trackers:
            tracker.scalars(step, scalars)

    def sync(self) -> None:
        """Puts all lines on disk: those up to a checkpoint are there when it is."""
        self._file.sync()

    def write_text(self, step: int, name: str, text: str) -> None:
        """A text for the trackers."""
        for tracker in self._trackers:
            tracker.text(step, name, text)

    def finish(self, files: Sequence[Path], ending: Ending) -> None:
        """Hands over the run's ``files`` and says how it ended."""
        for tracker in self._trackers:
            tracker.files(files)
        self._ending = ending


def finite(value: Any) -> Any:
    """``value`` with None for every number that JSON has no word for."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return value if math.isfinite(value) else None


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl as dictionaries, without one that a kill cut short at the end. Raises UserError."""
    lines, damage = _read(file)
    if damage is not None:
        raise UserError(f"{damage}; remove what is wrong, or put a copy of the file back")
    return lines


def _sound_lines(file: Path) -> list[dict[str, Any]]:
    """The lines up to the first damaged one, as a loss of power leaves them: a run is not lost for its log."""
    lines, damage = _read(file)
    if damage is not None:
        aside = file.with_suffix(".damaged.jsonl")
        shutil.copyfile(file, aside)
        log.warning(f"warning: {damage}; the {len(lines)} lines before it are kept, and the whole file is {aside}")
    return lines


def _read(file: Path) -> tuple[list[dict[str, Any]], str | None]:
    """(the lines before the first damaged one, what is wrong with that)."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there are no metrics at {file}; train a model in that run directory first") from None
    lines = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):  # the last piece has no end: empty, or cut
        try:
            values = json.loads(line.decode("utf-8"))
            if not isinstance(values["step"], int):
                raise TypeError(f"step is {values['step']!r}")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            return lines, f"{file}:{number} is not a line of metrics ({type(error).__name__}: {error})"
        lines.append(values)
    return lines, None
