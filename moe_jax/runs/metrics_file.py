"""metrics.jsonl: written a line at a time, cut where a run goes on, and read. Imports no jax."""

import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import msgspec

from moe_jax.errors import UserError
from moe_jax.files import MOST_BYTES, GrowingFile, atomic_write_text, decode_json, open_regular
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


def _read(file: Path) -> tuple[list[dict[str, Any]], str | None]:
    """(the lines before the first damaged one, what is wrong with that)."""
    lines: list[dict[str, Any]] = []
    try:
        with open_regular(file) as stream:
            while (line := stream.readline(MOST_BYTES)).endswith(b"\n"):
                lines.append(_values(line))
    except FileNotFoundError:
        raise UserError(f"there are no metrics at {file}; train a model in that run directory first") from None
    except UserError:  # it is no file
        raise
    except ValueError as error:
        return lines, f"{file}:{len(lines) + 1} is not a line of metrics ({error})"
    if len(line) == MOST_BYTES:
        return lines, f"{file}:{len(lines) + 1} is not a line of metrics (it has more than {MOST_BYTES:,} bytes)"
    return lines, None  # what is left has no end: a kill has cut it


_Number = float | None


class _Line(msgspec.Struct):
    """What must be right of a line: what is cut by, and what is drawn."""

    step: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    train_loss: _Number = msgspec.field(name="train/loss", default=None)
    train_eval_loss: _Number = msgspec.field(name="train_eval/loss", default=None)
    val_loss: _Number = msgspec.field(name="val/loss", default=None)
    load: list[list[_Number]] = msgspec.field(name="moe/load", default_factory=list)


def _values(line: bytes) -> dict[str, Any]:
    """The step and the values of a line. Raises ValueError."""
    values = decode_json(line, dict)
    msgspec.convert(values, _Line)
    return values
