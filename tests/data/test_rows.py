"""Which parts share a row."""

from functools import partial

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


@pytest.mark.parametrize(("has_own_end", "starts", "sizes", "ends"), [
    # Documents of 3, 9 and 1 stored tokens at 0, 3 and 12, in rows of 4.
    (False, [0, 3, 7, 11, 12], [3, 4, 4, 1, 1], [True, False, False, True, True]),
    # A last token that is only a target is no input: 2, 8 and 0 of them.
    (True, [0, 3, 7], [2, 4, 4], [True, False, True]),
])  # fmt: skip
@pytest.mark.parametrize("only_first", [False, True])
def test_documents_are_cut_into_parts(has_own_end, starts, sizes, ends, only_first):
    parts = cut_documents(np.array([3, 9, 1], np.uint32), 4, has_own_end=has_own_end, only_first=only_first)
    expected = [part for part in zip(starts, sizes, ends, strict=True) if not only_first or part[0] in (0, 3, 12)]
    assert list(zip(parts.start, parts.length, parts.is_end, strict=True)) == expected


LENGTHS = np.random.default_rng(1).integers(1, 17, 200).astype(np.int32)


@pytest.mark.parametrize("make", [partial(PackedRows, LENGTHS, 16), partial(ShuffledRows, 200)])
@pytest.mark.parametrize("seed", [None, 3])
def test_every_epoch_holds_every_part_once_and_rows_are_found_alone(make, seed):
    rows, again = make(seed), make(seed)
    epochs = [[rows.parts(epoch * len(rows) + row).tolist() for row in range(len(rows))] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch)) == list(range(200))
        assert all(LENGTHS[row].sum() <= 16 for row in epoch)
    for epoch in (2, 0):
        assert again.parts(epoch * len(rows) + 5).tolist() == epochs[epoch][5]
    assert [epoch == epochs[0] for epoch in epochs[1:]] == [seed is None] * 2


def test_other_documents_share_a_row_in_the_next_epoch():
    rows = PackedRows(LENGTHS, 16, 3)
    first, second = ({frozenset(rows.parts(e * len(rows) + row).tolist()) for row in range(len(rows))} for e in (0, 1))
    assert first != second
