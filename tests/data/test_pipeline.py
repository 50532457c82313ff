"""The batches drawn from prepared streams."""

import numpy as np
import pytest

from moe_jax.command import UserError
from moe_jax.config import DataConfig
from moe_jax.data.pipeline import check_splits, evaluation_batches, train_batches
from moe_jax.data.prepare import prepare

TEXT = "Now is the winter of our discontent\nMade glorious summer by this sun of York;\n" * 40


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return DataConfig(path=str(tmp_path / "text.txt"), tokenizer="byte", val_fraction=0.25)


def windows(split, seed=0, start=0, count=6, length=16, batch=4):
    with train_batches(split, context_length=length, batch_size=batch, seed=seed, start=start) as batches:
        return [next(batches) for _ in range(count)]


def test_every_window_is_a_piece_of_the_stream_with_its_next_tokens(data, tmp_path):
    split = prepare(data, tmp_path / "cache").train
    stream = split.tokens.tobytes()
    for batch in windows(split):
        assert batch["inputs"].shape == batch["targets"].shape == (4, 16)
        assert batch["inputs"].dtype == np.int32
        np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
        for row, target in zip(batch["inputs"], batch["targets"], strict=True):
            assert np.append(row, target[-1]).astype(split.dtype).tobytes() in stream


def test_batch_n_depends_on_seed_and_n_alone(data, tmp_path):
    split = prepare(data, tmp_path / "cache").train
    straight = windows(split, count=6)
    resumed = windows(split, start=4, count=2)
    np.testing.assert_array_equal(straight[4]["inputs"], resumed[0]["inputs"])
    np.testing.assert_array_equal(straight[5]["inputs"], resumed[1]["inputs"])
    assert not np.array_equal(straight[0]["inputs"], windows(split, seed=1, count=1)[0]["inputs"])
    # Rows are numbered over the whole run, so two batches of two are one batch of four.
    halves = windows(split, count=2, batch=2)
    np.testing.assert_array_equal(np.concatenate([half["inputs"] for half in halves]), straight[0]["inputs"])


def test_starts_are_uniform_over_every_position(tmp_path):
    (tmp_path / "text.txt").write_bytes(bytes(range(1, 101)))
    split = prepare(
        DataConfig(path=str(tmp_path / "text.txt"), tokenizer="byte", val_fraction=0.8), tmp_path / "c"
    ).train
    # 21 tokens and windows of 11 + 1: ten starts, each with the first token end-of-text or 1 to 9.
    drawn = np.concatenate([batch["inputs"][:, 0] for batch in windows(split, count=40, length=11, batch=50)])
    counts = np.unique(drawn % 256, return_counts=True)[1]
    assert len(counts) == 10
    assert np.sum((counts - 200) ** 2 / 200) < 27.9, "chi-square, 9 degrees of freedom, p = 0.001"


@pytest.mark.parametrize("num_tokens", [2, 8, 9, 10, 57])
def test_evaluation_scores_every_token_but_the_first_once(num_tokens):
    tokens = np.arange(100, 100 + num_tokens, dtype=np.uint16)
    scored = []
    for batch in evaluation_batches(tokens, context_length=8, batch_size=3):
        assert batch["inputs"].shape == (3, 8)
        np.testing.assert_array_equal(batch["targets"][batch["mask"]], batch["inputs"][batch["mask"]] + 1)
        scored += batch["targets"][batch["mask"]].tolist()
    assert scored == list(range(101, 100 + num_tokens))


def test_part_of_an_evaluation_is_spread_evenly():
    tokens = np.arange(801)
    batches = list(evaluation_batches(tokens, context_length=8, batch_size=4, max_tokens=80))
    starts = np.concatenate([batch["inputs"][batch["mask"].any(axis=1), 0] for batch in batches])
    np.testing.assert_array_equal(starts, np.arange(0, 800, 80))


def test_a_split_shorter_than_a_window_is_refused(data, tmp_path):
    prepared = prepare(data, tmp_path / "cache")
    check_splits(prepared, 100)
    with pytest.raises(UserError, match=r"val split must have at least .* 2001 tokens, got \d+; give more text"):
        check_splits(prepared, 2000)
