"""Where text comes from: files, folders, globs and data sets, grouped into named corpora. Imports no jax."""

import contextlib
import glob
import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from moe_jax.data.pieces import PIECE, in_pieces
from moe_jax.errors import UserError
from moe_jax.prepare.formats import READERS, Part, ReadOptions, read_hub, read_play, reader_of
from moe_jax.prepare.plays import PLAYS, find_plays
from moe_jax.prepare.settings import PrepareConfig

DEFAULT_CORPUS = "text"
HUB = "hf:"
_NOT_TEXT = (".json", ".bz2", ".xz", ".zip", ".tar", ".tgz", ".7z", ".arrow", ".npy", ".bin", ".pdf")
"""Suffixes of files that are refused even if they are named one by one."""


@dataclass(frozen=True)
class Source:
    """One file, or one data set of the hub."""

    name: str
    """Tells it from the others of its corpus, wherever the folder lies."""
    path: str
    """The file, or the data set as hf:NAME."""
    is_chosen: bool
    """Whether the user named it, or found it in a folder or by a glob."""

    def parts(self, options: ReadOptions) -> Iterator[Part]:
        if self.path.startswith(HUB):
            return read_hub(self.path.removeprefix(HUB), options)
        if self.name.startswith(PLAYS):
            return read_play(Path(self.path), options)
        # A file that was named, whatever its suffix: text unless the suffix says another format.
        return (reader_of(Path(self.path)) or READERS[".txt"])(Path(self.path), options)

    def sha256(self) -> str | None:
        """Of the file's bytes; None for a data set of the hub."""
        if self.path.startswith(HUB):
            return None
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class CorpusSources:
    name: str
    train: tuple[Source, ...]
    val: tuple[Source, ...]
    """Empty: some of ``train`` is held out."""
    options: ReadOptions
    weight: float | None
    """Share in training; None: by its number of tokens."""

    def stamps(self) -> list[tuple[int, int]]:
        """Size and time of change of each file."""
        files = [source.path for source in (*self.train, *self.val) if not source.path.startswith(HUB)]
        return [(os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files if os.path.exists(file)]


def changed(corpus: str) -> UserError:
    """The error for an input that the second pass finds other than the first did."""
    return UserError(
        f"the input of {corpus} changed while it was prepared; remove the folder and prepare again once nothing "
        "writes to the input"
    )


def find_corpora(config: PrepareConfig) -> list[CorpusSources]:
    """The corpora that ``config`` names, each with its files. UserError where one has none or a name is unknown."""
    inputs, val_inputs = _by_corpus(config.input), _by_corpus(config.val_input)
    text_keys, weights = _settings("--text-key", config.text_key), _settings("--weights", config.weights)
    for flag, names in (("--val-input", val_inputs), ("--text-key", text_keys), ("--weights", weights)):
        unknown = sorted(name for name in names if name and name not in inputs)
        if unknown:
            raise UserError(
                f"{flag} names the corpus {unknown[0]}, which --input does not (it has {', '.join(inputs)}); "
                "give it an input, as NAME=PATH"
            )
    if "tokenizer" in inputs:
        raise UserError("a corpus cannot be called tokenizer, which is a folder of its own; choose another name")
    for name, paths in inputs.items():
        both = {os.path.realpath(path) for path in paths} & {os.path.realpath(p) for p in val_inputs.get(name, [])}
        if both:
            raise UserError(f"--val-input and --input of {name} both name {min(both)}; validate on other text")
    if weights and set(weights) != set(inputs):
        missing = sorted(set(inputs) - set(weights))
        raise UserError(
            f"--weights must be NAME=NUMBER for every corpus, and lacks {', '.join(missing) or 'the names'}; add them"
        )
    return [
        CorpusSources(
            name=name,
            train=_sources(paths),
            val=_sources(val_inputs.get(name, [])),
            options=ReadOptions(text_keys.get(name, text_keys.get("", "text")), config.separator, config.errors),
            weight=_weight(name, weights[name]) if weights else None,
        )
        for name, paths in inputs.items()
    ]


def _by_corpus(inputs: Iterable[str]) -> dict[str, list[str]]:
    """Paths of ``inputs``, each PATH or CORPUS=PATH, by corpus."""
    found: dict[str, list[str]] = {}
    for item in inputs:
        name, path = (DEFAULT_CORPUS, item) if Path(item).exists() else _setting(item)
        found.setdefault(name or DEFAULT_CORPUS, []).append(path)
    return found


def _setting(item: str) -> tuple[str, str]:
    """(name, value) of NAME=VALUE; the name is empty where there is none."""
    match = re.fullmatch(r"([A-Za-z][\w-]*)=(.*)", item, re.DOTALL)
    return (match[1], match[2]) if match else ("", item)


def _settings(flag: str, items: Iterable[str]) -> dict[str, str]:
    """The values of ``items`` by their names. UserError where two of them have the same name."""
    found: dict[str, str] = {}
    for name, value in map(_setting, items):
        if name in found:
            raise UserError(
                f"{flag} must name a corpus once, got {found[name]} and {value} for {name or 'all'}; leave one out"
            )
        found[name] = value
    return found


def _weight(name: str, value: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(value) < math.inf:
            return float(value)
    raise UserError(f"--weights {name}={value} must be a number above 0, such as {name}=2; change it")


def _sources(paths: Iterable[str]) -> tuple[Source, ...]:
    found = [source for path in paths for source in _find(path)]
    names = [source.name for source in found]
    twice = sorted(name for name in set(names) if names.count(name) > 1)
    if twice:
        raise UserError(f"the inputs have two sources called {twice[0]}; name their common folder, or rename one")
    return tuple(found)


def _find(path: str) -> list[Source]:
    if not path:
        raise UserError("an input is an empty name, as of a variable that is not set; name a file, a folder or a glob")
    if path == PLAYS:
        return [Source(PLAYS + name, str(file), False) for name, file in find_plays()]
    if path.startswith(HUB):
        return [Source(path, path, True)]
    if not Path(path).exists() and glob.has_magic(path):
        files = sorted(Path(file) for file in glob.glob(path, recursive=True) if Path(file).is_file())
        if not files:
            raise UserError(f"the input {path} matches no file; change the pattern")
        return [Source(str(file), str(file), False) for file in files]
    if not Path(path).exists():
        raise UserError(f"the input {path} does not exist; name a file, a folder, a glob or hf:DATASET")
    if not Path(path).is_dir():
        if Path(path).suffix.lower() in _NOT_TEXT:
            raise UserError(f"the input {path} is of no known format ({', '.join(READERS)}); convert or unpack it")
        return [Source(Path(path).name, path, True)]
    files = sorted(file for file in _walk(Path(path)) if file.is_file() and reader_of(file))
    if not files:
        kinds = ", ".join(READERS)
        raise UserError(f"the input {path} holds no file of a known format ({kinds}); name a folder that has text")
    return [Source(str(file.relative_to(path)), str(file), False) for file in files]


def _walk(folder: Path) -> Iterator[Path]:
    """All files in ``folder``. OSError where a folder in it cannot be read, which would leave text out unseen."""

    def fail(error: OSError) -> None:
        raise error

    for place, _, names in os.walk(folder, onerror=fail):
        yield from (Path(place) / name for name in names)


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    document: int
    """Index of the document among those of its input."""
    name: str
    """The document's: that of its source, and its place in it where there are several."""
    text: str
    is_first: bool
    is_last: bool


class Documents:
    """The pieces of at most ``limit`` documents in ``sources``; what is white space only is left out."""

    def __init__(self, sources: Iterable[Source], options: ReadOptions, limit: int | None):
        self._sources, self._options, self._limit = sources, options, limit
        self.empty_sources: list[Source] = []
        """Sources without a document, once all was read."""

    def __iter__(self) -> Iterator[Piece]:
        self.empty_sources = []
        index = 0
        for source in self._sources:
            in_source = 0
            for pieces in _documents(source.parts(self._options)):
                if self._limit is not None and index >= self._limit:
                    return
                before = next(pieces, None)
                if before is None:
                    continue
                # The only document of a file has the file's name.
                name = f"{source.name}#{in_source}" if in_source else source.name
                is_first = True
                for piece in pieces:
                    yield Piece(index, name, before, is_first, False)
                    before, is_first = piece, False
                yield Piece(index, name, before, is_first, True)
                index, in_source = index + 1, in_source + 1
            if not in_source:
                self.empty_sources.append(source)


def _documents(parts: Iterator[Part]) -> Iterator[Iterator[str]]:
    """The pieces of each document, one document after the other; none for one that is white space only."""
    for text, is_last in parts:
        if is_last and len(text) <= PIECE:  # most of them
            yield iter([text] if text.strip() else [])
            continue
        chunks = _until_end(text, is_last, parts)
        yield _unless_blank(in_pieces(chunks))
        for _ in chunks:  # what was not read of this document
            continue


def _until_end(text: str, is_last: bool, parts: Iterator[Part]) -> Iterator[str]:
    yield text
    while not is_last:
        text, is_last = next(parts)
        yield text


def _unless_blank(pieces: Iterator[str]) -> Iterator[str]:
    """``pieces``, unless all are white space; those before the first that is not are held back until it comes."""
    held = []
    for piece in pieces:
        held.append(piece)
        if piece.strip():
            yield from held
            yield from pieces
            return
