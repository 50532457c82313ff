"""Checksums of a folder's files: written once the folder is whole, compared before anything in it is read.

Orbax restores a flipped bit without a word. Imports no jax.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from moe_jax.files import atomic_write_text

SUMS = "SHA256SUMS.json"


def seal(folder: Path) -> None:
    """Puts every file of ``folder`` on disk, for a loss of power too, and writes their checksums beside them."""
    sums = {}
    (folder / SUMS).unlink(missing_ok=True)
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        with open(file, "rb") as opened:
            sums[str(file.relative_to(folder))] = hashlib.file_digest(opened, "sha256").hexdigest()
            os.fsync(opened.fileno())
    atomic_write_text(folder / SUMS, json.dumps(sums, indent=1) + "\n")


def find_damage(folder: Path, items: Iterable[str] | None = None) -> str | None:
    """What is wrong with the files of ``folder``, or of these folders in it; None where all are as when sealed."""
    try:
        sums = msgspec.json.decode((folder / SUMS).read_bytes(), type=dict[str, str])
    except FileNotFoundError:
        return f"{SUMS} is missing"
    except (ValueError, RecursionError):
        return f"{SUMS} cannot be read"
    except OSError as error:
        return _damage_of(SUMS, error)
    starts = ("",) if items is None else tuple(f"{item}/" for item in items)
    for start in starts:
        if not any(name.startswith(start) for name in sums):
            return f"{start or 'everything'} is missing from {SUMS}"
    for name, value in sums.items():
        if not name.startswith(starts):
            continue
        try:
            with open(folder / name, "rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != value:
                    return f"{name} has changed"
        except OSError as error:
            return _damage_of(name, error)
    return None


def _damage_of(name: str, error: OSError) -> str:
    """The damage that a file which cannot be opened or read is; raises what may pass, as a missing permission."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return f"{name} is missing"
    if error.errno in (errno.EIO, errno.EUCLEAN):
        return f"{name} cannot be read: {error.strerror}"
    raise error
