"""The batches drawn from prepared streams."""

import dataclasses
from itertools import pairwise
from unittest.mock import Mock

import numpy as np
import pytest

from moe_jax.config import DataConfig
from moe_jax.data import batches as pipeline
from moe_jax.data.batches import batches_per_epoch, check_data, evaluation_batches, train_batches
from moe_jax.data.tokenizer import document_end, document_start
from moe_jax.errors import UserError
from moe_jax.prepare.folder import prepare_folder
from moe_jax.prepare.settings import PrepareConfig
from tests.oracles.texts import json_lines

LENGTH, B = 16, 4
MODES = ("windows", "packed", "padded")
DOCUMENTS = [chr(ord("a") + index % 26) * index + "." for index in range(1, 60)]
MIXTURE = {"a": DOCUMENTS, "b": ["B" * 20] * 30, "c": ["C" * 9] * 40}


def prepared(folder, texts, **settings):
    for name, documents in texts.items():
        (folder / f"{name}.jsonl").write_text(json_lines(documents))
    inputs = tuple(f"{name}={folder / name}.jsonl" for name in texts)
    settings = {"tokenizer": "byte", "shard_tokens": 100, "val_fraction": 0.2} | settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return prepare_folder(PrepareConfig(input=inputs, out=str(folder / "out"), **settings))


@pytest.fixture(scope="module", params=["endoftext", "chat"])
def data(request, tmp_path_factory):
    """Documents of 2 to 60 bytes in several shards."""
    return prepared(tmp_path_factory.mktemp("one"), {"one": DOCUMENTS}, delimiters=request.param)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("mix"), MIXTURE, weights=("a=1", "b=2", "c=5"))


def draw(data, mode, start=0, count=6, own=None, **settings):
    config = DataConfig(mode=mode, batch_size=B, **settings)
    with train_batches(data, config, LENGTH, start=start, own=own) as batches:
        return [next(batches) for _ in range(count)]


def drawn(data, mode, name, **settings):
    """The array ``name`` of all batches that are drawn."""
    return np.concatenate([batch[name] for batch in draw(data, mode, **settings)])


@pytest.mark.parametrize("mode", MODES)
def test_batch_n_depends_on_seed_and_n_alone(data, mode):
    straight = draw(data, mode, count=40)
    for start in (1, 13, 39):  # past the first epoch, too
        np.testing.assert_equal(draw(data, mode, start=start, count=1)[0], straight[start])
    assert not np.array_equal(drawn(data, mode, "inputs", seed=1, count=1), straight[0]["inputs"])


@pytest.mark.parametrize("mode", MODES)
def test_the_global_batch_is_the_same_on_any_number_of_hosts(mixture, mode):
    settings = {"count": 20, "token_dropout": 0.3}
    whole = draw(mixture, mode, **settings)
    for num_hosts in (2, 4):
        rows = len(whole[0]["inputs"]) // num_hosts
        owned = [range(host * rows, (host + 1) * rows) for host in range(num_hosts)]
        parts = [draw(mixture, mode, own=own, **settings) for own in owned]
        for batch, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            joined = {name: np.concatenate([piece[name] for piece in pieces]) for name in batch}
            np.testing.assert_equal(joined, batch)


def test_every_window_is_a_piece_of_the_stream_with_its_next_tokens(data):
    split = data.corpora[0].train
    stream = split.stream().read(0, split.num_tokens).astype(np.int32).tobytes()
    assert split.num_tokens > 3 * 100, "windows that cross shards"
    inputs, targets = (drawn(data, "windows", name, count=50) for name in ("inputs", "targets"))
    assert (inputs.shape, targets.shape, inputs.dtype) == ((50 * B, LENGTH), (50 * B, LENGTH), np.int32)
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    for row, target in zip(inputs, targets, strict=True):
        assert np.append(row, target[-1]).astype(np.int32).tobytes() in stream


