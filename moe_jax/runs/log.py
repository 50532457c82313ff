"""Where a run's log messages go: the console and train.log. Imports no jax."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from moe_jax.files import GrowingFile
from moe_jax.sharding.processes import is_first_process

log = logging.getLogger("moe_jax")


class _ConsoleHandler(logging.Handler):
    """Prints to what sys.stdout is at the time: a live progress bar puts itself there, to stay below the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        encoding = sys.stdout.encoding or "utf-8"
        try:
            # A sampled text may hold what the console cannot show.
            print(self.format(record).encode(encoding, "backslashreplace").decode(encoding), flush=True)
        except BrokenPipeError:
            # The reader went away (`python train.py ... | head`): the run goes on, and train.log has the rest.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError:
            # The console is a file on a full disk: the run goes on, and train.log has what is dropped here.
            _drop_what_cannot_be_printed()


def _drop_what_cannot_be_printed() -> None:
    """Empties Python's buffer of standard output, which would fail again at the next line and at the very end."""
    number = sys.stdout.fileno()
    console, nowhere = os.dup(number), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    sys.stdout.flush()
    os.dup2(console, number)
    os.close(console)
    os.close(nowhere)


class _FileHandler(logging.Handler):
    """Appends to ``file``, which is made with the first message; ``console`` reports that it cannot be written."""

    def __init__(self, file: Path, console: logging.Handler):
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        self._path, self._console = file, console
        self._file: GrowingFile | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self._file is None:
            self._file = GrowingFile(self._path, self._report)
        self._file.append((self.format(record) + "\n").encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        # logging closes every handler once more when Python ends.
        file, self._file = self._file, None
        lost = [] if file is None else file.close()
        if lost:
            self._report(f"warning: {self._path} lacks its last {len(lost)} messages, which could not be written")
        super().close()

    def _report(self, message: str) -> None:
        self._console.handle(logging.makeLogRecord({"msg": message}))


@contextlib.contextmanager
def start_log(file: Path) -> Iterator[None]:
    """Within it, log messages go to the console and, with their time, to the end of ``file``.

    Where either is on a full disk the run goes on, with what the other one has. Of several processes only the first
    writes the file, and the others print nothing but warnings.
    """
    is_first = is_first_process()
    console = _ConsoleHandler(logging.INFO if is_first else logging.WARNING)
    handlers: list[logging.Handler] = [console]
    if is_first:
        handlers.append(_FileHandler(file, console))
    level, propagate = log.level, log.propagate
    log.setLevel(logging.DEBUG)
    log.propagate = False
    for handler in handlers:
        log.addHandler(handler)
    try:
        yield
    finally:
        for handler in reversed(handlers):  # the file's last words go to the console
            log.removeHandler(handler)
            handler.close()
        log.setLevel(level)
        log.propagate = propagate
