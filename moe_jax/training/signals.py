"""Signals, and the end of the time given, become a request that a loop answers between two steps."""

import contextlib
import math
import os
import signal
from collections.abc import Iterator
from types import FrameType

NOTE = b"stopping after this step, once a checkpoint is on disk; a second signal ends the run at once\n"
_ENDING = (signal.SIGINT, signal.SIGTERM)
# What a scheduler sends before it takes the machine away, and a timer of our own: the run is to go on later.
_PAUSING = (signal.SIGUSR1, signal.SIGALRM)


class StopRequest:
    """``exit_code`` is None until the end is asked for: then 128 + the number of the signal, or 0 for a pause.

    Where ``is_shared``, as with several processes, it is what all have agreed on: each gives ``own_code`` to the step
    and hears the largest of them one step later.
    """

    def __init__(self, *, is_shared: bool = False) -> None:
        self._is_shared = is_shared
        self._own: int | None = None
        self._agreed: int | None = None

    @property
    def exit_code(self) -> int | None:
        return self._agreed if self._is_shared else self._own

    @property
    def own_code(self) -> int:
        """0: nothing; else 1 + the exit code that a signal to this process asks for."""
        return 0 if self._own is None else self._own + 1

    def ask(self, exit_code: int) -> None:
        self._own = exit_code

    def hear(self, largest_code: int) -> None:
        if largest_code:
            self._agreed = largest_code - 1


@contextlib.contextmanager
def catch_signals(
    told: bytes = NOTE, *, seconds: float | None = None, is_shared: bool = False
) -> Iterator[StopRequest]:
    """Within it the first SIGINT or SIGTERM is noted, and told; a second one ends the process at once.

    With ``seconds``, which may be infinite, SIGUSR1 asks for a pause, and so does their end.
    """
    request = StopRequest(is_shared=is_shared)
    caught = _ENDING if seconds is None else (*_ENDING, *_PAUSING)
    previous = {number: signal.getsignal(number) for number in caught}

    def note(number: int, frame: FrameType | None) -> None:
        if number in _ENDING:
            request.ask(128 + number)
            for each in _ENDING:
                signal.signal(each, signal.SIG_DFL)
        elif not request.own_code:
            request.ask(0)
        # The signal may have come in the middle of a print, which no other print may enter.
        with contextlib.suppress(OSError):  # nobody reads
            os.write(2, told)

    for number in previous:
        signal.signal(number, note)
    if seconds is not None and math.isfinite(seconds):
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))  # 0 would be never
    try:
        yield request
    finally:
        if seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
