"""Writes down what every thread is doing when a step takes far longer than its peers."""

import collections
import faulthandler
import logging
import os
import statistics
import time
from pathlib import Path
from typing import Self

log = logging.getLogger("moe_jax")

LEAST_SECONDS = 60.0
_FEWEST_PEERS = 5


class Watchdog:
    """Between ``step_begins`` and ``step_ends`` a clock runs that the interpreter cannot hold up.

    When it rings, after ``factor`` times the median of the last steps and at least a minute, the stacks of all threads
    are added to ``file``, which is not left there without any; the run goes on. Use it in a ``with`` block.
    """

    def __init__(self, factor: float | None, file: Path):
        self._factor, self._path = factor, file
        self._seconds: collections.deque[float] = collections.deque(maxlen=50)
        self._began: float | None = None
        self._limit: float | None = None

    def __enter__(self) -> Self:
        # The clock writes to an open file, for nothing may be opened while everything stands still.
        self._file = open(self._path, "a", encoding="utf-8")
        return self

    def __exit__(self, *exception: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        is_empty = not os.fstat(self._file.fileno()).st_size
        self._file.close()
        if is_empty:
            self._path.unlink(missing_ok=True)

    def step_begins(self) -> None:
        self._began = time.monotonic()
        if self._factor is None or len(self._seconds) < _FEWEST_PEERS:
            return
        self._limit = max(LEAST_SECONDS, self._factor * statistics.median(self._seconds))
        faulthandler.dump_traceback_later(self._limit, file=self._file)

    def step_ends(self, step: int) -> None:
        """After ``step``; a step that the clock rang for is told."""
        if self._began is None:
            return
        seconds = time.monotonic() - self._began
        if self._limit is not None:
            faulthandler.cancel_dump_traceback_later()
            if seconds > self._limit:
                log.warning(
                    f"warning: step {step} took {seconds:.1f} s, its peers {statistics.median(self._seconds):.2f} s; "
                    f"what each thread did after {self._limit:.0f} s stands in {self._path}"
                )
        self._seconds.append(seconds)
        self._began = self._limit = None
