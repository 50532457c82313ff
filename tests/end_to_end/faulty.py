"""Runs a script of this project in a process with faults: python tests/end_to_end/faulty.py FAULTS SCRIPT ARGUMENTS...

FAULTS is JSON, ``{"file_size_limit": {"bytes": 100000}}``: names of ``FAULTS`` below and the arguments of each. SCRIPT
is ``train.py`` or ``-m MODULE``.
"""

import contextlib
import ctypes
import datetime
import itertools
import json
import os
import resource
import runpy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def no_file_over(size: int) -> Iterator[None]:
    """Within it no file of this process may grow past ``size`` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def file_size_limit(bytes: int, until: str | None = None) -> None:
    """The same for the whole process, or until the file ``until`` exists."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, hard))

    def lift() -> None:
        assert until is not None
        while not os.path.exists(until):
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    if until is not None:
        threading.Thread(target=lift, daemon=True).start()


def no_privileges() -> None:
    """Takes root's right to read and write what the permissions forbid; a no-op for other users."""
    version, this_process = 0x20080522, 0  # _LINUX_CAPABILITY_VERSION_3
    header = (ctypes.c_uint32 * 2)(version, this_process)
    none = (ctypes.c_uint32 * 6)()  # two times the effective, permitted and inheritable ones
    if ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def clock_backwards() -> None:
    """Each look at the clock finds it a second earlier; the monotonic ones, for durations, go on as they do."""
    seconds = itertools.count(1_700_000_000, -1)
    time.time = lambda: float(next(seconds))
    time.time_ns = lambda: next(seconds) * 10**9

    class Backwards(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return cls.fromtimestamp(next(seconds), tz)

        @classmethod
        def utcnow(cls) -> datetime.datetime:
            return cls.now(datetime.UTC).replace(tzinfo=None)

    datetime.datetime = Backwards  # type: ignore[misc]


FAULTS: dict[str, Callable[..., None]] = {
    "file_size_limit": file_size_limit,
    "no_privileges": no_privileges,
    "clock_backwards": clock_backwards,
}


def main() -> None:
    faults, script, *arguments = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    from tests.end_to_end.moments import FAULTS_OF_A_RUN

    for name, values in json.loads(faults).items():
        (FAULTS | FAULTS_OF_A_RUN)[name](**values)
    # train.py would otherwise start itself again for huge pages, without the faults.
    os.environ.setdefault("GLIBC_TUNABLES", "")
    if script == "-m":
        module, *arguments = arguments
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [str(ROOT / script), *arguments]
        runpy.run_path(str(ROOT / script), run_name="__main__")


if __name__ == "__main__":
    main()
