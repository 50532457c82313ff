"""Batches of token ids: drawn through a Grain pipeline for training, every row once for evaluation.

In every mode row i of a run is a function of (seed, i), so batch n is one of (seed, n): the state is an integer.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol, Self

import grain
import numpy as np

from moe_jax.config import DataConfig
from moe_jax.data.dataset import Dataset, Split, TokenStream
from moe_jax.data.rows import PackedRows, Parts, ShuffledRows, cut_documents
from moe_jax.data.tokenizer import UNKNOWN, Tokenizer, document_end
from moe_jax.errors import UserError

Batch = dict[str, np.ndarray]
"""inputs, targets [B, L] int32; beside them, where not every token counts, mask [B, L] bool, and where a row holds
several documents, segments and positions [B, L] int32: the number of a document in its row from 1, 0 for padding;
places in the document."""

_MIX_BLOCK = 1 << 16
"""Rows over which a mixture keeps its weights exactly."""


def check_data(data: Dataset, config: DataConfig, context_length: int) -> None:
    """UserError where ``data`` cannot be trained or validated on in the way that ``config`` asks for."""
    for corpus in data.corpora:
        for split in (corpus.train, corpus.val):
            if config.mode == "windows" and split.num_tokens < context_length + 1:
                raise UserError(
                    f"the {split.name} split of {corpus.name} must have at least model.context_length + 1 = "
                    f"{context_length + 1} tokens, got {split.num_tokens}; give more text, hold out another fraction, "
                    "lower model.context_length or set data.mode to packed"
                )
            if not split.num_documents:
                raise UserError(f"the {split.name} split of {corpus.name} has no documents; give more text")
    for corpus, count in zip(data.corpora, rows_of_a_block([c.weight for c in data.corpora]), strict=True):
        if not count:
            raise UserError(
                f"the corpus {corpus.name} has {corpus.weight:.2g} of the rows, less than one in {_MIX_BLOCK:,}, and "
                "would never be drawn; raise its weight by --weights, or leave it out"
            )
    if config.token_dropout and config.token_dropout_by == "unknown" and UNKNOWN not in data.tokenizer.specials:
        raise UserError(
            f"data.token_dropout_by=unknown needs a token {UNKNOWN}, which {data.tokenizer.name} does not have; "
            "set it to random"
        )


class Rows(Protocol):
    """The rows of one split in one mode."""

    def __len__(self) -> int:
        """Rows in one epoch."""
        ...

    def write(self, index: int, batch: Batch, place: int) -> None:
        """Writes row ``index``, counted over all epochs, into row ``place`` of ``batch``."""
        ...


class _Windows:
    """Random windows: their starts are uniform over the stream, with replacement."""

    def __init__(self, split: Split, context_length: int, seed: int):
        self._stream, self._length, self._seed = split.stream(), context_length + 1, seed

    def __len__(self) -> int:
        return max(1, (len(self._stream) - 1) // (self._length - 1))

    def write(self, index: int, batch: Batch, place: int) -> None:
        # Philox is counter-based: the draw for (seed, index) needs no draw before it.
        random = np.random.Generator(np.random.Philox(key=self._seed, counter=[0, 0, 0, index]))
        start = int(random.integers(len(self._stream) - self._length + 1))
        window = self._stream.read(start, start + self._length)
        batch["inputs"][place], batch["targets"][place] = window[:-1], window[1:]


class _ConsecutiveWindows:
    """Windows one after the other, which score every token but the first once."""

    def __init__(self, stream: TokenStream, context_length: int):
        self._stream, self._length = stream, context_length

    def __len__(self) -> int:
        return -(-(len(self._stream) - 1) // self._length)

    def write(self, index: int, batch: Batch, place: int) -> None:
        start = index * self._length
        piece = self._stream.read(start, min(start + self._length + 1, len(self._stream)))
        count = len(piece) - 1
        batch["inputs"][place, :count], batch["targets"][place, :count] = piece[:-1], piece[1:]
        batch["mask"][place, :count] = True


class _DocumentRows:
    """Rows of parts of documents: many, or one."""

    def __init__(self, stream: TokenStream, parts: Parts, rows: PackedRows | ShuffledRows, end_id: int):
        self._stream, self._parts, self._rows, self._end_id = stream, parts, rows, end_id

    def __len__(self) -> int:
        return len(self._rows)

    def write(self, index: int, batch: Batch, place: int) -> None:
        inputs, targets = batch["inputs"][place], batch["targets"][place]
        parts, first = self._rows.parts(index), 0
        starts, lengths = self._parts.start[parts].tolist(), self._parts.length[parts].tolist()
        for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            last = first + length
            inputs[first:last] = self._stream.read(start, start + length)
            if "segments" in batch:
                batch["segments"][place, first:last] = number + 1
                batch["positions"][place, first:last] = np.arange(length)
            first = last
        targets[: first - 1] = inputs[1:first]
        ends = np.cumsum(lengths) - 1
        for end, part, start, length in zip(ends.tolist(), parts.tolist(), starts, lengths, strict=True):
            is_end = self._parts.is_end[part]
            targets[end] = self._end_id if is_end else self._stream.read(start + length, start + length + 1)[0]
        batch["mask"][place, :first] = True


def _document_rows(
    split: Split, tokenizer: Tokenizer, mode: str, context_length: int, seed: int | None
) -> _DocumentRows:
    """The rows of ``packed`` or ``padded``; ``seed`` None: in one fixed order, every token of every document once."""
    parts = cut_documents(
        split.lengths(),
        context_length,
        has_own_end=tokenizer.delimiters == "chat",
        only_first=mode == "padded" and seed is not None,
    )
    if mode == "packed":
        rows: PackedRows | ShuffledRows = PackedRows(parts.length, context_length, seed)
    else:
        rows = ShuffledRows(len(parts.length), seed)
    return _DocumentRows(split.stream(), parts, rows, document_end(tokenizer))


def _training_rows(data: Dataset, config: DataConfig, context_length: int) -> Rows:
    """The rows of a run, mapped from disk."""
    corpora: list[Rows] = []
    for index, corpus in enumerate(data.corpora):
        # Another stream of random numbers for each corpus; the first one's is that of a run without a mixture.
        seed = config.seed + 2**32 * index
        if config.mode == "windows":
            corpora.append(_Windows(corpus.train, context_length, seed))
        else:
            corpora.append(_document_rows(corpus.train, data.tokenizer, config.mode, context_length, seed))
    weights = [corpus.weight for corpus in data.corpora]
    return corpora[0] if len(corpora) == 1 else _Mixture(corpora, weights, config.seed)


def rows_of_a_block(weights: Sequence[float]) -> np.ndarray:
    """Rows of each corpus in a block of a mixture: [corpora] int64.

    >>> rows_of_a_block([1.0, 3.0]).tolist()
    [16384, 49152]
    """
    return np.diff(np.round(np.cumsum(weights) / sum(weights) * _MIX_BLOCK).astype(np.int64), prepend=0)


class _Mixture:
    """Rows of several corpora in random order, exactly by their weights over each block of rows."""

    def __init__(self, corpora: list[Rows], weights: list[float], seed: int):
        self._corpora, self._seed = corpora, seed
        self._counts = rows_of_a_block(weights)
        bounds = np.cumsum(self._counts)
        # Of a block: the corpus of each place, and the places of the same corpus before it.
        self._corpus = np.searchsorted(bounds, np.arange(_MIX_BLOCK), side="right")
        self._index = np.arange(_MIX_BLOCK) - (bounds - self._counts)[self._corpus]
        self._block, self._order = -1, np.zeros(0, np.int64)

    def __len__(self) -> int:
        return sum(map(len, self._corpora))

    def write(self, index: int, batch: Batch, place: int) -> None:
        block, within = divmod(index, _MIX_BLOCK)
        if block != self._block:
            random = np.random.Generator(np.random.Philox(key=self._seed, counter=[0, 2, block, 0]))
            self._order, self._block = random.permutation(_MIX_BLOCK), block
        slot = self._order[within]
        corpus = self._corpus[slot]
        row = block * int(self._counts[corpus]) + int(self._index[slot])
        self._corpora[corpus].write(row, batch, place)


class _BatchSource:
    """Grain source: item n is this process's part of batch n."""

    def __init__(self, data: Dataset, config: DataConfig, context_length: int, own: range):
        self._rows = _training_rows(data, config, context_length)
        self._tokenizer, self._config, self._length, self._own = data.tokenizer, config, context_length, own

    def __len__(self) -> int:
        return 2**62  # epochs follow each other without end

    def __getitem__(self, index: int) -> Batch:
        batch = _empty_batch(len(self._own), self._length, self._config.mode, has_mask=False)
        # By its place in the global batch, which is the same array however many processes make it.
        first = int(index) * self._config.batch_size + self._own.start
        for place in range(len(self._own)):
            self._rows.write(first + place, batch, place)
            if self._config.token_dropout:
                self._drop(first + place, batch["inputs"][place])
        return batch

    def _drop(self, row: int, inputs: np.ndarray) -> None:
        """Replaces a share of the tokens by others, drawn for (seed, row)."""
        random = np.random.Generator(np.random.Philox(key=self._config.seed, counter=[0, 3, 0, row]))
        is_dropped = random.random(len(inputs)) < self._config.token_dropout
        if self._config.token_dropout_by == "unknown":
            inputs[is_dropped] = self._tokenizer.specials[UNKNOWN]
        else:
            inputs[is_dropped] = random.integers(self._tokenizer.vocab_size, size=int(is_dropped.sum()))


