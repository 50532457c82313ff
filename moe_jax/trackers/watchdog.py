"""Writes down what every thread is doing when a step takes far longer than its peers."""

import collections
import faulthandler
import logging
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from moe_jax.training.observers import Ending, Observer
from moe_jax.training.state import TrainState

log = logging.getLogger("moe_jax")

LEAST_SECONDS = 60.0
_FEWEST_PEERS = 5


class Watchdog(Observer):
    """Between the beginning and the end of a step a clock runs that the interpreter cannot hold up.

    When it rings, after ``factor`` times the median of the last steps and at least a minute, the stacks of all threads
    are appended to ``file``; the run goes on. A file without stacks is removed at the end.
    """

    def __init__(self, factor: float, file: Path):
        self._factor, self._path = factor, file
        self._seconds: collections.deque[float] = collections.deque(maxlen=50)
        self._began: float | None = None
        self._limit: float | None = None
        # The clock writes to an open file, for nothing may be opened while everything stands still.
        self._file = open(file, "a", encoding="utf-8")  # noqa: SIM115 - see close()

    def step_begins(self, step: int, state: TrainState | None = None) -> None:
        self._began = time.monotonic()
        if len(self._seconds) >= _FEWEST_PEERS:
            self._limit = max(LEAST_SECONDS, self._factor * statistics.median(self._seconds))
            faulthandler.dump_traceback_later(self._limit, file=self._file)

    def step_ends(self, done: int) -> None:
        """Logs a step that the clock rang for."""
        if self._began is None:
            return
        seconds = time.monotonic() - self._began
        if self._limit is not None:
            faulthandler.cancel_dump_traceback_later()
            if seconds > self._limit:
                log.warning(
                    f"warning: step {done} took {seconds:.1f} s, its peers {statistics.median(self._seconds):.2f} s; "
                    f"what each thread did after {self._limit:.0f} s stands in {self._path}"
                )
        self._seconds.append(seconds)
        self._began = self._limit = None

    def close(self, ending: Ending, files: Sequence[Path]) -> None:
        faulthandler.cancel_dump_traceback_later()
        is_empty = not os.fstat(self._file.fileno()).st_size
        self._file.close()
        if is_empty:
            self._path.unlink(missing_ok=True)
