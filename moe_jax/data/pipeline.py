"""Batches: random windows through a Grain pipeline for training, consecutive windows for evaluation."""

from collections.abc import Iterator
from typing import Self

import grain
import numpy as np

from moe_jax.command import UserError
from moe_jax.data.prepare import PreparedData, Split

Batch = dict[str, np.ndarray]


def check_splits(data: PreparedData, context_length: int) -> None:
    """UserError where a split has not one whole window of ``context_length`` tokens and the token after it."""
    for split in (data.train, data.val):
        if split.num_tokens < context_length + 1:
            raise UserError(
                f"the {split.name} split must have at least model.context_length + 1 = {context_length + 1} tokens, "
                f"got {split.num_tokens}; give more text, change data.val_fraction or lower model.context_length"
            )


class _RandomWindows:
    """Grain source: item i is the window of ``context_length`` + 1 tokens whose start is drawn from (seed, i)."""

    def __init__(self, split: Split, context_length: int, seed: int):
        self._split, self._length, self._seed = split, context_length + 1, seed
        self._tokens: np.ndarray | None = None

    def __len__(self) -> int:
        return 2**62  # windows are drawn with replacement: there is always another

    def __getitem__(self, index: int) -> Batch:
        if self._tokens is None:  # mapped by the process that reads
            self._tokens = self._split.tokens
        # Philox is counter-based: the draw for (seed, index) needs no draw before it.
        random = np.random.Generator(np.random.Philox(key=self._seed, counter=[0, 0, 0, int(index)]))
        start = int(random.integers(len(self._tokens) - self._length + 1))
        window = np.asarray(self._tokens[start : start + self._length], np.int32)
        return {"inputs": window[:-1], "targets": window[1:]}


class TrainBatches:
    """Iterator over training batches {"inputs", "targets": [B, L] int32}; use it in a ``with`` block."""

    def __init__(self, batches: grain.DatasetIterator):
        self._batches = batches

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._batches.close()


def train_batches(split: Split, *, context_length: int, batch_size: int, seed: int, start: int = 0) -> TrainBatches:
    """Batch ``start`` and all after it. Batch n is a function of (seed, n): its windows are n·B to n·B + B - 1.

    Windows start anywhere in the stream with equal probability, with replacement.
    """
    windows = grain.MapDataset.source(_RandomWindows(split, context_length, seed))
    # One thread reads ahead: more cost more than they save on windows of a mapped file.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    batches = iter(windows.batch(batch_size, drop_remainder=True).to_iter_dataset(options))
    batches.set_state({"next_index": start})
    return TrainBatches(batches)


def evaluation_batches(
    tokens: np.ndarray, *, context_length: int, batch_size: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """Consecutive windows that score every token but the first once: {"inputs", "targets", "mask": [B, L]}.

    ``mask`` is False after the end of the stream, in the last window and in the rows that fill the last batch. With
    ``max_tokens``, as many windows as hold that many tokens, spread evenly over the stream.
    """
    num_targets = len(tokens) - 1
    num_windows = -(-num_targets // context_length)
    windows = np.arange(num_windows)
    if max_tokens is not None and max_tokens < num_targets:
        windows = np.arange(-(-max_tokens // context_length)) * num_windows // -(-max_tokens // context_length)
    for first in range(0, len(windows), batch_size):
        inputs = np.zeros((batch_size, context_length), np.int32)
        targets = np.zeros((batch_size, context_length), np.int32)
        mask = np.zeros((batch_size, context_length), bool)
        for row, window in enumerate(windows[first : first + batch_size]):
            start = int(window) * context_length
            piece = np.asarray(tokens[start : start + context_length + 1], np.int32)
            inputs[row, : len(piece) - 1] = piece[:-1]
            targets[row, : len(piece) - 1] = piece[1:]
            mask[row, : len(piece) - 1] = True
        yield {"inputs": inputs, "targets": targets, "mask": mask}
