"""Token streams on their way to disk, shard by shard, so that a kill leaves a valid beginning. Imports no jax."""

import contextlib
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
    open_document: tuple[Natural, Natural, Natural] = (0, 0, 0)
    """Tokens, bytes and unknown tokens of a document that has not ended yet; the bytes above leave them out."""


def documents_file(split: Split) -> Path:
    """Of a split of a part: [documents, 5] tokens, bytes, unknown tokens, ``InputScan.table``; as uint64."""
    return split.folder / f"{split.name}.documents"


class SplitWriter:
    """Appends to a split; begins by removing what was written after the last ``commit``.

    The split of a part gets the ``InputScan.table`` of its documents, and a ``documents_file`` with it.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        dtype: np.dtype,
        shard_tokens: int,
        counts: SplitCounts,
        table: np.ndarray | None = None,
    ):
        self._folder, self._name, self._dtype, self._shard_tokens = folder, name, dtype, shard_tokens
        self.counts, self._table = counts, table
        refuse_link(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kept, growing = dict(self.split().files()), [self.split().lengths_file]
        if table is not None:
            growing.append(documents_file(self.split()))
            kept[growing[1]] = counts.num_documents * 5 * 8
        for file, size in kept.items():
            found = file.stat().st_size if file.exists() else 0
            if found < size:  # truncation would fill what is missing with zeros
                raise UserError(
                    f"{file} must have the {size} bytes that were written before, has {found}; "
                    "remove the folder and prepare again"
                )
        for file in [*folder.glob(f"{name}-*.bin"), *growing]:
            refuse_link(file)
            if file in kept:
                file.touch()
                os.truncate(file, kept[file])
            else:
                file.unlink()
        self._shard: IO[bytes] | None = None
        self._growing = [open(file, "ab") for file in growing]  # noqa: SIM115 - closed by close()

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
        reached = encoded.documents.copy()
        reached[0] += counts.open_document
        documents, lengths = reached[:-1], reached[:-1, 0]
        if lengths.max(initial=0) > np.iinfo(LENGTHS).max:
            raise UserError(
                f"a document must have at most {np.iinfo(LENGTHS).max:,} tokens, got {lengths.max():,}; "
                "divide the file by --separator"
            )
        numbers: list[np.ndarray] = [lengths.astype(LENGTHS)]
        if self._table is not None:
            scanned = self._table[counts.num_documents :][: len(documents)]
            numbers.append(np.hstack([documents.astype(np.uint64), scanned]))
        for file, written in zip(self._growing, numbers, strict=True):
            with naming(file.name):
                file.write(written.tobytes())
        counts.open_document = tuple(reached[-1].tolist())
        counts.num_documents += len(documents)
        counts.num_bytes += int(documents[:, 1].sum())
        counts.num_unknown += int(documents[:, 2].sum())

    def commit(self) -> None:
        """Returns once all that was written is on disk."""
        for file in (self._shard, *self._growing):
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
        with contextlib.ExitStack() as stack:
            for file in self._growing:
                stack.enter_context(naming(file.name))
                stack.enter_context(file)
            self._close_shard()


def _make_durable(file: IO[bytes]) -> None:
    with naming(file.name):
        file.flush()
        os.fsync(file.fileno())
