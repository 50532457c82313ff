"""Files from outside, read in bounds; atomic files and growing ones; folders that one process works in."""

import codecs
import contextlib
import errno
import fcntl
import glob
import io
import json
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

import msgspec

from moe_jax.errors import UserError

log = logging.getLogger("moe_jax")

T = TypeVar("T")


MOST_BYTES = 4 << 20
"""Of a file of JSON, or of a line of one."""
MOST_BYTES_OF_MANY = 64 << 20
"""Of a list of tokens or of sources."""
_MOST_LEVELS = 64


def read_json(file: Path, kind: type[T], remedy: str, *, most_bytes: int = MOST_BYTES, is_lenient: bool = False) -> T:
    """The JSON in ``file``, which may be anybody's, as ``kind``: any type that msgspec knows, dataclasses among them.

    ``is_lenient`` allows what ``decode_json`` says. Raises FileNotFoundError, and UserError, which ends in ``remedy``,
    where the file is not JSON of that type, too large or no regular file.
    """
    content = read_bytes(file, most_bytes)
    try:
        return decode_json(content, kind, is_lenient=is_lenient)
    except ValueError as error:
        raise UserError(f"{file} is corrupt ({error}); {remedy}") from None


def decode_json(content: bytes, kind: type[T], *, is_lenient: bool = False) -> T:
    """The JSON ``content`` as ``kind``, at most 64 levels deep; a byte order mark is left out. Raises ValueError.

    ``is_lenient`` allows what Python writes and msgspec's own parser refuses: numbers that are not finite, and names
    of files that are not UTF-8.
    """
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        if not is_lenient:
            return _checked_depth(msgspec.json.decode(content, type=kind))
        return msgspec.convert(_checked_depth(json.loads(content)), kind)
    except RecursionError:
        raise _too_deep() from None


def _checked_depth(value: T) -> T:
    """``value``, parsed from JSON. What a parser takes may be too deep for what is done with it, as to print it."""
    level: list[Any] = [value]
    for _ in range(_MOST_LEVELS):
        children = [
            each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)
        ]
        if not children:
            return value
        level = [child for values in children for child in values]
    if any(isinstance(each, dict | list) for each in level):
        raise _too_deep()
    return value


def _too_deep() -> ValueError:
    return ValueError(f"it is more than {_MOST_LEVELS} levels deep")


def read_bytes(file: Path, most: int) -> bytes:
    """The content of ``file``. Raises as ``open_regular``, and UserError where it has more than ``most`` bytes."""
    with open_regular(file) as opened:
        content = opened.read(most + 1)  # and not all of it: a sparse file of a terabyte takes no room on a disk
    if len(content) > most:
        raise UserError(f"{file} must have at most {most:,} bytes, got {file.stat().st_size:,}; put another there")
    return content


_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}


def open_regular(file: Path) -> io.BufferedReader:
    """Opens ``file``, or what it is a link to, for reading.

    Raises OSError, and UserError where that is no regular file: of a FIFO or a device nobody knows when it ends.
    """
    kind = stat.S_IFMT(file.stat().st_mode)
    if kind != stat.S_IFREG:
        raise UserError(f"{file} must be a regular file, got {_KINDS.get(kind, 'a device')}; put a file there")
    # It may have become a FIFO since, whose opening would wait for a writer.
    return open(file, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def refuse_link(path: Path) -> None:
    """UserError where ``path``, which is to be written or emptied, is a link, a FIFO or a device.

    A run or a prepared folder of somebody else's must not have this user's other files written to.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        kind = stat.S_IFMT(path.lstat().st_mode)
        if kind not in (stat.S_IFREG, stat.S_IFDIR):
            got = "a link" if kind == stat.S_IFLNK else _KINDS.get(kind, "a device")
            raise UserError(f"{path} is {got}, through which nothing is written; remove it")


@contextlib.contextmanager
def naming(file: Path | str) -> Iterator[None]:
    """Within it an OSError names ``file``: that of a failed write does not say where it was."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(file)
        raise


@contextlib.contextmanager
def plain_name(folder: Path) -> Iterator[Path]:
    """Yields a name of ``folder`` for libraries that read names as patterns, addresses or UTF-8, as Orbax does.

    Where its own name is not of plain characters, this is a symbolic link in the folder for temporary files.
    """
    folder = folder.absolute()
    if re.fullmatch(r"[\w/.,:+=@~ -]+", str(folder), re.ASCII):
        yield folder
        return
    place = Path(tempfile.mkdtemp(prefix="moe_jax-"))
    link = place / "folder"
    try:
        link.symlink_to(folder, target_is_directory=True)
        yield link
    finally:
        link.unlink(missing_ok=True)
        place.rmdir()


@contextlib.contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """Yields a path beside ``file`` to write to, which takes its place at the end; on an exception it is removed.

    The content is flushed to disk before the name is, so that a loss of power leaves no empty file under it.
    """
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with naming(file):
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


class GrowingFile:
    """A file that grows by whole records, and whose writer a full disk does not stop.

    Records that cannot be written wait in memory, and nothing of them stays in the file. They are tried again with the
    next one and at the end, so that none is lost, doubled or out of order once there is space. ``report`` gets a line
    when writing begins to fail and a line when it works again.
    """

    def __init__(self, file: Path, report: Callable[[str], None]):
        self._file, self._report = file, report
        self._unwritten: list[bytes] = []
        self._is_failing = False
        refuse_link(file)
        # No buffer of Python's: after a fault nobody could say what of it is in the file.
        self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._end = os.fstat(self._descriptor).st_size

    def append(self, record: bytes) -> None:
        """Writes ``record`` after all that wait. No fault of the file system is raised."""
        self._unwritten.append(record)
        self._write_what_waits()

    def _write_what_waits(self) -> None:
        try:
            while self._unwritten:
                self._write(self._unwritten[0])
                del self._unwritten[0]
        except OSError as error:
            # Where even this fails, the next record is still written over the half one.
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._end)
            if not self._is_failing:
                self._report(
                    f"warning: {self._file} cannot be written ({error.strerror}); the run goes on, keeps what is due "
                    "in memory and tries again each time"
                )
            self._is_failing = True
            return
        if self._is_failing:
            self._report(f"{self._file} can be written again, and nothing of it is lost")
        self._is_failing = False

    def _write(self, record: bytes) -> None:
        # A file that somebody has cut must not get a hole.
        self._end = min(self._end, os.fstat(self._descriptor).st_size)
        written = 0
        while written < len(record):
            written += os.pwrite(self._descriptor, memoryview(record)[written:], self._end + written)
        self._end += written

    def sync(self) -> None:
        """Puts what is written on disk, for a loss of power; a fault of the disk is left to the next ``append``."""
        with contextlib.suppress(OSError):
            os.fsync(self._descriptor)

    def close(self) -> list[bytes]:
        """Tries for the last time, and returns the records that are not in the file."""
        if self._unwritten:
            self._write_what_waits()
        try:
            os.close(self._descriptor)
        except OSError as error:  # a server's file system may report a lost write as late as here
            self._report(f"warning: the end of {self._file} may be missing ({error.strerror})")
        return self._unwritten