def _empty_batch(num_rows: int, context_length: int, mode: str, *, has_mask: bool) -> Batch:
    names = ["inputs", "targets"] + (["segments", "positions"] if mode == "packed" else [])
    batch = {name: np.zeros((num_rows, context_length), np.int32) for name in names}
    if has_mask or mode != "windows":
        batch["mask"] = np.zeros((num_rows, context_length), bool)
    return batch


class TrainBatches:
    """Iterator over the training batches of a run; use it in a ``with`` block."""

    def __init__(self, source: _BatchSource, start: int):
        # One thread reads ahead: more cost more than they save on rows of mapped files.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        self._batches = iter(grain.MapDataset.source(source).to_iter_dataset(options))
        self._batches.set_state({"next_index": start})

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._batches.close()


def train_batches(
    data: Dataset,
    config: DataConfig,
    context_length: int,
    *,
    start: int = 0,
    own: range | None = None,
) -> TrainBatches:
    """Batch ``start`` and all after it: of each the rows ``own``, or all of them.

    A row of ``windows`` starts anywhere in the stream with equal probability. In ``packed`` and ``padded`` an epoch
    holds every document once, in an order of its own; ``padded`` cuts what is longer than the context.
    """
    return TrainBatches(_BatchSource(data, config, context_length, own or range(config.batch_size)), start)


