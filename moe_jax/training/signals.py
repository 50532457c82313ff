"""SIGINT and SIGTERM become a request that a loop answers between two steps, once what it has is safe."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

NOTE = b"stopping after this step, once a checkpoint is on disk; a second signal ends the run at once\n"


class StopRequest:
    """``exit_code`` is None until a signal asks for the end, then 128 + its number."""

    def __init__(self) -> None:
        self.exit_code: int | None = None


@contextlib.contextmanager
def catch_signals(told: bytes = NOTE) -> Iterator[StopRequest]:
    """Within it the first SIGINT or SIGTERM is noted, and told; a second one ends the process at once."""
    request = StopRequest()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        request.exit_code = 128 + number
        for each in previous:
            signal.signal(each, signal.SIG_DFL)
        # The signal may have come in the middle of a print, which no other print may enter.
        with contextlib.suppress(OSError):  # nobody reads
            os.write(2, told)

    for number in previous:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
