"""Files in folders and by globs: links followed, hidden names left out, no folder met twice. Imports no jax."""

import glob
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from moe_jax.prepare.options import Notes

_MACOS = "__MACOSX"
"""The folder that macOS puts into archives: hidden there, and no text of the user's."""
_HIDDEN = "hidden names left out"
_OURS = "in run directories or prepared folders, left out"


def glob_files(pattern: str, notes: Notes) -> Iterator[Path]:
    """The files that ``pattern`` matches, where ``**`` goes through links too, but into each folder only once."""
    parts = Path(pattern).parts
    if "**" not in parts:
        named = next((at for at, part in enumerate(parts) if glob.has_magic(part)), len(parts))
        for file in filter(Path.is_file, map(Path, glob.glob(pattern))):
            is_ours = any(len(folder.parts) > named and _is_ours(folder) for folder in file.parents)
            if _MACOS in file.parts and _MACOS not in parts:
                notes.add(_HIDDEN, str(file))
            elif is_ours:
                notes.add(_OURS, str(file))
            else:
                yield file
        return
    at = parts.index("**")
    for head in glob.glob(str(Path(*parts[:at]))) if at else ["."]:
        for place, _ in walk(Path(head), notes):
            yield from glob_files(os.path.join(glob.escape(str(place)), *parts[at + 1 :] or "*"), notes)


def walk(folder: Path, notes: Notes) -> Iterator[tuple[Path, list[str]]]:
    """Each folder in ``folder``, itself among them, with the names in it that are not hidden and are no folders.

    Links to folders are followed once the folders that are none are through; what was met before is not met again.
    OSError where a folder cannot be read, which would leave text out unseen.
    """

    def fail(error: OSError) -> None:
        raise error

    seen, waiting = set(), deque([folder])
    while waiting:
        top = waiting.popleft()
        for place, folders, names in os.walk(top, onerror=fail):
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            if place != os.fspath(folder) and _is_ours(Path(place)):
                notes.add(_OURS, place)
                folders.clear()
                continue
            if place == os.fspath(top) and top != folder:
                notes.add("links followed", place)
            for name in filter(_is_hidden, sorted([*folders, *names])):
                notes.add(_HIDDEN, os.path.join(place, name))
            folders[:] = sorted(name for name in folders if not _is_hidden(name))
            waiting.extend(Path(place, name) for name in folders if os.path.islink(os.path.join(place, name)))
            yield Path(place), [name for name in names if not _is_hidden(name)]


def _is_ours(folder: Path) -> bool:
    """Whether this package writes in ``folder``, or MLflow for it: what appears there is not the user's text."""
    artifacts = folder.name == "mlflow-artifacts" and (folder.parent / "mlflow.db").exists()
    ours = ("train.log", "config.json", "meta.json", "progress.json")  # others, too, have files called .lock
    return artifacts or ((folder / ".lock").exists() and any((folder / name).exists() for name in ours))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == _MACOS
