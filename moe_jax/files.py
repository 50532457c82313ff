"""Files that are written whole or not at all, and folders that one process works in at a time."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from moe_jax.command import UserError


@contextlib.contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Gives a path beside ``file`` to write to, which takes its place at the end; on an exception it is removed.

    The content is on disk before the name is, so that a loss of power leaves no empty file under it.
    """
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield beside
        with open(beside, "rb") as written:
            os.fsync(written.fileno())
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def atomic_write_text(file: Path, text: str) -> None:
    """Writes ``text`` so that a reader, or a kill, sees the old content or the new one and nothing between."""
    with atomic_file(file) as beside:
        beside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def locked_folder(folder: Path, flag: str, what: str, *, wait: bool = False) -> Iterator[None]:
    """Creates ``folder`` and keeps other processes from working in it at the same time.

    The lock is the kernel's, so that a killed process leaves none behind. Where another process has it, either waits
    or raises UserError, which says that it is ``what`` ("training in") and that ``flag`` chooses another folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:  # /proc and the like
        raise UserError(f"{flag} {folder} cannot be made in that file system; choose another") from None
    except FileExistsError:
        if not folder.is_symlink():
            raise
        raise UserError(f"{flag} {folder} is a link to nothing; remove it, or choose another") from None
    with open(folder / ".lock", "a+") as file:
        if wait:
            fcntl.flock(file, fcntl.LOCK_EX)
        else:
            _lock_or_refuse(file, folder, flag, what)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def refuse_locked_folder(folder: Path, flag: str, what: str) -> None:
    """UserError where ``locked_folder`` would raise it now, so that no work is done in vain; creates nothing."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), open(folder / ".lock") as file:
        _lock_or_refuse(file, folder, flag, what)


def _lock_or_refuse(file: TextIO, folder: Path, flag: str, what: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"process {file.read().strip()} is {what} {folder} already; wait for it, stop it, or name another {flag}"
        ) from None
