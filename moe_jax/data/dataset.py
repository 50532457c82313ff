"""A prepared folder: token streams on disk, checked before they are used. Imports no jax.

A split of a corpus is the files ``train-00000.bin``, ``train-00001.bin``, ... of token ids, all but the last of the
same length, and ``train.lengths``, the number of tokens of each document. ``meta.json`` is written last, so a folder
that has one is whole.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.tokenizer_file import fingerprint, load_tokenizer
from moe_jax.errors import UserError
from moe_jax.files import (
    MOST_BYTES_OF_MANY,
    atomic_write_text,
    cache_folder,
    make_writable,
    open_regular,
    read_json,
)

# Raise it when the same text and settings would give other files.
FORMAT_VERSION = 3
LENGTHS = np.dtype(np.uint32)
"""The type of the lengths of documents on disk."""

Natural = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True)
class SplitMeta:
    """A split as meta.json has it."""

    dtype: Annotated[str, msgspec.Meta(pattern=r"^uint(16|32)\Z")]
    """Of token ids: uint16 or uint32."""
    shard_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
    num_tokens: Natural
    num_documents: Natural
    num_bytes: Natural
    """Of the text in UTF-8."""
    num_unknown: Natural
    """Tokens that stand for text which the tokenizer cannot represent."""
    sha256: dict[str, str]
    """Of each file, by its name."""


@dataclass(frozen=True, kw_only=True)
class Split(SplitMeta):
    """The documents of a corpus that are trained on, or validated on, one after the other."""

    name: str
    """train or val."""
    folder: Path

    @property
    def lengths_file(self) -> Path:
        return self.folder / f"{self.name}.lengths"

    def shard_file(self, index: int) -> Path:
        return self.folder / f"{self.name}-{index:05d}.bin"

    def shards(self) -> Iterator[tuple[Path, int]]:
        """Every file of tokens and its number of them."""
        for index, first in enumerate(range(0, self.num_tokens, self.shard_tokens)):
            yield self.shard_file(index), min(self.num_tokens - first, self.shard_tokens)

    def files(self) -> Iterator[tuple[Path, int]]:
        """Every file and its size in bytes; the lengths come last."""
        for file, size in self.shards():
            yield file, size * np.dtype(self.dtype).itemsize
        yield self.lengths_file, self.num_documents * LENGTHS.itemsize

    def lengths(self) -> np.ndarray:
        """[documents] tokens of each, with what stands before and after it; uint32, mapped from disk."""
        return _map(self.lengths_file, LENGTHS, self.num_documents)

    def stream(self) -> "TokenStream":
        return TokenStream(self)

    def meta(self) -> SplitMeta:
        return SplitMeta(**{field.name: getattr(self, field.name) for field in dataclasses.fields(SplitMeta)})


class TokenStream:
    """The tokens of a split as one array, mapped from disk in the process that reads."""

    def __init__(self, split: Split):
        self._shard_tokens, self._length, self.dtype = split.shard_tokens, split.num_tokens, np.dtype(split.dtype)
        self._shards = [_map(file, self.dtype, size) for file, size in split.shards()]

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` - 1 in the type of the shards."""
        first, last = start // self._shard_tokens, max(start, stop - 1) // self._shard_tokens
        offset = first * self._shard_tokens
        if first == last:
            return self._shards[first][start - offset : stop - offset]
        middle = min(stop, offset + self._shard_tokens)
        return np.concatenate([self.read(start, middle), self.read(middle, stop)])


def _map(file: Path, dtype: np.dtype, size: int) -> np.ndarray:
    # An ordinary array on the mapped memory: slices of np.memmap cost ten times as much.
    return np.asarray(np.memmap(file, dtype=dtype, mode="r", shape=(size,))) if size else np.zeros(0, dtype)


@dataclass(frozen=True)
class Corpus:
    name: str
    weight: float
    """Share of the training rows; those of all corpora sum to one."""
    train: Split
    val: Split


@dataclass(frozen=True)
class MadeFrom:
    """Everything that the files of a folder depend on: if it is equal, so are they."""

    version: int
    settings: dict[str, Any]
    """The flags of the preparation, but for those of inputs and weights."""
    corpora: dict[str, Any]
    """By corpus: its sources and what was counted in them."""


@dataclass(frozen=True)
class Dataset:
    folder: Path
    tokenizer: Tokenizer
    corpora: tuple[Corpus, ...]
    made_from: MadeFrom
    fingerprint: str
    """Identifies the token streams and their mixture: equal fingerprints mean equal batches."""

    def splits(self, name: str) -> list[Split]:
        """The ``train`` or ``val`` split of each corpus."""
        return [corpus.train if name == "train" else corpus.val for corpus in self.corpora]


class TokenizerMeta(msgspec.Struct):
    name: str
    vocab_size: int
    sha256: str


class CorpusMeta(msgspec.Struct):
    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z][\w-]*\Z")]
    """That of a folder too."""
    weight: Annotated[float, msgspec.Meta(gt=0, le=1)]
    train: SplitMeta
    val: SplitMeta


class _Version(msgspec.Struct):
    version: int


class Meta(msgspec.Struct):
    """The content of meta.json."""

    version: int
    fingerprint: str
    tokenizer: TokenizerMeta
    corpora: Annotated[list[CorpusMeta], msgspec.Meta(min_length=1)]
    made_from: MadeFrom