def test_starts_are_uniform_over_every_position(tmp_path):
    data = prepared(tmp_path, {"one": [bytes(range(1, 101)).decode()]}, val_fraction=0.8)
    with train_batches(data, DataConfig(batch_size=50), 11) as batches:
        # 21 tokens and windows of 11 + 1: ten starts, each with the first token end-of-text or 1 to 9.
        first = np.concatenate([next(batches)["inputs"][:, 0] for _ in range(40)])
    counts = np.unique(first % 256, return_counts=True)[1]
    assert len(counts) == 10
    assert np.sum((counts - 200) ** 2 / 200) < 27.9, "chi-square, 9 degrees of freedom, p = 0.001"


def segments_of(batch):
    """(inputs, targets) of every segment of a batch, and that positions restart and padding is at the end."""
    if "segments" not in batch:  # one a row, so that attention needs no mask but the causal one
        place_L = np.arange(batch["mask"].shape[1], dtype=np.int32)
        batch = batch | {
            "segments": batch["mask"].astype(np.int32),
            "positions": np.tile(place_L, (len(batch["mask"]), 1)),
        }
    names = ("inputs", "targets", "segments", "positions", "mask")
    for inputs, targets, segments, positions, mask in zip(*(batch[name] for name in names), strict=True):
        np.testing.assert_array_equal(mask, segments > 0)
        count = int(mask.sum())
        assert mask[:count].all()
        for number in range(1, segments.max() + 1):
            (places,) = np.nonzero(segments == number)
            np.testing.assert_array_equal(np.diff(places), 1)
            np.testing.assert_array_equal(positions[places], np.arange(len(places)))
            yield inputs[places].tolist(), targets[places].tolist()


def expected_parts(split, tokenizer, *, only_first):
    """Every document by itself: (inputs, targets) of its parts of at most LENGTH inputs; its end is a target."""
    bounds = [0, *np.cumsum(split.lengths()).tolist()]
    for tokens in (split.stream().read(*between).tolist() for between in pairwise(bounds)):
        whole = tokens if tokenizer.delimiters == "chat" else [*tokens, document_end(tokenizer)]
        assert (whole[0], whole[-1]) == (document_start(tokenizer), document_end(tokenizer))
        for start in range(0, len(whole) - 1, LENGTH):
            part = whole[start : start + LENGTH + 1]
            yield part[:-1], part[1:]
            if only_first:
                break


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_an_epoch_holds_every_document_once(data, mode):
    split = data.corpora[0].train
    config = DataConfig(mode=mode, batch_size=1)
    epoch = batches_per_epoch(data, config, LENGTH)
    expected = sorted(expected_parts(split, data.tokenizer, only_first=mode == "padded"))
    with train_batches(data, config, LENGTH) as batches:
        assert ("segments" in next(batches)) == (mode == "packed")
    with train_batches(data, config, LENGTH) as batches:
        for _ in range(2):
            found = [segment for _ in range(epoch) for segment in segments_of(next(batches))]
            assert sorted(found) == expected
    if mode == "packed":
        assert epoch < len(expected) / 1.2, "several documents a row"


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_scores_every_token_once(data, mode):
    split = data.corpora[0].val
    batches = list(evaluation_batches(split, data.tokenizer, mode, context_length=LENGTH, batch_size=3))
    assert all(batch["inputs"].shape == (3, LENGTH) for batch in batches)
    if mode == "windows":
        targets = np.concatenate([batch["targets"][batch["mask"]] for batch in batches])
        np.testing.assert_array_equal(targets, split.stream().read(1, split.num_tokens))
        return
    found = [segment for batch in batches for segment in segments_of(batch)]
    assert sorted(found) == sorted(expected_parts(split, data.tokenizer, only_first=False))
    # All bytes of the text are targets, and one end a document: what bits per byte divides by.
    assert sum(len(targets) for _, targets in found) == split.num_bytes + split.num_documents