@contextlib.contextmanager
def locked_folder(folder: Path, flag: str, what: str, *, wait: bool = False) -> Iterator[None]:
    """Creates ``folder`` and keeps other processes from working in it at the same time.

    The lock is the kernel's, so that a killed process leaves none behind. Where another process has it, either waits
    or raises UserError, which says that it is ``what`` ("training in") and that ``flag`` chooses another folder. On a
    file system without locks there is a warning, and none.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:  # /proc and the like
        raise UserError(f"{flag} {folder} cannot be made in that file system; choose another") from None
    except FileExistsError:
        if not folder.is_symlink():
            raise
        raise UserError(f"{flag} {folder} is a link to nothing; remove it, or choose another") from None
    refuse_link(folder / ".lock")
    with open(folder / ".lock", "a+") as file:
        if not _lock(file, folder, flag, what, wait=wait):
            log.warning(
                f"warning: the file system of {folder} has no locks, so nothing keeps a second process from {what} it "
                "at the same time; start only one"
            )
        with naming(folder / ".lock"):
            file.truncate(0)
            os.write(file.fileno(), str(os.getpid()).encode())
        try:
            yield
        finally:
            file.truncate(0)  # whoever is refused from now on is not given this process's number


def refuse_locked_folder(folder: Path, flag: str, what: str) -> None:
    """UserError where ``locked_folder`` would raise it now, so that no work is done in vain; creates nothing."""
    refuse_link(folder / ".lock")
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), open(folder / ".lock") as file:
        _lock(file, folder, flag, what)


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def _lock(file: TextIO, folder: Path, flag: str, what: str, *, wait: bool = False) -> bool:
    """Whether the file system has locks; with one, ``file`` is locked then. UserError where another process has it."""
    for _ in range(10):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return True
        except BlockingIOError:
            time.sleep(0.02)  # it may be a process that only looks whether somebody works here
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False
    file.seek(0)
    raise UserError(
        f"process {file.read().strip()} is {what} {folder} already; wait for it, stop it, or name another {flag}"
    )


def remove_leftovers(file: Path) -> None:
    """Removes what an ``atomic_file`` of a process that was killed left beside ``file``."""
    for beside in file.parent.glob(f".{glob.escape(file.name)}.*"):
        if re.fullmatch(r"[0-9]+(-journal)?", beside.name.removeprefix(f".{file.name}.")):  # SQLite's, of a database
            beside.unlink(missing_ok=True)


def cache_folder(name: str) -> Path:
    """The folder ``name`` under this user's cache folder (``$XDG_CACHE_HOME/moe_jax`` or ``~/.cache/moe_jax``)."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "moe_jax" / name


def make_writable(folder: Path) -> Path:
    """``folder``, made where it is not there. OSError, which names it, where it cannot be written."""
    if str(folder).startswith("~"):  # cache_folder's, of a user without a home
        raise FileNotFoundError(errno.ENOENT, "this user has no home", str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return folder
