"""The user's errors, the exit codes, and the main guard of every command. Imports no jax."""

import contextlib
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Literal, NoReturn


class UserError(ValueError):
    """A mistake of the user's: the message names the rule, the value and the remedy on one line."""


class EnvironmentFault(Exception):
    """A fault of the machine, or a run that cannot go on: the message names it and the remedy on one line."""


class Terminated(BaseException):
    """SIGTERM when there is nothing to save; raised, so that what is half written is removed."""


class Interrupted(BaseException):
    """A signal ended the run after its checkpoint was made safe; ``exit_code`` is 128 + the signal's number.

    No ``Exception``: what a signal raises within a library's call is no fault of what the call was given.
    """

    def __init__(self, exit_code: int):
        super().__init__(f"interrupted, exit code {exit_code}")
        self.exit_code = exit_code


# Faults of the machine, not of this program: one line, with the remedy, instead of a traceback.
_REMEDIES = {
    **dict.fromkeys([errno.ENOSPC, errno.EDQUOT], "; free some space and run the same command again"),
    errno.EEXIST: "; it is in the place of a folder: move it away",
    errno.EFBIG: "; allow larger files (ulimit -f) and run the same command again",
    **dict.fromkeys([errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR, errno.EISDIR], ""),
    **dict.fromkeys([errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENOMEM], ""),
}


def run(main: Callable[[], None]) -> None:
    """Calls ``main`` and exits with the code that the README promises.

    0 done; 2 the user's mistake; 1 a fault of the environment (one line) or of ours (traceback); 130 or 143 after
    SIGINT or SIGTERM. ``main`` imports what it needs itself, so that nothing has failed before this guard.
    """
    if sys.platform == "win32":  # run directories are locked by flock
        _leave("moe_jax does not run on native Windows; run the same command in WSL (wsl --install)", 1)
    before = signal.signal(signal.SIGTERM, _raise_terminated)
    _open_streams()
    show("stderr")
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _leave(str(error), 2)
    except EnvironmentFault as error:
        _leave(str(error), 1)
    except Interrupted as error:
        sys.exit(error.exit_code)
    except Terminated:
        _leave("terminated before there was anything to save", 143)
    except KeyboardInterrupt:
        _leave("interrupted before there was anything to save", 130)
    except BrokenPipeError:  # the reader has gone away (`python sample.py | head -1`): nothing is wrong with the run
        sys.exit(0)
    except MemoryError as error:
        what = f": {error}" if str(error) else ""
        _leave(f"memory has run out{what}; free some, or raise the limit (ulimit -v)", 1)
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        where = f": {error.filename}" if error.filename else ""
        _leave(f"{error.strerror}{where}{_REMEDIES[error.errno]}", 1)
    finally:
        signal.signal(signal.SIGTERM, before)
        try:
            sys.stdout.flush()
        except OSError:  # it is reported; Python would try once more at its end, and exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def naming_what_helps(remedy: str) -> Iterator[None]:
    """Within it a device with too little memory is an EnvironmentFault: the size asked for, and ``remedy``."""
    try:
        yield
    except RuntimeError as error:  # jax's own is one
        _, is_it, asked = str(error).partition("RESOURCE_EXHAUSTED: ")
        if not is_it:
            raise
        asked = re.sub(r"(\d{6,}) bytes", lambda size: f"{int(size[1]) / 2**20:,.0f} MiB", asked.split("\n")[0])
        raise EnvironmentFault(f"a device has too little memory: {asked.rstrip('. ')}; {remedy}") from None


def _open_streams() -> None:
    """Makes standard input, output and error streams that exist, and that escape what the console cannot show."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed, as by >&-: a file opened later would get its number, and what is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name) or open(number, "w" if number else "r", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        if number and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Display(io.FileIO):
    """A console that drops what it does not take: a terminal that is gone, a reader that is, a full disk."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def show(name: Literal["stdout", "stderr"]) -> None:
    """From now on ``sys.stdout``, or the other, is for looking at: that it cannot be written ends nothing."""
    stream, number = getattr(sys, name), ("stdin", "stdout", "stderr").index(name)
    try:
        if stream.fileno() != number:
            return
    except OSError:  # something else stands in its place, as a test's
        return
    file = io.BufferedWriter(_Display(number, "w", closefd=False))
    setattr(sys, name, io.TextIOWrapper(file, stream.encoding, "backslashreplace", line_buffering=True))


def _raise_terminated(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once
    raise Terminated


# How a process ends once its error is told: one of several does not wait for the others then.
leave: Callable[[int], NoReturn] = sys.exit


def _leave(message: str, exit_code: int) -> NoReturn:
    tell_error(message)
    leave(exit_code)


def tell_error(message: str) -> None:
    """Prints ``message`` as one line on standard error."""
    one_line = re.sub(r"\s*[\n\r]\s*", " ", message.strip())  # names of files keep their spaces
    print("error: " + one_line, file=sys.stderr, flush=True)
