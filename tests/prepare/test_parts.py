"""--part and --join: the folder of one process, whatever its parts were, and one line where something is missing."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import tokenizers.decoders
import tokenizers.models

from moe_jax.data.tokenizer_file import save_tokenizer
from moe_jax.errors import UserError
from moe_jax.prepare import encode, folder, parts
from moe_jax.prepare.folder import prepare_folder
from moe_jax.prepare.settings import PrepareConfig, parse_prepare
from moe_jax.prepare.tokenizer import build_tokenizer
from tests.oracles.texts import json_lines
from tests.prepare.test_prepare import files_of

STORIES = [f"Story {index}: " + "déjà vu, said the fox. " * (index % 13) for index in range(48)]


@pytest.fixture(autouse=True)
def in_small_steps(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(encode, "_TASK_CHARACTERS", 500)
    monkeypatch.setattr(folder, "COMMIT_TASKS", 3)
    monkeypatch.setattr(parts, "_TOKENS_AT_ONCE", 97)


@pytest.fixture
def texts(tmp_path):
    """A folder of five files of three formats, one of which has no text in it."""
    place = tmp_path / "texts"
    (place / "b").mkdir(parents=True)
    (place / "a.jsonl").write_text(json_lines(STORIES[:20]))
    (place / "b" / "rows.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in STORIES[20:32]))
    (place / "b" / "one.txt").write_text("|".join(STORIES[32:44]))
    (place / "blank.txt").write_text(" \n")
    (place / "c.ndjson").write_text(json_lines(STORIES[44:]))
    return place


@pytest.fixture
def config(texts, tmp_path):
    save_tokenizer(build_tokenizer("bpe:300", STORIES), tmp_path / "ready")
    settings = {"separator": "|", "shard_tokens": 700, "tokenizer": str(tmp_path / "ready")}
    return PrepareConfig(input=(str(texts),), out=str(tmp_path / "out"), **settings)


def run_parts(config, total, order=None):
    for number in order or range(total, 0, -1):
        prepare_folder(replace(config, part=f"{number}/{total}"))


def one_process(config):
    """The files that ``config`` gives without parts."""
    whole = replace(config, out=config.out + " whole")
    prepare_folder(whole)
    return files_of(whole.out)


def check_equal(config, total):
    run_parts(config, total)
    data = prepare_folder(replace(config, join=True))
    assert files_of(config.out) == one_process(config)
    assert not Path(config.out, ".parts").exists()
    assert data.folder == Path(config.out)
    return data


@pytest.mark.parametrize("total", [1, 3, 4, 50])
def test_the_joined_folder_is_that_of_one_process(config, total):
    (corpus,) = check_equal(config, total).corpora
    assert (corpus.train.num_documents + corpus.val.num_documents, corpus.val.num_documents > 1) == (48, True)
    assert len(list(corpus.train.files())) > 3, "several shards"


@pytest.mark.parametrize("settings", [
    {"val_fraction": 0.4, "seed": 3, "delimiters": "chat"},
    {"val_documents": 7, "shard_tokens": 90},
    {"separator": None, "input": ("one.txt",)},
    {"separator": None, "input": ("one.txt", "c.ndjson"), "val_fraction": 0.3},
    {"tokenizer": "byte", "parse_specials": True, "processes": 2},
])  # fmt: skip
def test_whatever_is_held_out_and_even_if_a_document_is_cut(config, texts, settings):
    found = {"one.txt": texts / "b" / "one.txt", "c.ndjson": texts / "c.ndjson"}
    if "input" in settings:
        settings = settings | {"input": tuple(str(found[name]) for name in settings["input"])}
    check_equal(replace(config, **settings), 3)


def test_several_corpora_with_weights_and_files_to_validate_on(config, texts, tmp_path):
    for name in ("held.txt", "more.md"):
        (tmp_path / name).write_text("|".join(STORIES[::5]) + name)
    inputs = (f"news={texts / 'b'}", f"web={texts / 'a.jsonl'}", f"web={texts / 'c.ndjson'}")
    held = (f"news={tmp_path / 'held.txt'}", f"news={tmp_path / 'more.md'}")
    for weights in ((), ("web=2", "news=1")):
        shutil.rmtree(config.out + " whole", ignore_errors=True)
        shutil.rmtree(config.out, ignore_errors=True)
        check_equal(replace(config, input=inputs, val_input=held, weights=weights), 3)


def test_parquet_and_what_a_tokenizer_does_not_know(config, texts):
    """The unknown tokens of each document count in the split that it ends up in."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, stories in (("d", STORIES[:16]), ("e", STORIES[16:])):
        parquet.write_table(arrow.table({"text": stories}), texts / f"{name}.parquet", row_group_size=7)
    known = sorted(set("".join(STORIES)) - set("déx"))
    other = tokenizers.Tokenizer(
        tokenizers.models.BPE({"<|endoftext|>": 0} | {c: i for i, c in enumerate(known, 1)}, [])
    )
    other.decoder = tokenizers.decoders.Fuse()
    other.add_special_tokens(["<|endoftext|>"])
    file = texts.parent / "foreign.json"
    file.write_text(other.to_str())
    (corpus,) = check_equal(replace(config, input=(f"{texts}/*.parquet",), tokenizer=str(file)), 2).corpora
    assert min(corpus.train.num_unknown, corpus.val.num_unknown) > 0


