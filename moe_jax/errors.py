"""The user's errors, the exit codes, and the main guard of every command. Imports no jax."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn


class UserError(ValueError):
    """A mistake of the user's: the message names the rule, the value and the remedy on one line."""


class EnvironmentFault(Exception):
    """A fault of the machine, or a run that cannot go on: the message names it and the remedy on one line."""


class Terminated(BaseException):
    """SIGTERM when there is nothing to save; raised, so that what is half written is removed."""


class Interrupted(Exception):
    """A signal ended the run after its checkpoint was made safe; ``exit_code`` is 128 + the signal's number."""

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
    try:
        main()
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
    except BrokenPipeError:
        # The reader has gone away (`python sample.py | head -1`): nothing is wrong with the run.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        where = f": {error.filename}" if error.filename else ""
        _leave(f"{error.strerror}{where}{_REMEDIES[error.errno]}", 1)
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise_terminated(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once
    raise Terminated


def _leave(message: str, exit_code: int) -> NoReturn:
    tell_error(message)
    sys.exit(exit_code)


def tell_error(message: str) -> None:
    """Prints ``message`` as one line on standard error."""
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