@pytest.mark.parametrize("mode", MODES)
def test_part_of_an_evaluation_is_spread_evenly(data, mode):
    split = data.corpora[0].train

    def scored(**limit):
        """The targets that count, row by row."""
        batches = evaluation_batches(split, data.tokenizer, mode, context_length=LENGTH, batch_size=3, **limit)
        rows = (row for batch in batches for row in zip(batch["targets"], batch["mask"], strict=True))
        return [targets[mask].tolist() for targets, mask in rows if mask.any()]

    every, some = scored(), scored(max_tokens=200)
    assert 100 < sum(map(len, some)) < 350
    assert np.ptp([every.index(row) for row in some]) > 0.8 * len(every), "from all over the split"


def test_a_mixture_keeps_its_weights(mixture):
    rows = drawn(mixture, "windows", "inputs", count=500)
    b, c = (np.mean(np.any(rows == ord(letter), axis=1)) for letter in "BC")
    # 2,000 rows, drawn without replacement from blocks of exactly 1/8, 2/8 and 5/8.
    for found, share in ((1 - b - c, 1 / 8), (b, 2 / 8), (c, 5 / 8)):
        assert abs(found - share) < 4 * np.sqrt(share * (1 - share) / 2000)


def test_a_mixture_draws_its_corpora_in_their_own_order(monkeypatch):
    monkeypatch.setattr(pipeline, "_MIX_BLOCK", 16)
    corpora = [Mock(), Mock(), Mock()]
    mix = pipeline._Mixture(corpora, [1.0, 2.0, 5.0], seed=0)
    for row in range(64):
        mix.write(row, {}, 0)
    seen = [[call.args[0] for call in corpus.write.call_args_list] for corpus in corpora]
    assert [sorted(rows) for rows in seen] == [list(range(number)) for number in (8, 16, 40)]
    assert seen[2] != sorted(seen[2]), "in random order within a block"


@pytest.mark.parametrize("by", ["unknown", "random"])
def test_token_dropout_replaces_inputs_in_training_only(data, by):
    noise = {"token_dropout": 0.25, "token_dropout_by": by}
    before, after = (drawn(data, "windows", "inputs", count=100, **each) for each in ({}, noise))
    np.testing.assert_array_equal(*(drawn(data, "windows", "targets", count=100, **each) for each in ({}, noise)))
    assert abs(np.mean(before != after) - 0.25) < 0.02
    if by == "unknown":
        assert set(after[before != after]) == {data.tokenizer.specials["<|unknown|>"]}
    else:
        assert after.max() < data.tokenizer.vocab_size


def test_an_epoch_is_as_many_steps_as_hold_its_rows(data):
    split = data.corpora[0].train
    assert batches_per_epoch(data, DataConfig(batch_size=2), LENGTH) == -(-((split.num_tokens - 1) // LENGTH) // 2)
    assert batches_per_epoch(data, DataConfig(mode="padded", batch_size=7), LENGTH) == -(-split.num_documents // 7)


def test_what_cannot_be_trained_on_is_refused(data, tmp_path):
    check_data(data, DataConfig(), 100)
    with pytest.raises(UserError, match=r"train split of one must have at least .* 2001 tokens, got \d+; give more"):
        check_data(data, DataConfig(), 2000)
    check_data(data, DataConfig(mode="packed"), 2000)
    gpt2 = prepared(tmp_path, {"one": DOCUMENTS}, tokenizer="gpt2")
    rare = tuple(dataclasses.replace(data.corpora[0], weight=weight) for weight in (1e-6, 1 - 1e-6))
    with pytest.raises(UserError, match=r"the corpus one has 1e-06 of the rows, less than one in 65,536"):
        check_data(dataclasses.replace(data, corpora=rare), DataConfig(), 10)
    check_data(gpt2, DataConfig(token_dropout=0.1, token_dropout_by="random"), 10)
    with pytest.raises(UserError, match=r"unknown needs a token <\|unknown\|>, which gpt2 does not have"):
        check_data(gpt2, dataclasses.replace(DataConfig(), token_dropout=0.1), 10)
