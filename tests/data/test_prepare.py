"""Preparation: what the streams hold, and that they are made once."""

import dataclasses
import json

import numpy as np
import pytest

from moe_jax.config import DataConfig
from moe_jax.data.prepare import prepare


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(10):
        (folder / f"{index}.txt").write_text(f"Document {index} says: déjà vu.\n")
    return DataConfig(path=str(folder), tokenizer="char", val_fraction=0.2)


def test_a_stream_holds_each_document_after_an_end_of_text(data, tmp_path):
    made = prepare(data, tmp_path / "cache")
    pieces = made.tokenizer.decode(made.val.tokens.tolist()).split("<|endoftext|>")
    assert pieces[0] == ""
    # The tokenizer knows the characters of the training split only: the digits of the two others are unknown.
    assert pieces[1:] == ["Document \N{REPLACEMENT CHARACTER} says: déjà vu.\n"] * 2
    assert made.val.num_unknown == np.sum(made.val.tokens == made.tokenizer.unknown_id) == 2
    assert made.val.num_documents == len(pieces) - 1 == 2
    assert made.train.num_documents == 8
    assert made.val.num_bytes == 2 * len("Document 0 says: déjà vu.\n".encode())
    assert made.val.num_tokens == len(made.val.tokens)


def test_preparing_twice_gives_the_same_bytes_and_the_second_time_reads_the_cache(data, tmp_path):
    bpe = dataclasses.replace(data, tokenizer="bpe:300")
    one, other = prepare(bpe, tmp_path / "one"), prepare(bpe, tmp_path / "other")
    for name in ("train.bin", "val.bin", "meta.json", "tokenizer/tokenizer.json"):
        assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()
    assert one.fingerprint == other.fingerprint
    stamp = (one.folder / "train.bin").stat().st_mtime_ns
    assert prepare(bpe, tmp_path / "one").train == one.train
    # The order of batches is no matter of the streams.
    prepare(dataclasses.replace(bpe, seed=7, batch_size=3), tmp_path / "one")
    assert (one.folder / "train.bin").stat().st_mtime_ns == stamp
    assert [item.name for item in (tmp_path / "one").iterdir()] == [one.folder.name], "nothing left over"


def test_other_text_or_settings_give_another_folder_and_fingerprint(data, tmp_path):
    first = prepare(data, tmp_path / "cache")
    other = prepare(dataclasses.replace(data, val_fraction=0.5), tmp_path / "cache")
    (tmp_path / "texts" / "0.txt").write_text("Another text.\n")
    third = prepare(data, tmp_path / "cache")
    assert len({first.folder, other.folder, third.folder}) == 3
    assert len({first.fingerprint, other.fingerprint, third.fingerprint}) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "train.bin").write_bytes(b"short"),
        lambda folder: (folder / "val.bin").unlink(),
        lambda folder: (folder / "meta.json").write_text('{"splits'),
        lambda folder: (folder / "meta.json").write_text(json.dumps({"splits": {"train": {}}})),
        lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{"),
    ],
)
def test_a_damaged_cache_is_made_anew(data, tmp_path, damage):
    first = prepare(data, tmp_path / "cache")
    tokens = np.array(first.train.tokens)
    damage(first.folder)
    again = prepare(data, tmp_path / "cache")
    np.testing.assert_array_equal(again.train.tokens, tokens)
    assert again.fingerprint == first.fingerprint
    assert [item.name for item in (tmp_path / "cache").iterdir()] == [first.folder.name]