def batches_per_epoch(data: Dataset, config: DataConfig, context_length: int) -> int:
    """Optimizer steps in which as many rows are drawn as the training split has: whole epochs, rounded up."""
    return math.ceil(len(_training_rows(data, config, context_length)) / config.batch_size)


def evaluation_batches(
    split: Split,
    tokenizer: Tokenizer,
    mode: str,
    *,
    context_length: int,
    batch_size: int,
    max_tokens: int | None = None,
) -> Iterator[Batch]:
    """Rows that score every token of ``split`` once, in the way of ``mode``, with ``mask`` False where nothing counts.

    ``windows``: consecutive windows over the stream, of which the first token is scored by none. ``packed`` and
    ``padded``: each document by itself, in parts of the context where it is longer. The last batch is filled with
    empty rows. With ``max_tokens``, rows spread evenly over the split that hold about as many.
    """
    rows: Rows
    if mode == "windows":
        rows = _ConsecutiveWindows(split.stream(), context_length)
    else:
        rows = _document_rows(split, tokenizer, mode, context_length, None)
    indices = np.arange(len(rows))
    if max_tokens is not None and max_tokens < split.num_tokens - 1:
        number = math.ceil(len(rows) * max_tokens / (split.num_tokens - 1))
        indices = np.arange(number) * len(rows) // number
    for first in range(0, len(indices), batch_size):
        batch = _empty_batch(batch_size, context_length, mode, has_mask=True)
        for place, index in enumerate(indices[first : first + batch_size].tolist()):
            rows.write(index, batch, place)
        yield batch
