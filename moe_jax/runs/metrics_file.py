"""metrics.jsonl: written a line at a time, cut where a run goes on, and read. Imports no jax."""

import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import msgspec

from moe_jax.errors import UserError
from moe_jax.files import GrowingFile, atomic_write_text
from moe_jax.runs.layout import RunDirectory
from moe_jax.sharding.processes import is_first_process

log = logging.getLogger("moe_jax")


class MetricsFile:
    """Writes each step's values as a line of metrics.jsonl, at once; only the first process of a run does.

    ``restored_step`` is the step that the run goes on from, None for a new run: what a start that died wrote past it
    is cut. A disk that is full, or fails, is logged and ends no run: lines wait in memory until they can be written.
    Use it in a ``with`` block.
    """

    def __init__(self, run: RunDirectory, restored_step: int | None):
        self._path = run.metrics_file
        self._file: GrowingFile | None = None
        if is_first_process():
            if self._path.exists():
                self._cut(restored_step or 0)
            self._file = GrowingFile(self._path, log.warning)

    def _cut(self, last_step: int) -> None:
        """Keeps the lines up to ``last_step``, and to the first damaged one: a run is not lost for its log."""
        lines, damage = _read(self._path)
        if damage is not None:
            aside = self._path.with_suffix(".damaged.jsonl")
            shutil.copyfile(self._path, aside)
            log.warning(f"warning: {damage}; the {len(lines)} lines before it are kept, and the whole file is {aside}")
        kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= last_step]
        atomic_write_text(self._path, "".join(kept))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, float | list]) -> None:
        """``values`` after ``step`` optimizer steps: numbers, or nested lists.

        What is not finite is written as null, for JSON has no word for it.
        """
        if self._file is not None:
            self._file.append(json.dumps({"step": step, **finite(values)}, allow_nan=False).encode() + b"\n")

    def sync(self) -> None:
        """Puts all lines on disk: those up to a checkpoint are there when it is."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        lost = [] if self._file is None else self._file.close()
        if lost:
            log.warning(
                f"warning: {self._path} lacks its last {len(lost)} lines, from step {json.loads(lost[0])['step']} on, "
                "which could not be written to the end"
            )


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


class _Step(msgspec.Struct):
    step: int


def _read(file: Path) -> tuple[list[dict[str, Any]], str | None]:
    """(the lines before the first damaged one, what is wrong with that)."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there are no metrics at {file}; train a model in that run directory first") from None
    lines = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):  # the last piece has no end: empty, or cut
        try:
            msgspec.json.decode(line, type=_Step)
            lines.append(msgspec.json.decode(line))
        except (ValueError, RecursionError) as error:
            return lines, f"{file}:{number} is not a line of metrics ({error})"
    return lines, None
