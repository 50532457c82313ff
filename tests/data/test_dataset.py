"""A prepared folder of somebody else's: made up, sealed with checksums of its own, and refused when it is opened."""

import dataclasses
import json
import os

import numpy as np
import pytest

from moe_jax.data.dataset import LENGTHS, Corpus, MadeFrom, Split, file_sha256, open_dataset
from moe_jax.data.tokenizer import ByteTokenizer
from moe_jax.data.tokenizer_file import save_tokenizer
from moe_jax.errors import UserError
from moe_jax.prepare.folder import write_meta

TOKENS, DOCUMENTS = [256, 97, 98, 256, 99, 100], [3, 3]


def write(folder, tokens=TOKENS, lengths=DOCUMENTS, dtype="uint16"):
    """A folder of two equal splits; the files' contents and all checksums agree."""
    tokenizer, splits = ByteTokenizer("endoftext"), []
    save_tokenizer(tokenizer, folder / "tokenizer")
    (folder / "text").mkdir()
    for name in ("train", "val"):
        split = Split(
            name=name,
            folder=folder / "text",
            dtype=dtype,
            shard_tokens=4,
            num_tokens=len(tokens),
            num_documents=len(lengths),
            num_bytes=4,
            num_unknown=0,
            sha256={},
        )
        split.lengths_file.write_bytes(np.array(lengths, LENGTHS).tobytes())
        for index, (file, size) in enumerate(split.shards()):
            file.write_bytes(np.array(tokens[4 * index : 4 * index + size], dtype).tobytes())
        sums = {file.name: file_sha256(file) for file, _ in split.files()}
        splits.append(dataclasses.replace(split, sha256=sums))
    write_meta(folder, tokenizer, [Corpus("text", 1.0, *splits)], MadeFrom(3, {}, {}))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder to write into; what is written in it is not known to be right on this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    return tmp_path


def test_a_sound_folder_is_opened(folder):
    write(folder)
    assert open_dataset(folder).splits("train")[0].stream().read(0, 6).tolist() == TOKENS


@pytest.mark.parametrize(("values", "words"), [
    ({"tokens": [256, 97, 98, 65535, 99, 100]}, "train-00000.bin has the token 65535, but its tokenizer only 261"),
    ({"tokens": [256, 97, 98, 256, 261, 100]}, "train-00001.bin has the token 261, but its tokenizer only 261"),
    ({"tokens": [256] * 5 + [2**32 - 1], "dtype": "uint32"}, "has the token 4294967295"),
    ({"lengths": [3, 2**32 - 1]}, "must be at least 1 and add up to the 6 tokens of the split, got 4294967298"),
    ({"lengths": [3, 2]}, "add up to the 6 tokens of the split, got 5"),
    ({"lengths": [0, 6]}, "must be at least 1"),
    ({"lengths": []}, "add up to the 6 tokens of the split, got 0"),
])  # fmt: skip
def test_numbers_that_cannot_be_are_refused_whatever_the_checksums_say(folder, values, words):
    write(folder, **values)
    with pytest.raises(UserError, match=f"{words}.*prepare the folder again"):
        open_dataset(folder)


def put(value, *path):
    """A change of meta.json: ``value`` at ``path``; None removes what is there."""

    def change(meta):
        for name in path[:-1]:
            meta = meta[name]
        if value is None:
            del meta[path[-1]]
        else:
            meta[path[-1]] = value

    return change


SPLIT = ("corpora", 0, "train")


@pytest.mark.parametrize(("change", "words"), [
    (put([], "corpora"), "is corrupt"),
    (put({}, "corpora"), "is corrupt"),
    (put("../../elsewhere", "corpora", 0, "name"), "is corrupt"),
    (put("much", "corpora", 0, "weight"), "is corrupt"),
    (put(0, "corpora", 0, "weight"), "is corrupt"),
    (put(float("nan"), "corpora", 0, "weight"), "is corrupt"),
    (put("int64", *SPLIT, "dtype"), "is corrupt"),
    (put("object", *SPLIT, "dtype"), "is corrupt"),
    (put(0, *SPLIT, "shard_tokens"), "is corrupt"),
    (put(2**40, *SPLIT, "shard_tokens"), "is corrupt"),
    (put(-1, *SPLIT, "num_documents"), "is corrupt"),
    (put("6", *SPLIT, "num_tokens"), "is corrupt"),
    (put(None, *SPLIT, "num_bytes"), "is corrupt"),
    (put([], *SPLIT, "sha256"), "is corrupt"),
    (put({}, *SPLIT, "sha256"), "was changed after it was made"),
    (put(2**60, *SPLIT, "num_tokens"), "was changed after it was made"),
    (put([], "made_from"), "is corrupt"),
    (put(None, "made_from"), "is corrupt"),
    (put("3", "version"), "is corrupt"),
    (put(3, "tokenizer"), "is corrupt"),
])  # fmt: skip
def test_a_made_up_meta_json_is_an_error(folder, change, words):
    write(folder)
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=f"meta.json .*{words}.*prepare the folder again"):
        open_dataset(folder)


def test_a_list_of_files_that_is_no_object_of_settings_or_too_deep_is_an_error(folder):
    for content in (b"[" * 100_000, b'{"version": 3, "a": ' + b"[" * 65 + b"]" * 65 + b"}", b"3", b"null", b""):
        write_again = folder / str(len(content))
        write_again.mkdir()
        write(write_again)
        (write_again / "meta.json").write_bytes(content)
        with pytest.raises(UserError, match=r"meta.json is corrupt"):
            open_dataset(write_again)


@pytest.mark.parametrize("name", ["meta.json", "tokenizer/tokenizer.json", "text/val.lengths", "text/train-00001.bin"])
def test_what_is_no_regular_file_is_refused_at_once(folder, name):
    write(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=r"must (be a regular file, got a FIFO|have \d+ bytes, has 0)"):
        open_dataset(folder)
