"""Which parts share a row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data.rows import PackedRows, ShuffledRows, best_fit, cut_documents


def naive_best_fit(lengths, row_length):
    """Every part, longest first, into the fullest row that has room."""
    rows = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= row_length]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return sorted(map(sorted, rows))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(st.integers(1, 24), max_size=60), st.sampled_from([24, 25, 40]))
def test_the_histogram_packs_as_the_parts_one_by_one(lengths, row_length):
    counts = np.bincount(np.array(lengths, int), minlength=row_length + 1)
    rows = [sorted(content) for content, number in best_fit(counts, row_length) for _ in range(number)]
    assert sorted(length for row in rows for length in row) == sorted(lengths)
    assert all(sum(row) <= row_length for row in rows)
    # Which of several equally full rows is taken is open; how full the rows are is not.
    assert sorted(map(sum, rows)) == sorted(map(sum, naive_best_fit(lengths, row_length)))


def test_rows_are_full_on_documents_like_stories():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.2, 0.5, 20_000), 5, 512).astype(int)
    rows = best_fit(np.bincount(lengths, minlength=513), 512)
    assert lengths.sum() / (512 * sum(number for _, number in rows)) > 0.98


@pytest.mark.parametrize(("has_own_end", "starts", "sizes"), [
    # Documents of 3, 9 and 1 stored tokens at 0, 3 and 12, in rows of 4.
    (False, [0, 3, 7, 11, 12], [3, 4, 4, 1, 1]),
    # A last token that is only a target is no input: 2, 8 and 0 of them.
    (True, [0, 3, 7], [2, 4, 4]),
])  # fmt: skip
def test_documents_are_cut_into_parts(has_own_end, starts, sizes):
    parts = cut_documents(np.array([3, 9, 1], np.uint32), 4, has_own_end=has_own_end)
    assert (parts.start.tolist(), parts.length.tolist()) == (starts, sizes)
    assert parts.is_end.tolist() == ([True, False, False, True, True] if not has_own_end else [True, False, True])
    first = cut_documents(np.array([3, 9, 1], np.uint32), 4, has_own_end=has_own_end, only_first=True)
    assert first.start.tolist() == ([0, 3, 12] if not has_own_end else [0, 3])
    assert first.is_end.tolist() == ([True, False, True] if not has_own_end else [True, False])


@pytest.mark.parametrize("seed", [None, 3])
def test_every_epoch_holds_every_part_once_and_rows_are_found_alone(seed):
    lengths = np.random.default_rng(1).integers(1, 17, 200).astype(np.int32)
    rows, again = PackedRows(lengths, 16, seed), PackedRows(lengths, 16, seed)
    epochs = [[rows.parts(epoch * len(rows) + row) for row in range(len(rows))] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch).tolist()) == list(range(200))
        assert all(lengths[row].sum() <= 16 for row in epoch)
    np.testing.assert_array_equal(again.parts(2 * len(rows) + 5), epochs[2][5])
    np.testing.assert_array_equal(again.parts(5), epochs[0][5])
    is_same = [all(np.array_equal(a, b) for a, b in zip(epochs[0], other, strict=True)) for other in epochs[1:]]
    assert is_same == [seed is None] * 2
    if seed is not None:
        # Not only the rows' order: other documents share them.
        assert {frozenset(row.tolist()) for row in epochs[0]} != {frozenset(row.tolist()) for row in epochs[1]}


def test_shuffled_rows_are_permutations():
    rows = ShuffledRows(50, 1)
    epochs = [[int(rows.parts(epoch * 50 + row)[0]) for row in range(50)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50))
    assert epochs[0] != epochs[1]
    assert [int(ShuffledRows(50, None).parts(row)[0]) for row in range(50)] == list(range(50))