def test_a_part_that_was_killed_and_a_join_that_was_killed_begin_again(config, monkeypatch):
    write, written = folder.SplitWriter.write, []

    def stopped(self, encoded):
        write(self, encoded)
        written.append(encoded)
        if len(written) == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(folder.SplitWriter, "write", stopped)
    stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        prepare_folder(replace(config, part="1/2"))
    with pytest.raises(UserError, match=r"--join needs every part, but 1/2, 2/2 did not finish; run --part"):
        prepare_folder(replace(config, join=True))
    written.clear()
    stop_at = None
    run_parts(config, 2, order=(1, 2))
    num_tasks = len(written)
    written.clear()
    run_parts(config, 2)
    assert not written, "what is done is not made again"
    stop_at = 9
    with pytest.raises(KeyboardInterrupt):
        prepare_folder(replace(config, join=True))
    assert Path(config.out, ".parts", "2-of-2", "meta.json").exists(), "parts stay until the folder is sealed"
    stop_at = None
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as of a kill after the seal
    prepare_folder(replace(config, join=True))
    assert Path(config.out, ".parts").exists()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path(config.out).parent / "cache"))
    data = prepare_folder(replace(config, join=True))
    assert files_of(config.out) == one_process(config)
    assert prepare_folder(replace(config, join=True)).fingerprint == data.fingerprint, "and once more"
    assert num_tasks > 0
    for settings, words in (
        ({"part": "1/2"}, "is prepared already, or being joined"),
        ({"join": True, "seed": 4}, "seed was 0"),
    ):
        with pytest.raises(UserError, match=words):
            prepare_folder(replace(config, **settings))


@pytest.mark.parametrize(("total", "order", "words"), [
    (3, (), r"got those of none; prepare them with --part"),
    (3, (1, 3), r"--join needs every part, but 2/3 did not finish"),
])  # fmt: skip
def test_missing_parts_are_named(config, total, order, words):
    if order:
        run_parts(config, total, order)
    with pytest.raises(UserError, match=words):
        prepare_folder(replace(config, join=True))
    if order:
        prepare_folder(replace(config, part="1/4"))
        with pytest.raises(UserError, match=r"needs the parts I/N of one N in .*\.parts, got those of 3 and 4"):
            prepare_folder(replace(config, join=True))


def test_parts_of_other_text_or_settings_are_named(config, texts):
    run_parts(config, 2, order=(1,))
    prepare_folder(replace(config, part="2/2", seed=1))
    with pytest.raises(UserError, match=r"\.parts/2-of-2 was prepared from something else: seed was 1, now 0"):
        prepare_folder(replace(config, join=True))
    shutil.rmtree(Path(config.out, ".parts", "2-of-2"))
    os.utime(texts / "c.ndjson", ns=(1, 1))
    run_parts(config, 2, order=(2,))
    words = (
        r"\.parts/1-of-2 was prepared from something else: input was 5 files of [\d,]+ bytes \(\w+\), now 5 files of"
    )
    with pytest.raises(UserError, match=words):
        prepare_folder(replace(config, join=True))
    with pytest.raises(UserError, match=words):
        run_parts(config, 2, order=(1,))
    assert not Path(config.out, "meta.json").exists()


@pytest.mark.parametrize("name", ["train.documents", "train-00000.bin"])
def test_a_damaged_part_is_refused(config, name):
    run_parts(config, 2)
    file = Path(config.out, ".parts", "1-of-2", "text", name)
    numbers = np.fromfile(file, np.uint16)
    numbers[0] += 1
    numbers.tofile(file)
    with pytest.raises(UserError, match=f"{name} was changed after it was made"):
        prepare_folder(replace(config, join=True))


def test_a_corpus_without_text_is_refused_by_the_join(config, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "empty" / name).write_text(" ")
    config = replace(config, input=(str(tmp_path / "empty"),))
    run_parts(config, 2)
    with pytest.raises(UserError, match="the inputs of text have no text in them"):
        prepare_folder(replace(config, join=True))


def test_one_process_does_not_write_among_parts(config):
    run_parts(config, 2, order=(1,))
    with pytest.raises(UserError, match="holds other files"):
        prepare_folder(config)


READY = ("--tokenizer", "byte")


@pytest.mark.parametrize(("flags", "words"), [
    *((("--part", part, *READY), f"--part must be I/N with I in .1, N., such as 3/64, got {part}; number the parts")
      for part in ("0/4", "5/4", "x", "1/", "1", "01/4", "1/4/4", "-1/4", "1/0")),
    (("--part", "1/4", "--join", *READY), "--join comes once all parts are done"),
    (("--part", "1/4"), "--part needs a tokenizer that is ready, got bpe:2048"),
    (("--join", "--tokenizer", "char"), "--join needs a tokenizer that is ready, got char"),
    (("--part", "1/4", *READY, "--max-documents", "9"), "--part takes all documents of the files"),
    (("--part", "1/4", *READY, "--val-input", "b", "--val-documents", "9"), "--part takes all documents of the files"),
])  # fmt: skip
def test_what_cannot_be_divided_is_refused_in_one_line(flags, words):
    with pytest.raises(UserError, match=words) as caught:
        parse_prepare(["--input", "a", "--out", "b", *flags])
    assert "\n" not in str(caught.value)
