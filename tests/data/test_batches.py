"""The batches drawn from prepared streams."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from moe_jax.config import DataConfig
from moe_jax.data import batches as pipeline
from moe_jax.data.batches import batches_per_epoch, check_data, evaluation_batches, train_batches
from moe_jax.data.tokenizer import document_end, document_start
from moe_jax.errors import UserError
from moe_jax.prepare.folder import prepare_folder
from moe_jax.prepare.settings import PrepareConfig

LENGTH, B = 16, 4
MODES = ("windows", "packed", "padded")


@pytest.fixture(scope="module", params=["endoftext", "chat"])
def data(request, tmp_path_factory):
    """60 documents of 1 to 59 bytes, several shards."""
    return prepared(tmp_path_factory.mktemp("one"), {"one": documents(60)}, delimiters=request.param)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return prepared(
        tmp_path_factory.mktemp("mix"),
        {"a": documents(60), "b": ["B" * 20] * 30, "c": ["C" * 9] * 40},
        weights=("a=1", "b=2", "c=5"),
    )


def documents(number):
    return [chr(ord("a") + index % 26) * index + "." for index in range(1, number)]


def prepared(folder, texts, **settings):
    inputs = []
    for name, stories in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
        inputs.append(f"{name}={folder / name}.jsonl")
    settings = {"tokenizer": "byte", "shard_tokens": 100, "val_fraction": 0.2} | settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return prepare_folder(PrepareConfig(input=tuple(inputs), out=str(folder / "out"), **settings))


def draw(data, mode, start=0, count=6, host=0, num_hosts=1, **settings):
    config = DataConfig(mode=mode, batch_size=B, **settings)
    with train_batches(data, config, LENGTH, start=start, host=host, num_hosts=num_hosts) as batches:
        return [next(batches) for _ in range(count)]


def assert_same(batch, other):
    assert set(batch) == set(other)
    for name in batch:
        np.testing.assert_array_equal(batch[name], other[name])


def stored(split):
    """The tokens of each document of a split, as stored."""
    bounds = [0, *np.cumsum(split.lengths()).tolist()]
    return [split.stream().read(start, stop).tolist() for start, stop in itertools.pairwise(bounds)]


@pytest.mark.parametrize("mode", MODES)
def test_batch_n_depends_on_seed_and_n_alone(data, mode):
    straight = draw(data, mode, count=40)
    for start in (1, 13, 39):  # past the first epoch, too
        assert_same(draw(data, mode, start=start, count=1)[0], straight[start])
    other = draw(data, mode, seed=1, count=1)[0]
    assert not np.array_equal(other["inputs"], straight[0]["inputs"])


@pytest.mark.parametrize("mode", MODES)
def test_the_global_batch_is_the_same_on_any_number_of_hosts(mixture, mode):
    whole = draw(mixture, mode, count=20, token_dropout=0.3)
    for num_hosts in (2, 4):
        parts = [
            draw(mixture, mode, count=20, host=host, num_hosts=num_hosts, token_dropout=0.3)
            for host in range(num_hosts)
        ]
        for number, batch in enumerate(whole):
            joined = {name: np.concatenate([part[number][name] for part in parts]) for name in batch}
            assert_same(joined, batch)


def test_every_window_is_a_piece_of_the_stream_with_its_next_tokens(data):
    split = data.corpora[0].train
    stream = split.stream().read(0, split.num_tokens).astype(np.int32).tobytes()
    assert split.num_tokens > 3 * 100, "windows that cross shards"
    for batch in draw(data, "windows", count=50):
        assert batch["inputs"].shape == batch["targets"].shape == (B, LENGTH)
        assert batch["inputs"].dtype == np.int32
        np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
        for row, target in zip(batch["inputs"], batch["targets"], strict=True):
            assert np.append(row, target[-1]).astype(np.int32).tobytes() in stream


def test_starts_are_uniform_over_every_position(tmp_path):
    data = prepared(tmp_path, {"one": [bytes(range(1, 101)).decode()]}, val_fraction=0.8)
    config = DataConfig(batch_size=50)
    with train_batches(data, config, 11) as batches:
        # 21 tokens and windows of 11 + 1: ten starts, each with the first token end-of-text or 1 to 9.
        drawn = np.concatenate([next(batches)["inputs"][:, 0] for _ in range(40)])
    counts = np.unique(drawn % 256, return_counts=True)[1]
    assert len(counts) == 10
    assert np.sum((counts - 200) ** 2 / 200) < 27.9, "chi-square, 9 degrees of freedom, p = 0.001"


def segments_of(batch):
    """(inputs, targets) of every segment of a batch, and that positions restart and padding is at the end."""
    for inputs, targets, segments, positions, mask in zip(
        *(batch[name] for name in ("inputs", "targets", "segments", "positions", "mask")), strict=True
    ):
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
    for tokens in stored(split):
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
    batches = list(
        evaluation_batches(split, data.tokenizer, mode, context_length=LENGTH, batch_size=3, max_tokens=200)
    )
    assert 100 < sum(int(batch["mask"].sum()) for batch in batches) < 350
    letters = {int(token) for batch in batches for token in batch["targets"][batch["mask"]] if token < 256}
    assert len(letters) > 10, "from all over the split"


def test_a_mixture_keeps_its_weights(mixture):
    letters = {corpus.name: set() for corpus in mixture.corpora}
    counts = dict.fromkeys(letters, 0)
    for batch in draw(mixture, "windows", count=500):
        for row in batch["inputs"]:
            name = "b" if ord("B") in row else "c" if ord("C") in row else "a"
            counts[name] += 1
    # 2,000 rows, drawn without replacement from blocks of exactly 1/8, 2/8 and 5/8.
    for name, share in (("a", 1 / 8), ("b", 2 / 8), ("c", 5 / 8)):
        assert abs(counts[name] - 2000 * share) < 4 * np.sqrt(2000 * share * (1 - share))


def test_a_mixture_draws_its_corpora_in_their_own_order(mixture, monkeypatch):
    monkeypatch.setattr(pipeline, "_MIX_BLOCK", 16)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}

    class Recorder:
        def __init__(self, corpus):
            self.corpus = corpus

        def __len__(self):
            return 10

        def write(self, index, batch, place):
            seen[self.corpus].append(index)

    mix = pipeline._Mixture([Recorder(0), Recorder(1), Recorder(2)], [1.0, 2.0, 5.0], seed=0)
    for row in range(64):
        mix.write(row, {}, 0)
    assert {corpus: sorted(rows) for corpus, rows in seen.items()} == {
        0: list(range(8)), 1: list(range(16)), 2: list(range(40))
    }  # fmt: skip
    assert seen[2] != sorted(seen[2]), "in random order within a block"


@pytest.mark.parametrize("by", ["unknown", "random"])
def test_token_dropout_replaces_inputs_in_training_only(data, by):
    clean, noisy = (
        draw(data, "windows", count=100),
        draw(data, "windows", count=100, token_dropout=0.25, token_dropout_by=by),
    )
    changed = []
    for batch, other in zip(clean, noisy, strict=True):
        np.testing.assert_array_equal(batch["targets"], other["targets"])
        is_new = batch["inputs"] != other["inputs"]
        changed.append(is_new.mean())
        if by == "unknown":
            assert set(other["inputs"][is_new]) <= {data.tokenizer.specials["<|unknown|>"]}
        else:
            assert other["inputs"].max() < data.tokenizer.vocab_size
    assert abs(np.mean(changed) - 0.25) < 0.02


def test_an_epoch_is_as_many_steps_as_hold_its_rows(data):
    split = data.corpora[0].train
    assert batches_per_epoch(data, DataConfig(batch_size=2), LENGTH) == -(-((split.num_tokens - 1) // LENGTH) // 2)
    assert batches_per_epoch(data, DataConfig(mode="padded", batch_size=7), LENGTH) == -(-split.num_documents // 7)


def test_what_cannot_be_trained_on_is_refused(data, tmp_path):
    check_data(data, DataConfig(), 100)
    with pytest.raises(UserError, match=r"train split of one must have at least .* 2001 tokens, got \d+; give more"):
        check_data(data, DataConfig(), 2000)
    check_data(data, DataConfig(mode="packed"), 2000)
    gpt2 = prepared(tmp_path, {"one": documents(60)}, tokenizer="gpt2")
    rare = tuple(dataclasses.replace(data.corpora[0], weight=weight) for weight in (1e-6, 1 - 1e-6))
    with pytest.raises(UserError, match=r"the corpus one has 1e-06 of the rows, less than one in 65,536"):
        check_data(dataclasses.replace(data, corpora=rare), DataConfig(), 10)
    check_data(gpt2, DataConfig(token_dropout=0.1, token_dropout_by="random"), 10)
    with pytest.raises(UserError, match=r"unknown needs a token <\|unknown\|>, which gpt2 does not have"):
        check_data(gpt2, dataclasses.replace(DataConfig(), token_dropout=0.1), 10)
