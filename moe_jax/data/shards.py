"""Token streams on disk: written shard by shard so that a kill leaves a valid prefix; read through memory maps.

A split of a corpus is the files ``train-00000.bin``, ``train-00001.bin``, ... of token ids, all but the last of the
same length, and ``train.lengths``, the number of tokens of each document. Imports no jax.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from moe_jax.errors import UserError
from moe_jax.files import naming
from moe_jax.prepare.encode import Encoded

LENGTHS = np.dtype(np.uint32)


def shard_file(folder: Path, split: str, index: int) -> Path:
    return folder / f"{split}-{index:05d}.bin"


def lengths_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.lengths"


def split_files(
    folder: Path, split: str, dtype: np.dtype, shard_tokens: int, num_tokens: int, num_documents: int
) -> Iterator[tuple[Path, int]]:
    """Every file of a split and its size in bytes; the lengths come last."""
    for index, first in enumerate(range(0, num_tokens, shard_tokens)):
        yield shard_file(folder, split, index), min(num_tokens - first, shard_tokens) * dtype.itemsize
    yield lengths_file(folder, split), num_documents * LENGTHS.itemsize


@dataclass
class SplitCounts:
    """What of a split is on disk."""

    num_tokens: int = 0
    num_documents: int = 0
    num_bytes: int = 0
    """Of the text in UTF-8."""
    num_unknown: int = 0
    """Tokens that stand for text which the tokenizer cannot represent."""
    open_tokens: int = 0
    """Tokens of a document that has not ended yet."""


class SplitWriter:
    """Appends to a split. What was written after the last ``commit`` is not there for the next writer."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int, counts: SplitCounts):
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self.counts = counts
        folder.mkdir(parents=True, exist_ok=True)
        # Truncation would fill what is missing with zeros.
        kept = dict(split_files(folder, split, dtype, shard_tokens, counts.num_tokens, counts.num_documents))
        for file, size in kept.items():
            found = file.stat().st_size if file.exists() else 0
            if found < size:
                raise UserError(
                    f"{file} must have the {size} bytes that were written before, has {found}; "
                    "remove the folder and prepare again"
                )
        for file in [*folder.glob(f"{split}-*.bin"), lengths_file(folder, split)]:
            if file in kept:
                file.touch()
                os.truncate(file, kept[file])
            else:
                file.unlink()
        self._shard: IO[bytes] | None = None
        self._lengths = open(lengths_file(folder, split), "ab")  # noqa: SIM115 - closed by close()

    def write(self, encoded: Encoded) -> None:
        ids, counts = encoded.ids, self.counts
        while len(ids):
            index, used = divmod(counts.num_tokens, self._shard_tokens)
            if self._shard is None:
                self._shard = open(shard_file(self._folder, self._split, index), "ab")  # noqa: SIM115 - see close()
            now = ids[: self._shard_tokens - used]
            with naming(self._shard.name):
                self._shard.write(now.tobytes())
            counts.num_tokens += len(now)
            ids = ids[len(now) :]
            if counts.num_tokens % self._shard_tokens == 0:
                self._close_shard()
        ends = np.flatnonzero(encoded.is_last)
        reached = np.cumsum(encoded.lengths)
        at_ends = reached[ends] + counts.open_tokens
        lengths = np.diff(at_ends, prepend=0)
        if lengths.max(initial=0) > np.iinfo(LENGTHS).max:
            raise UserError(
                f"a document must have at most {np.iinfo(LENGTHS).max:,} tokens, got {lengths.max():,}; "
                "divide the file by --separator"
            )
        with naming(self._lengths.name):
            self._lengths.write(lengths.astype(LENGTHS).tobytes())
        counts.open_tokens += int(reached[-1]) - (int(at_ends[-1]) if len(ends) else 0)
        counts.num_documents += len(ends)
        counts.num_bytes += encoded.num_bytes
        counts.num_unknown += encoded.num_unknown

    def commit(self) -> None:
        """Returns once all that was written is on disk."""
        for file in (self._shard, self._lengths):
            if file is not None:
                _make_durable(file)

    def _close_shard(self) -> None:
        if self._shard is not None:
            shard, self._shard = self._shard, None
            with naming(shard.name), shard:
                _make_durable(shard)

    def close(self) -> None:
        with naming(self._lengths.name), self._lengths:
            self._close_shard()


def _make_durable(file: IO[bytes]) -> None:
    with naming(file.name):
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class Split:
    """The documents of a corpus that are trained on, or validated on, one after the other."""

    name: str
    folder: Path
    dtype: str
    shard_tokens: int
    num_tokens: int
    num_documents: int
    num_bytes: int
    """Of the text in UTF-8."""
    num_unknown: int
    """Tokens that stand for text which the tokenizer cannot represent."""
    sha256: dict[str, str]
    """Of each file, by its name."""

    def files(self) -> Iterator[tuple[Path, int]]:
        """Every file and its size in bytes."""
        dtype = np.dtype(self.dtype)
        return split_files(self.folder, self.name, dtype, self.shard_tokens, self.num_tokens, self.num_documents)

    def lengths(self) -> np.ndarray:
        """[documents] tokens of each, with what stands before and after it; uint32, mapped from disk."""
        return _map(lengths_file(self.folder, self.name), LENGTHS, self.num_documents)

    def stream(self) -> "TokenStream":
        return TokenStream(self)


class TokenStream:
    """The tokens of a split as one array, mapped from disk in the process that reads."""

    def __init__(self, split: Split):
        self._shard_tokens = split.shard_tokens
        self._length = split.num_tokens
        self.dtype = np.dtype(split.dtype)
        files = [file for file, _ in split.files()][:-1]
        sizes = [min(split.shard_tokens, split.num_tokens - split.shard_tokens * i) for i in range(len(files))]
        self._shards = [_map(file, self.dtype, size) for file, size in zip(files, sizes, strict=True)]

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


def file_sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
