"""Rows of whole documents, decided from the documents' lengths alone.

A document longer than a row is cut into parts of the row's length and a rest. How lengths share rows is decided once,
by best fit on the histogram of lengths; which document takes a place of its length is drawn anew for every epoch. So
all epochs have the same number of rows, and any row can be found without the rows before it. Imports no jax.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Parts:
    """The parts of all documents of a split, in the order of the documents."""

    start: np.ndarray
    """[parts] int64: index in the stream of a part's first input token."""
    length: np.ndarray
    """[parts] int32: its input tokens."""
    is_end: np.ndarray
    """[parts] bool: whether its last target is what ends the document."""


def cut_documents(lengths: np.ndarray, row_length: int, *, has_own_end: bool, only_first: bool = False) -> Parts:
    """The parts of documents of ``lengths`` stored tokens.

    Every stored token is an input, but for the last one where a document ``has_own_end``: that is only a target.
    ``only_first`` keeps the first part of each document.

    >>> parts = cut_documents(np.array([3, 9]), 4, has_own_end=False)
    >>> parts.start.tolist(), parts.length.tolist(), parts.is_end.tolist()
    ([0, 3, 7, 11], [3, 4, 4, 1], [True, False, False, True])
    """
    lengths = lengths.astype(np.int64)
    offsets = np.cumsum(lengths) - lengths
    inputs = lengths - 1 if has_own_end else lengths
    num_parts = np.minimum(1, inputs) if only_first else -(-inputs // row_length)
    document = np.repeat(np.arange(len(lengths)), num_parts)
    index = np.arange(len(document)) - np.repeat(np.cumsum(num_parts) - num_parts, num_parts)
    within = index * row_length
    length = np.minimum(row_length, inputs[document] - within)
    return Parts(
        start=offsets[document] + within,
        length=length.astype(np.int32),
        is_end=within + length == inputs[document],
    )


def best_fit(counts: np.ndarray, row_length: int) -> list[tuple[tuple[int, ...], int]]:
    """Rows that hold ``counts[n]`` parts of each length n: (lengths in a row, number of such rows).

    Best fit decreasing, as on the parts one by one, but in a time that depends on the number of lengths only (the idea
    of arXiv 2107.02027, section 3.1, which fits greedily by histogram, too).

    >>> best_fit(np.array([0, 0, 3, 1, 0, 1]), 8)  # three parts of 2, one of 3 and one of 5
    [((5, 3), 1), ((2, 2, 2), 1)]
    """
    rows_by_space: list[list[tuple[tuple[int, ...], int]]] = [[] for _ in range(row_length + 1)]
    has_rows = np.zeros(row_length + 1, bool)

    def put(content: tuple[int, ...], space: int, number: int) -> None:
        if number:
            rows_by_space[space].append((content, number))
            has_rows[space] = True

    for length in range(row_length, 0, -1):
        left = int(counts[length]) if length < len(counts) else 0
        while left:
            space = length + int(np.argmax(has_rows[length:]))
            if has_rows[space]:
                content, number = rows_by_space[space].pop()
                has_rows[space] = bool(rows_by_space[space])
            else:
                content, number, space = (), left, row_length
            each = space // length
            filled = min(number, left // each)
            put(content + (length,) * each, space - each * length, filled)
            left -= filled * each
            if filled < number and left:  # fewer than fit: the last row of this length
                put(content + (length,) * left, space - left * length, 1)
                filled, left = filled + 1, 0
            if content:
                put(content, space, number - filled)
    return [row for rows in rows_by_space for row in rows]


class PackedRows:
    """Which parts every row of every epoch holds."""

    def __init__(self, lengths: np.ndarray, row_length: int, seed: int | None):
        """``lengths``: those of the parts. ``seed`` None: one fixed order, as for evaluation."""
        self._lengths, self._seed = lengths, seed
        rows = best_fit(np.bincount(lengths, minlength=row_length + 1), row_length)
        sizes = np.concatenate([np.full(number, len(content)) for content, number in rows] or [np.zeros(0, int)])
        self._first_place = np.concatenate([[0], np.cumsum(sizes)])
        places = [np.tile(np.array(content, np.int32), number) for content, number in rows]
        # Sorted by length, places and parts correspond.
        place_lengths = np.concatenate(places or [np.zeros(0, np.int32)])
        self._rank_of_place = np.empty(len(place_lengths), np.int64)
        self._rank_of_place[np.argsort(place_lengths, kind="stable")] = np.arange(len(place_lengths))
        self._epoch, self._part_of_rank, self._row_order = -1, np.zeros(0, np.int64), np.zeros(0, np.int64)

    def __len__(self) -> int:
        """Rows in one epoch."""
        return len(self._first_place) - 1

    def parts(self, index: int) -> np.ndarray:
        """The parts in row ``index``, counted over all epochs."""
        epoch, row = divmod(index, len(self))
        if epoch != self._epoch:
            self._draw(epoch)
        row = self._row_order[row]
        return self._part_of_rank[self._rank_of_place[self._first_place[row] : self._first_place[row + 1]]]

    def _draw(self, epoch: int) -> None:
        if self._seed is None:
            key = self._lengths.astype(np.int64)
            self._part_of_rank, self._row_order = np.argsort(key, kind="stable"), np.arange(len(self))
        else:
            random = epoch_random(self._seed, epoch)
            # By length, and in random order within a length.
            key = self._lengths.astype(np.uint64) << np.uint64(40)
            key |= random.integers(2**40, size=len(key), dtype=np.uint64)
            # Stable: what a CPU's vector instructions make of equal keys must not matter.
            self._part_of_rank, self._row_order = np.argsort(key, kind="stable"), random.permutation(len(self))
        self._epoch = epoch


class ShuffledRows:
    """One part a row; every epoch is a permutation of all parts."""

    def __init__(self, num_parts: int, seed: int | None):
        self._num_parts, self._seed = num_parts, seed
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def __len__(self) -> int:
        return self._num_parts

    def parts(self, index: int) -> np.ndarray:
        """The part in row ``index``, counted over all epochs: [1]."""
        epoch, row = divmod(index, len(self))
        if self._seed is None:
            return np.array([row])
        if epoch != self._epoch:
            self._order, self._epoch = epoch_random(self._seed, epoch).permutation(self._num_parts), epoch
        return self._order[row : row + 1]


def epoch_random(seed: int, epoch: int) -> np.random.Generator:
    """The random numbers of one epoch; no other counter of this seed is used with this last word."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 1, epoch, 0]))