def meta_file(folder: Path) -> Path:
    return folder / "meta.json"


def progress_file(folder: Path) -> Path:
    """What an unfinished preparation knows of itself."""
    return folder / "progress.json"


def is_dataset(folder: Path) -> bool:
    """Whether ``folder`` is one that a preparation made, or began."""
    return meta_file(folder).exists() or progress_file(folder).exists()


read_list = functools.partial(read_json, most_bytes=MOST_BYTES_OF_MANY, is_lenient=True)
"""Reads meta.json or progress.json: they list every source, and the names of files need not be UTF-8."""


def open_dataset(folder: Path) -> Dataset:
    """The prepared data in ``folder``, its files checked. UserError where they are not as they were made.

    A file's size is always compared. Its SHA-256 is, and the numbers in it are looked at, where its time of change is
    not the one it had when it was last checked on this machine.
    """
    file = meta_file(folder)
    if not file.exists():
        raise UserError(
            f"the preparation of {folder} was interrupted; run the same python -m moe_jax.prepare command again "
            "to complete it"
        )
    tokenizer = load_tokenizer(folder / "tokenizer")
    version = read_list(file, _Version, "prepare the folder again").version
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file} has format version {version}, this program reads {FORMAT_VERSION}; prepare the folder again"
        )
    meta = read_list(file, Meta, "prepare the folder again")
    if meta.tokenizer.sha256 != fingerprint(tokenizer):
        raise UserError(f"the tokenizer in {folder} is not the one its tokens are from; prepare the folder again")
    corpora = tuple(
        Corpus(
            corpus.name,
            corpus.weight,
            Split(name="train", folder=folder / corpus.name, **vars(corpus.train)),
            Split(name="val", folder=folder / corpus.name, **vars(corpus.val)),
        )
        for corpus in meta.corpora
    )
    if data_fingerprint(tokenizer, corpora) != meta.fingerprint:
        raise UserError(f"{file} was changed after it was made; prepare the folder again")
    data = Dataset(folder, tokenizer, corpora, meta.made_from, meta.fingerprint)
    _check_files(data)
    return data


def data_fingerprint(tokenizer: Tokenizer, corpora: Iterable[Corpus]) -> str:
    parts = [[corpus.name, corpus.weight, [vars(corpus.train.meta()), vars(corpus.val.meta())]] for corpus in corpora]
    content = json.dumps([FORMAT_VERSION, fingerprint(tokenizer), parts], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _check_files(data: Dataset) -> None:
    remedy = "put a copy of it back, or prepare the folder again"
    known, is_new = _checked(data.fingerprint), False
    for split in (*data.splits("train"), *data.splits("val")):
        for file, size in split.files():
            if not file.exists():
                raise UserError(f"{file} is missing; {remedy}")
            if file.stat().st_size != size:
                raise UserError(f"{file} must have {size} bytes, has {file.stat().st_size}; {remedy}")
            if known.get(str(file.resolve())) == file.stat().st_mtime_ns:
                continue
            _check_content(file, split, data.tokenizer.vocab_size, remedy)
            is_new = True
    if is_new:
        remember_checked(data.fingerprint, data.corpora)


def _check_content(file: Path, split: Split, vocab_size: int, remedy: str) -> None:
    """UserError unless ``file`` is as it was made, its ids are of the vocabulary or its lengths those of its split.

    Whoever makes up a folder makes up its checksums too.
    """
    is_lengths = file == split.lengths_file
    digest, low, high, total = hashlib.sha256(), 1, 0, 0
    with open_regular(file) as stream:
        while chunk := stream.read(1 << 24):
            digest.update(chunk)
            numbers = np.frombuffer(chunk, LENGTHS if is_lengths else split.dtype)
            low, high = min(low, int(numbers.min())), max(high, int(numbers.max()))
            total += int(numbers.sum(dtype=np.uint64))
    if digest.hexdigest() != split.sha256.get(file.name):
        raise UserError(f"{file} was changed after it was made (its SHA-256 is another); {remedy}")
    if is_lengths and (total != split.num_tokens or low < 1):
        raise UserError(
            f"the lengths in {file} must be at least 1 and add up to the {split.num_tokens} tokens of the split, got "
            f"{total}; {remedy}"
        )
    if not is_lengths and high >= vocab_size:
        raise UserError(f"{file} has the token {high}, but its tokenizer only {vocab_size} tokens; {remedy}")


_CHECKED = "checked_numbers"
"""A folder of its own: an older one remembers files whose SHA-256 alone was compared."""


def _checked(fingerprint: str) -> dict[str, int]:
    """Time of change of each file when its content was last known to be right, by its path."""
    try:
        return read_json(cache_folder(_CHECKED) / f"{fingerprint}.json", dict[str, int], "", is_lenient=True)
    except (OSError, UserError):
        return {}


def remember_checked(fingerprint: str, corpora: Iterable[Corpus]) -> None:
    """Notes on this machine that the files are now as they were made, so that ``open_dataset`` need not read them."""
    files = [file for corpus in corpora for split in (corpus.train, corpus.val) for file, _ in split.files()]
    known = _checked(fingerprint) | {str(file.resolve()): file.stat().st_mtime_ns for file in files}
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a reading of the files at each start
        atomic_write_text(make_writable(cache_folder(_CHECKED)) / f"{fingerprint}.json", json.dumps(known))


def file_sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
