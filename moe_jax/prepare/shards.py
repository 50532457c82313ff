"""Token streams on their way to disk, shard by shard, so that a kill leaves a valid beginning. Imports no jax."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from moe_jax.data.dataset import LENGTHS, Natural, Split, file_sha256
from moe_jax.errors import UserError
from moe_jax.files import naming, refuse_link
from moe_jax.prepare.encode import Encoded


@dataclass
class SplitCounts:
    """What of a split is on disk."""

    num_tokens: Natural = 0
    num_documents: Natural = 0
    num_bytes: Natural = 0
    """Of the text in UTF-8."""
    num_unknown: Natural = 0
    """Tokens that stand for text which the tokenizer cannot represent."""
    open_tokens: Natural = 0
    """Tokens of a document that has not ended yet."""


class SplitWriter:
    """Appends to a split; begins by removing what was written after the last ``commit``."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, shard_tokens: int, counts: SplitCounts):
        self._folder, self._name, self._dtype, self._shard_tokens = folder, name, dtype, shard_tokens
        self.counts = counts
        refuse_link(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kept = dict(self.split().files())
        for file, size in kept.items():
            found = file.stat().st_size if file.exists() else 0
            if found < size:  # truncation would fill what is missing with zeros
                raise UserError(
                    f"{file} must have the {size} bytes that were written before, has {found}; "
                    "remove the folder and prepare again"
                )
        lengths_file = self.split().lengths_file
        for file in [*folder.glob(f"{name}-*.bin"), lengths_file]:
            refuse_link(file)
            if file in kept:
                file.touch()
                os.truncate(file, kept[file])
            else:
                file.unlink()
        self._shard: IO[bytes] | None = None
        self._lengths = open(lengths_file, "ab")  # noqa: SIM115 - closed by close()

    def split(self) -> Split:
        """What was written, without the hashes of its files."""
        return Split(
            name=self._name,
            folder=self._folder,
            dtype=self._dtype.name,
            shard_tokens=self._shard_tokens,
            num_tokens=self.counts.num_tokens,
            num_documents=self.counts.num_documents,
            num_bytes=self.counts.num_bytes,
            num_unknown=self.counts.num_unknown,
            sha256={},
        )

    def write(self, encoded: Encoded) -> None:
        ids, counts = encoded.ids, self.counts
        while len(ids):
            index, used = divmod(counts.num_tokens, self._shard_tokens)
            if self._shard is None:
                self._shard = open(self.split().shard_file(index), "ab")  # noqa: SIM115 - closed by close()
            now, ids = np.split(ids, [self._shard_tokens - used])
            with naming(self._shard.name):
                self._shard.write(now.tobytes())
            counts.num_tokens += len(now)
            if counts.num_tokens % self._shard_tokens == 0:
                self._close_shard()
        reached = encoded.lengths.copy()
        reached[0] += counts.open_tokens
        lengths = reached[:-1]
        if lengths.max(initial=0) > np.iinfo(LENGTHS).max:
            raise UserError(
                f"a document must have at most {np.iinfo(LENGTHS).max:,} tokens, got {lengths.max():,}; "
                "divide the file by --separator"
            )
        with naming(self._lengths.name):
            self._lengths.write(lengths.astype(LENGTHS).tobytes())
        counts.open_tokens = int(reached[-1])
        counts.num_documents += len(lengths)
        counts.num_bytes += encoded.num_bytes
        counts.num_unknown += encoded.num_unknown

    def commit(self) -> None:
        """Returns once all that was written is on disk."""
        for file in (self._shard, self._lengths):
            if file is not None:
                _make_durable(file)

    def sealed(self) -> Split:
        """The whole split, with the hashes of its files. UserError if they are not as they were written."""
        split = self.split()
        for file, size in split.files():
            if not file.exists() or file.stat().st_size != size:
                raise UserError(f"{file} was changed while it was made; remove the folder and prepare again")
        return dataclasses.replace(split, sha256={file.name: file_sha256(file) for file, _ in split.files()})

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
