"""Where a run's log messages go: the console and train.log. Imports no jax."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from moe_jax.files import GrowingFile
from moe_jax.sharding.processes import is_first_process

log = logging.getLogger("moe_jax")


class _ConsoleHandler(logging.Handler):
    """Prints to what sys.stdout is at the time: a live progress bar puts itself there, to stay below the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


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

    Where the file is on a full disk the run goes on, with what the console has. Of several processes only the first
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
