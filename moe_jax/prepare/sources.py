"""Where text comes from: files, folders, globs and data sets, grouped into named corpora. Imports no jax."""

import contextlib
import glob
import hashlib
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from moe_jax.data.pieces import PIECE, in_pieces
from moe_jax.errors import UserError
from moe_jax.prepare.formats import READERS, format_of, read_play, reader_of
from moe_jax.prepare.options import Notes, Part, ReadOptions
from moe_jax.prepare.plays import PLAYS, find_plays
from moe_jax.prepare.settings import PrepareConfig
from moe_jax.prepare.tables import read_hub
from moe_jax.prepare.walk import glob_files, walk

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

    def identity(self) -> tuple:
        """Equal for two names of the same file, or of the same part of a data set."""
        if self.path.startswith(HUB):
            name, _, split = self.path.removeprefix(HUB).partition(":")
            return HUB, name, split or "train"
        found = os.stat(self.path)
        return found.st_dev, found.st_ino

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
    if weights and set(weights) != set(inputs):
        missing = sorted(set(inputs) - set(weights))
        raise UserError(
            f"--weights must be NAME=NUMBER for every corpus, and lacks {', '.join(missing) or 'the names'}; add them"
        )
    notes = {name: Notes() for name in inputs}
    keys = {name: text_keys.get(name, text_keys.get("", "text")) for name in inputs}
    train = {name: _sources(paths, keys[name], notes[name]) for name, paths in inputs.items()}
    val = {name: _sources(val_inputs.get(name, []), keys[name], notes[name]) for name in inputs}
    _keep_apart(train, val, notes)
    return [
        CorpusSources(
            name=name,
            train=tuple(train[name].values()),
            val=tuple(val[name].values()),
            options=ReadOptions(keys[name], config.separator, config.errors, notes[name]),
            weight=_weight(name, weights[name]) if weights else None,
        )
        for name in inputs
    ]


_Sources = dict[tuple, Source]
"""By their identities and the key of their texts: what two of them have in common is one text under two names."""


def _keep_apart(train: dict[str, _Sources], val: dict[str, _Sources], notes: dict[str, Notes]) -> None:
    """Takes what any corpus validates on out of what is trained on. UserError where it was named, or two share it."""
    validated = {identity: (name, source) for name, found in val.items() for identity, source in found.items()}
    corpus_of: dict[tuple, str] = {}
    for name, found in train.items():
        for identity in [identity for identity in found if identity in validated]:
            val_name, source = validated[identity]
            if found[identity].is_chosen or len(found) == 1:
                raise UserError(
                    f"--val-input and --input of {name} both name {source.path}"
                    f"{'' if name == val_name else f' (validated on by {val_name})'}; validate on other text"
                )
            notes[name].add("files that are validated on, left out of training", found.pop(identity).path)
        for identity, source in found.items():
            other = corpus_of.setdefault(identity, name)
            if other != name:
                raise UserError(
                    f"the corpora {other} and {name} both have {source.path}, so that one would train on what the "
                    "other holds out; leave it out of one"
                )


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


def _sources(paths: Iterable[str], text_key: str, notes: Notes) -> _Sources:
    found: _Sources = {}
    for source in (source for path in paths for source in _find(path, notes)):
        known = found.setdefault((text_key, *source.identity()), source)
        if known is source:
            continue
        if known.is_chosen and source.is_chosen and known.name == source.name:
            raise UserError(f"the inputs have two sources called {source.name}, which are the same; leave one out")
        notes.add("files under a second name, counted once", source.path)
    (name, number), *_ = Counter(source.name for source in found.values()).most_common(1) or [("", 0)]
    if number > 1:
        raise UserError(f"the inputs have two sources called {name}; name their common folder, or rename one")
    return found


def _find(path: str, notes: Notes) -> list[Source]:
    if not path:
        raise UserError("an input is an empty name, as of a variable that is not set; name a file, a folder or a glob")
    if path == PLAYS:
        return [Source(PLAYS + name, str(file), False) for name, file in find_plays()]
    if path.startswith(HUB):
        return [Source(path, path, True)]
    if not Path(path).exists() and glob.has_magic(path):
        files = sorted(glob_files(path, notes))
        if not files:
            raise UserError(f"the input {path} matches no file; change the pattern")
        return [_file(str(file), file) for file in files]
    if not Path(path).exists():
        raise UserError(f"the input {path} does not exist; name a file, a folder, a glob or hf:DATASET")
    if not Path(path).is_dir():
        if not Path(path).is_file():
            raise UserError(
                f"the input {path} is a pipe or a device, which cannot be read twice; write it to a file and name that"
            )
        if format_of(Path(path)) in _NOT_TEXT:
            raise UserError(f"the input {path} is of no known format ({', '.join(READERS)}); convert or unpack it")
        return [_file(Path(path).name, Path(path), is_chosen=True)]
    files = (place / name for place, names in walk(Path(path), notes) for name in names if reader_of(Path(name)))
    files = sorted(file for file in files if file.is_file() or notes.add("no regular files, left out", str(file)))
    if not files:
        kinds = ", ".join(READERS)
        raise UserError(f"the input {path} holds no file of a known format ({kinds}); name a folder that has text")
    for file in filter(Path.is_symlink, files):
        notes.add("links followed", str(file))
    return [_file(str(file.relative_to(path)), file) for file in files]


def _file(name: str, file: Path, *, is_chosen: bool = False) -> Source:
    """The source that is ``file``, even if it is called hf:x.txt or plays:x.txt."""
    name, path = (f"./{text}" if text.startswith((HUB, PLAYS)) else text for text in (name, str(file)))
    return Source(name, path, is_chosen)


AROUND = 256
"""Characters of the pieces before and after that a piece has with it."""


class Piece(NamedTuple):
    """A document, or a part of a long one."""

    document: int
    """Index of the document among those of its input."""
    name: str
    """The document's: that of its source, and its place in it where there are several."""
    text: str
    is_first: bool
    is_last: bool
    before: str = ""
    after: str = ""
    """Some text of the document around the piece."""
    source: str = ""
    """The name of its source."""


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
                around, is_first = "", True
                for piece in pieces:
                    yield Piece(index, name, before, is_first, False, around, piece[:AROUND].rstrip(), source.name)
                    # A tokenizer may treat white space at an end otherwise.
                    around, before, is_first = before[-AROUND:].lstrip(), piece, False
                yield Piece(index, name, before, is_first, True, around, "", source.name)
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
        if piece.strip():
            yield from (zlib.decompress(blank).decode() for blank in held)
            yield piece
            yield from pieces
            return
        held.append(zlib.compress(piece.encode(), 1))  # there may be gigabytes of it
