"""Preparation: what is on disk, that it is the same for any number of processes, survives kills and tells damage."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moe_jax.config import DataConfig
from moe_jax.data.dataset import open_dataset
from moe_jax.data.tokenizer import document_start
from moe_jax.data.tokenizer_file import save_tokenizer
from moe_jax.errors import UserError
from moe_jax.prepare import encode, folder, shards
from moe_jax.prepare.cache import find_or_prepare
from moe_jax.prepare.folder import prepare_folder
from moe_jax.prepare.settings import PrepareConfig
from moe_jax.prepare.tokenizer import build_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def stories(tmp_path):
    """300 stories in a .jsonl file: (file, texts)."""
    texts = [f"Story {index}: " + "déjà vu, said the fox. " * (index % 13) for index in range(300)]
    file = tmp_path / "stories.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file, texts


@pytest.fixture
def config(stories, tmp_path):
    return PrepareConfig(input=(str(stories[0]),), out=str(tmp_path / "out"), tokenizer="bpe:300", shard_tokens=2000)


def made(folder, text, **settings):
    """What is prepared from a file of ``text``; a token a byte."""
    (folder / "a.txt").write_text(text)
    config = PrepareConfig(input=(str(folder / "a.txt"),), out=str(folder / "out"), tokenizer="byte")
    return prepare_folder(dataclasses.replace(config, **settings))


def documents_of(split, tokenizer):
    """The texts of a split, read back."""
    stream, texts, start = split.stream(), [], 0
    for length in split.lengths().tolist():
        texts.append(tokenizer.decode(stream.read(start, start + length).tolist()))
        start += length
    assert start == split.num_tokens == len(stream)
    return texts


def files_of(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(Path(folder).rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


@pytest.mark.parametrize(
    ("delimiters", "form"), [("endoftext", "<|endoftext|>{}"), ("chat", "<|im_start|>{}<|im_end|>")]
)
def test_a_stream_holds_the_documents_between_their_delimiters(config, stories, delimiters, form):
    data = prepare_folder(dataclasses.replace(config, delimiters=delimiters))
    (train,), (val,) = data.splits("train"), data.splits("val")
    found = documents_of(train, data.tokenizer), documents_of(val, data.tokenizer)
    assert sorted(found[0] + found[1]) == sorted(map(form.format, stories[1]))
    assert (train.num_documents, val.num_documents) == tuple(map(len, found))
    assert train.num_bytes + val.num_bytes == sum(len(text.encode()) for text in stories[1])
    assert 0.03 < val.num_bytes / train.num_bytes < 0.08
    assert len(list(train.files())) > 3, "several shards"
    assert {size for _, size in list(train.files())[:-2]} == {2 * 2000}
    meta = json.loads((data.folder / "meta.json").read_text())
    assert meta["tokenizer"]["name"] == "bpe:300"
    assert meta["made_from"]["corpora"]["text"]["documents"] == 300


def test_twice_the_same_bytes_whatever_the_number_of_processes(config, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_TASK_CHARACTERS", 3000)
    prepare_folder(config)
    prepare_folder(dataclasses.replace(config, out=str(tmp_path / "again"), processes=2))
    assert files_of(tmp_path / "again") == files_of(config.out)
    before = os.stat(tmp_path / "out" / "meta.json").st_mtime_ns
    prepare_folder(config)
    assert os.stat(tmp_path / "out" / "meta.json").st_mtime_ns == before, "what is there is not made again"


WRITE = folder.SplitWriter.write


def stop_after(monkeypatch, number):
    """Interrupts a preparation after so many tasks; returns a list of those that were written."""
    written = []

    def write(self, encoded):
        WRITE(self, encoded)
        written.append(encoded)
        if len(written) == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(folder.SplitWriter, "write", write)
    return written


@pytest.mark.parametrize("at", [0, 1, 3, 10, 20])
def test_an_interrupted_preparation_is_completed(config, tmp_path, monkeypatch, at):
    monkeypatch.setattr(encode, "_TASK_CHARACTERS", 1000)
    monkeypatch.setattr(folder, "COMMIT_TASKS", 4)
    written = stop_after(monkeypatch, None)
    prepare_folder(config)
    num_tasks = len(written)
    assert num_tasks > 30
    other = dataclasses.replace(config, out=str(tmp_path / "other"))
    written = stop_after(monkeypatch, at + 1)
    with pytest.raises(KeyboardInterrupt):
        prepare_folder(other)
    assert not (tmp_path / "other" / "meta.json").exists()
    with pytest.raises(UserError, match=r"was interrupted; run the same .* command again"):
        find_or_prepare(DataConfig(path=other.out), tmp_path / "unused")
    written = stop_after(monkeypatch, None)
    prepare_folder(other)
    assert files_of(other.out) == files_of(config.out)
    assert len(written) == num_tasks - at // 4 * 4, "what was on disk for good is not tokenized again"


def test_an_interrupted_preparation_does_not_go_on_with_something_else(config, stories, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "encode_all", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare_folder(config)
    with pytest.raises(UserError, match=r"was prepared from something else: seed was 0, now 5; choose another --out"):
        prepare_folder(dataclasses.replace(config, seed=5))
    stories[0].write_text(json.dumps({"text": "another text " * 9}) + "\n")
    with pytest.raises(UserError, match="the input of text is another"):
        prepare_folder(config)
    # As an older version left it.
    (Path(config.out) / "progress.json").write_text('{"made_from": {}, "tokenizer_sha256": "", "counts": {}}')
    with pytest.raises(UserError, match=r"progress.json is corrupt \(.*\); remove the folder and prepare again"):
        prepare_folder(config)


def test_a_killed_preparation_is_completed_and_leaves_no_process(config, tmp_path, monkeypatch):
    prepare_folder(config)
    out = tmp_path / "killed"
    program = (
        "import sys, time; from moe_jax import errors; from moe_jax.prepare import __main__, encode, folder\n"
        "encode._TASK_CHARACTERS = 1000; folder.COMMIT_TASKS = 4; real = folder.SplitWriter.write\n"
        "def write(self, encoded): real(self, encoded); print(encoded.split, flush=True); time.sleep(0.02)\n"
        "folder.SplitWriter.write = write\n"
        "if __name__ == '__main__': errors.run(__main__.main)\n"
    )
    (tmp_path / "slow.py").write_text(program)
    flags = ["--input", *config.input, "--tokenizer", "bpe:300", "--shard-tokens", "2000", "--out", str(out)]
    arguments = [sys.executable, str(tmp_path / "slow.py"), *flags, "--processes", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            for _ in range(4):
                process.stdout.readline()
            children = child_processes(process.pid)
            assert len(children) >= 2
            process.send_signal(number)
            process.stdout.read()
            message = process.stderr.read().decode()
        assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
        assert "Traceback" not in message
        if number != signal.SIGKILL:
            assert "interrupted; run the same command again to complete it" in message
        deadline = time.monotonic() + 10
        while any(map(is_running, children)):
            assert time.monotonic() < deadline, "processes that tokenize outlive their parent"
            time.sleep(0.05)
    prepare_folder(dataclasses.replace(config, out=str(out)))
    assert files_of(out) == files_of(config.out)


def child_processes(pid):
    tasks = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in tasks.read_text().split()]


def is_running(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_limits_and_given_validation_files(config, stories, tmp_path):
    held = tmp_path / "held.txt"
    held.write_text("one<|endoftext|>two<|endoftext|>three")
    given = dataclasses.replace(
        config, val_input=(str(held),), separator="<|endoftext|>", max_documents=20, val_documents=2
    )
    data = prepare_folder(given)
    (train,), (val,) = data.splits("train"), data.splits("val")
    assert documents_of(val, data.tokenizer) == ["<|endoftext|>one", "<|endoftext|>two"]
    assert documents_of(train, data.tokenizer) == ["<|endoftext|>" + text for text in stories[1][:20]]
    counted = prepare_folder(dataclasses.replace(config, out=str(tmp_path / "counted"), val_documents=7))
    assert [split.num_documents for name in ("train", "val") for split in counted.splits(name)] == [293, 7]


def test_specials_in_the_text_when_asked(tmp_path):
    (tmp_path / "b.txt").write_text("<|im_start|>yo<|im_end|>")
    data = made(
        tmp_path, "<|im_start|>hi<|im_end|>", val_input=(str(tmp_path / "b.txt"),), parse_specials=True
    )  # fmt: skip
    (train,), specials = data.splits("train"), data.tokenizer.specials
    expected = [specials["<|endoftext|>"], specials["<|im_start|>"], *b"hi", specials["<|im_end|>"]]
    assert train.stream().read(0, 5).tolist() == expected
    # They are no bytes of text.
    assert [data.splits(name)[0].num_bytes for name in ("train", "val")] == [2, 2]


def test_the_sample_of_a_tokenizer_is_spread_over_the_text(tmp_path):
    text = "|".join(chr(ord("a") + index // 100) * 50 for index in range(1000))
    data = made(tmp_path, text, separator="|", tokenizer="bpe:300", tokenizer_sample=2000)
    # Every one of the ten letters was seen often enough for a token of several of it.
    assert all(len(data.tokenizer.encode(letter * 50)) < 20 for letter in "abcdefghij")


def test_corpora_have_weights_that_can_change_without_tokenizing_again(stories, tmp_path, monkeypatch):
    (tmp_path / "verse.txt").write_text("the quick brown fox " * 200)
    config = PrepareConfig(
        input=(f"tales={stories[0]}", f"verse={tmp_path / 'verse.txt'}"), out=str(tmp_path / "out"), tokenizer="byte"
    )
    data = prepare_folder(config)
    tokens = [corpus.train.num_tokens for corpus in data.corpora]
    assert [corpus.weight for corpus in data.corpora] == pytest.approx([n / sum(tokens) for n in tokens])
    monkeypatch.setattr(folder, "encode_all", None)
    again = prepare_folder(dataclasses.replace(config, weights=("tales=1", "verse=3")))
    assert [(corpus.name, corpus.weight) for corpus in again.corpora] == [("tales", 0.25), ("verse", 0.75)]
    assert again.fingerprint != data.fingerprint
    assert open_dataset(tmp_path / "out").fingerprint == again.fingerprint


def damage_edit(folder):
    file = folder / "text" / "train-00001.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


DAMAGES = [
    (damage_edit, r"train-00001.bin was changed after it was made"),
    (lambda folder: os.truncate(folder / "text" / "train-00000.bin", 100), r"must have 4000 bytes, has 100"),
    (lambda folder: (folder / "text" / "val.lengths").unlink(), r"val.lengths is missing"),
    (lambda folder: (folder / "meta.json").write_text("{"), r"meta.json is corrupt"),
    (lambda folder: (folder / "meta.json").write_text('{"version": 2}'), r"format version 2, this program reads 3"),
    (lambda folder: edit_meta(folder, '"num_documents": ', '"num_documents": 1'), r"meta.json was changed after"),
    (lambda folder: edit_tokenizer(folder), r"the tokenizer in .* is not the one its tokens are from"),
]


def edit_meta(folder, old, new):
    file = folder / "meta.json"
    file.write_text(file.read_text().replace(old, new, 1))


def edit_tokenizer(folder):
    file = folder / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace("endoftext", "chat", 1))


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_a_damaged_folder_is_refused(config, tmp_path, damage, words):
    prepare_folder(config)
    damage(tmp_path / "out")
    with pytest.raises(UserError, match=words):
        find_or_prepare(DataConfig(path=config.out), tmp_path / "unused")


def test_a_copied_folder_is_checked_once(config, tmp_path, monkeypatch):
    prepare_folder(config)
    os.rename(config.out, tmp_path / "moved")
    from moe_jax.data import dataset as prepared

    read, real = [], prepared.file_sha256
    monkeypatch.setattr(prepared, "file_sha256", lambda file: read.append(file) or real(file))
    open_dataset(tmp_path / "moved")
    assert len(read) > 3
    read.clear()
    open_dataset(tmp_path / "moved")
    assert read == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tokenizer": "char"}, r"data.tokenizer is char, but .* was prepared with bpe:300; leave it out"),
        ({"val_fraction": 0.5}, r"data.val_fraction is 0.5, but .* was prepared with 0.05"),
        ({"tokenizer": "bpe:300", "val_fraction": 0.05}, None),
        ({}, None),
    ],
)
def test_a_run_that_asks_for_something_else_is_refused(config, tmp_path, settings, words):
    made = prepare_folder(config)
    data = DataConfig(path=config.out, **settings)
    if words is None:
        assert find_or_prepare(data, tmp_path / "unused").fingerprint == made.fingerprint
        by_path = dataclasses.replace(data, tokenizer=str(tmp_path / "out" / "tokenizer"))
        assert find_or_prepare(by_path, tmp_path / "unused").fingerprint == made.fingerprint
        return
    with pytest.raises(UserError, match=words):
        find_or_prepare(data, tmp_path / "unused")


def test_other_files_are_left_alone(config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out, words in (
        ("out", "holds other files; choose a new or an empty folder"),
        ("out/mine.txt", "--out must be a folder, but"),
        ("link", r"--out .* is a link to nothing; remove it"),
    ):
        with pytest.raises(UserError, match=words):
            prepare_folder(dataclasses.replace(config, out=str(tmp_path / out)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b" \n\t ", "has no text in it"),
        (b"", "has no text in it"),
        (b"x", "leaves nothing to train on or to validate in the 1"),
        (b"ab\xff", r"not UTF-8 text \(byte 2\)"),
    ],
)
def test_bad_input_leaves_nothing(config, tmp_path, content, words):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        prepare_folder(dataclasses.replace(config, input=(str(tmp_path / "bad.txt"),)))
    assert not (tmp_path / "out").exists()


def test_texts_are_prepared_once_and_found_by_their_content(stories, tmp_path):
    data = DataConfig(path=str(stories[0]), tokenizer="char")
    first = find_or_prepare(data, tmp_path / "made")
    stamp = (first.folder / "meta.json").stat().st_mtime_ns
    # The order of batches is no matter of the streams.
    again = find_or_prepare(dataclasses.replace(data, seed=7, batch_size=3, mode="packed"), tmp_path / "made")
    assert (again.folder, again.fingerprint) == (first.folder, first.fingerprint)
    assert (first.folder / "meta.json").stat().st_mtime_ns == stamp
    other = find_or_prepare(dataclasses.replace(data, val_fraction=0.5), tmp_path / "made")
    stories[0].write_text(json.dumps({"text": "Another text. " * 40}) + "\n")
    third = find_or_prepare(data, tmp_path / "made")
    assert len({first.fingerprint, other.fingerprint, third.fingerprint}) == 3
    assert len(list((tmp_path / "made").iterdir())) == 3


@pytest.mark.parametrize(("damage", "_"), [case for case in DAMAGES if case[0] is not damage_edit])
def test_a_damaged_cache_is_made_anew(stories, tmp_path, damage, _):
    data = DataConfig(path=str(stories[0]), tokenizer="bpe:300")
    first = find_or_prepare(data, tmp_path / "made")
    tokens = np.array(first.corpora[0].train.stream().read(0, 500))
    damage(first.folder)
    again = find_or_prepare(data, tmp_path / "made")
    np.testing.assert_array_equal(again.corpora[0].train.stream().read(0, 500), tokens)
    assert again.fingerprint == first.fingerprint


def test_unknown_characters_are_counted(tmp_path):
    data = made(tmp_path, "abc" * 100 + "ééé", tokenizer="char", val_fraction=0.01)
    (val,), unknown = data.splits("val"), data.tokenizer.unknown_id
    assert val.num_unknown == 3
    assert val.stream().read(0, 4).tolist() == [document_start(data.tokenizer), unknown, unknown, unknown]


def interrupted(config, monkeypatch, at=6):
    """The folder of a preparation that stopped between two commits."""
    monkeypatch.setattr(encode, "_TASK_CHARACTERS", 1000)
    monkeypatch.setattr(folder, "COMMIT_TASKS", 4)
    stop_after(monkeypatch, at + 1)
    with pytest.raises(KeyboardInterrupt):
        prepare_folder(config)
    stop_after(monkeypatch, None)
    return Path(config.out)


@pytest.mark.parametrize("name", ["train-00000.bin", "train.lengths", "val-00000.bin"])
@pytest.mark.parametrize("size", [None, 3])
def test_what_was_written_and_is_gone_is_never_filled_with_zeros(config, monkeypatch, name, size):
    file = interrupted(config, monkeypatch, at=12) / "text" / name
    file.unlink() if size is None else os.truncate(file, size)
    with pytest.raises(
        UserError, match=rf"{re.escape(name)} must have the \d+ bytes that were written before, has {size or 0}"
    ):
        prepare_folder(config)
    assert not (Path(config.out) / "meta.json").exists()


def test_what_a_kill_leaves_of_a_file_being_written_is_removed(config, tmp_path):
    out = tmp_path / "out"
    (out / "tokenizer").mkdir(parents=True)
    (out / ".progress.json.123").write_text("{")
    prepare_folder(config)
    assert [file.name for file in out.iterdir() if file.name.startswith(".")] == [".lock"]


def test_a_document_of_more_tokens_than_its_length_can_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "LENGTHS", np.dtype(np.uint8))
    with pytest.raises(UserError, match="a document must have at most 255 tokens, got 286; divide"):
        made(tmp_path, "x" * 300)


def test_a_cache_folder_that_cannot_be_written_costs_only_time(config, tmp_path, monkeypatch):
    (tmp_path / "in the way").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "in the way"))
    made = prepare_folder(config)
    assert open_dataset(made.folder).fingerprint == made.fingerprint


@pytest.mark.parametrize("change", ["longer", "same length", "gone"])
def test_any_change_between_the_passes_is_told(config, stories, monkeypatch, change):
    file, _ = stories
    real = folder.made_from

    def meddle(*arguments):
        found = real(*arguments)
        content = file.read_text()
        if change == "gone":
            file.unlink()
        else:
            time.sleep(0.01)
            more = json.dumps({"text": "late"}) + "\n"
            file.write_text(content + more if change == "longer" else content.replace("said", "SAID"))
        return found

    monkeypatch.setattr(folder, "made_from", meddle)
    with pytest.raises(UserError, match="the input of text changed while it was prepared"):
        prepare_folder(dataclasses.replace(config, tokenizer="byte"))


def test_another_tokenizer_at_the_same_path_is_another_cache_entry(stories, tmp_path, monkeypatch):
    file = tmp_path / "tokenizer.json"
    data = DataConfig(path=str(stories[0]), tokenizer=str(file))
    with pytest.raises(UserError, match=r"there is no tokenizer at .*; name a tokenizer.json, a folder"):
        find_or_prepare(data, tmp_path / "made")
    for spec, size in (("byte", 261), ("bpe:300", 300)):
        save_tokenizer(build_tokenizer(spec, stories[1]), tmp_path / spec)
        file.write_bytes((tmp_path / spec / "tokenizer.json").read_bytes())
        assert find_or_prepare(data, tmp_path / "made").tokenizer.vocab_size == size
    # A name of ours is ours, whatever lies in the working folder.
    monkeypatch.chdir(tmp_path)
    named = find_or_prepare(dataclasses.replace(data, tokenizer="byte"), tmp_path / "made")
    assert named.tokenizer.name == "byte"


def test_names_of_files_that_are_no_unicode(config, tmp_path):
    (tmp_path / "texts").mkdir()
    for name in (b"caf\xe9.txt", b"tea.txt", b"milk.txt"):  # the first is not UTF-8, and meta.json has it
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/texts/" + name)).write_text("a text of some length " * 9)
    data = prepare_folder(dataclasses.replace(config, input=(str(tmp_path / "texts"),), val_documents=1))
    assert data.splits("train")[0].num_documents == 2
    assert find_or_prepare(DataConfig(path=str(tmp_path / "texts"), tokenizer="byte"), tmp_path / "made")


@pytest.mark.parametrize("parse_specials", [False, True])
@pytest.mark.parametrize(
    "model",
    [
        {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -1.0]]},
        {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
    ],
)
def test_text_that_a_foreign_tokenizer_loses_ends_bits_per_byte(tmp_path, model, parse_specials):
    end = {"id": 3, "content": "</s>", "special": True, "single_word": False}
    end |= dict.fromkeys(["lstrip", "rstrip", "normalized"], False)
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [end], "decoder": {"type": "Fuse"}, "model": model})
    )
    settings = {"tokenizer": str(tmp_path / "tokenizer.json"), "val_fraction": 0.2, "parse_specials": parse_specials}
    for text, is_lost in (("ab" * 50, False), ("abz" * 50, True)):
        data = made(tmp_path, text, out=str(tmp_path / f"out {is_lost}"), **settings)
        assert (data.splits("val")[0].num_unknown > 0) == is_lost
