"""Checksums of a folder's files: written once the folder is whole, compared before anything in it is read.

Orbax restores a flipped bit without a word. Imports no jax.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from moe_jax.errors import UserError
from moe_jax.files import atomic_write_text, open_regular, read_json

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


def find_damage(folder: Path, items: Iterable[str] | None = None, *, most_bytes: int | None = None) -> str | None:
    """What is wrong with the files of ``folder``, or of these folders in it; None where all are as when sealed.

    A file of more than ``most_bytes`` is not read at all.
    """
    try:
        sums = read_json(folder / SUMS, dict[str, str], "")
    except FileNotFoundError:
        return f"{SUMS} is missing"
    except UserError:
        return f"{SUMS} cannot be read"
    except OSError as error:
        return _damage_of(SUMS, error)
    starts = ("",) if items is None else tuple(f"{item}/" for item in items)
    for file in (file for start in starts for file in (folder / start).rglob("*") if not file.is_dir()):
        name = str(file.relative_to(folder))
        if "/" in name and name not in sums and not file.name.startswith("."):  # in an item, so Orbax would read it
            return f"{name} is not in {SUMS}"
    for start in starts:
        if not any(name.startswith(start) for name in sums):
            return f"{start or 'everything'} is missing from {SUMS}"
    for name, value in sums.items():
        if not name.startswith(starts):
            continue
        try:
            with open_regular(folder / name) as opened:
                size = os.fstat(opened.fileno()).st_size
                if most_bytes is not None and size > most_bytes:
                    return f"{name} must have at most {most_bytes:,} bytes, and has {size:,}"
                if hashlib.file_digest(opened, "sha256").hexdigest() != value:
                    return f"{name} has changed"
        except OSError as error:
            return _damage_of(name, error)
        except UserError:
            return f"{name} is no regular file"
    return None


def _damage_of(name: str, error: OSError) -> str:
    """The damage that a file which cannot be opened or read is; raises what may pass, as a missing permission."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return f"{name} is missing"
    if error.errno in (errno.EIO, errno.EUCLEAN):
        return f"{name} cannot be read: {error.strerror}"
    raise error
