"""Saves that fail: noticed beforehand where possible, and reported in a few words where Orbax prints pages."""

import contextlib
import errno
import logging
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from moe_jax.axes import PyTree


def check_space(folder: Path, items: Mapping[str, PyTree]) -> None:
    """OSError where ``items`` will not fit; Orbax would notice in the middle of writing."""
    needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(dict(items))), shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB free")


def reason(error: BaseException) -> str:
    """What went wrong with a save, in the operating system's words where it was that."""
    text = " ".join(str(error).split())
    match = re.search(r"([^:]+) \[os_error_code", text)  # as tensorstore ends its messages
    if match:
        return match[1].strip()
    return (error.strerror if isinstance(error, OSError) else text[:300]) or type(error).__name__


@contextlib.contextmanager
def quiet_libraries(*, is_saving: bool) -> Iterator[None]:
    """Within it what Orbax, tensorstore and asyncio print of a failed save or read, pages of it, is left out."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    hook, levels = sys.unraisablehook, [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = _ignore_closed_loops
    yield  # after an exception of a read, it stays so
    sys.unraisablehook = hook
    # They complain of the parts of a save that nobody waited for as late as when Python ends.
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(logging.CRITICAL if is_saving else level)


def _ignore_closed_loops(fault: "sys.UnraisableHookArgs") -> None:
    """Once a save has failed, tensorstore reports each further write of it to an event loop that is closed by then."""
    if not (isinstance(fault.exc_value, RuntimeError) and str(fault.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(fault)
