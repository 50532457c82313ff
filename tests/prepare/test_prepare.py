"""Preparation: what is on disk, that it is the same for any number of processes, survives kills and tells damage."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.normalizers
import tokenizers.pre_tokenizers
import tokenizers.processors

from moe_jax.config import DataConfig
from moe_jax.data import dataset
from moe_jax.data.dataset import open_dataset
from moe_jax.data.pieces import in_pieces
from moe_jax.data.tokenizer import document_start
from moe_jax.data.tokenizer_file import save_tokenizer
from moe_jax.errors import EnvironmentFault, UserError
from moe_jax.prepare import encode, folder, shards, sources
from moe_jax.prepare import tokenizer as making
from moe_jax.prepare.cache import find_or_prepare
from moe_jax.prepare.folder import prepare_folder
from moe_jax.prepare.settings import PrepareConfig
from moe_jax.prepare.tokenizer import build_tokenizer
from tests.oracles.texts import json_lines

ROOT = Path(__file__).parents[2]
STORIES = [f"Story {index}: " + "déjà vu, said the fox. " * (index % 13) for index in range(300)]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def stories(tmp_path):
    """The file of STORIES."""
    file = tmp_path / "stories.jsonl"
    file.write_text(json_lines(STORIES))
    return file


@pytest.fixture
def config(stories, tmp_path):
    return PrepareConfig(input=(str(stories),), out=str(tmp_path / "out"), tokenizer="bpe:300", shard_tokens=2000)


@pytest.fixture
def prepare(monkeypatch):
    """prepare_folder in small tasks, committed by fours; interrupted after task ``stop_at``. It counts its tasks."""
    monkeypatch.setattr(encode, "_TASK_CHARACTERS", 1000)
    monkeypatch.setattr(folder, "COMMIT_TASKS", 4)
    write = folder.SplitWriter.write

    def in_small_tasks(config, stop_at=None):
        written = []

        def counted(self, encoded):
            write(self, encoded)
            written.append(encoded)
            if len(written) == stop_at:
                raise KeyboardInterrupt

        monkeypatch.setattr(folder.SplitWriter, "write", counted)
        with pytest.raises(KeyboardInterrupt) if stop_at else contextlib.nullcontext():
            prepare_folder(config)
        return len(written)

    return in_small_tasks


def for_a_run(config, **settings):
    """What was prepared by ``config``, found by a run that asks for ``settings``."""
    return find_or_prepare(DataConfig(path=config.out, **settings), Path(config.out, "no cache"))


def made(folder, text, **settings):
    """What is prepared from a file of ``text``; a token a byte."""
    (folder / "a.txt").write_text(text)
    config = PrepareConfig(input=(str(folder / "a.txt"),), out=str(folder / "out"), tokenizer="byte")
    return prepare_folder(replace(config, **settings))


def splits_of(data):
    """The (train, val) split of the only corpus."""
    return [split for name in ("train", "val") for split in data.splits(name)]


def documents_of(split, tokenizer):
    """The texts of a split, read back."""
    stream, bounds = split.stream(), [0, *np.cumsum(split.lengths()).tolist()]
    assert bounds[-1] == split.num_tokens == len(stream)
    return [tokenizer.decode(stream.read(*between).tolist()) for between in pairwise(bounds)]


def files_of(folder):
    files = (file for file in Path(folder).rglob("*") if file.is_file() and file.name != ".lock")
    return {file.relative_to(folder): file.read_bytes() for file in files}


@pytest.mark.parametrize(
    ("delimiters", "form"), [("endoftext", "<|endoftext|>{}"), ("chat", "<|im_start|>{}<|im_end|>")]
)
def test_a_stream_holds_the_documents_between_their_delimiters(config, delimiters, form):
    data = prepare_folder(replace(config, delimiters=delimiters))
    train, val = splits_of(data)
    found = documents_of(train, data.tokenizer), documents_of(val, data.tokenizer)
    assert sorted(found[0] + found[1]) == sorted(map(form.format, STORIES))
    assert (train.num_documents, val.num_documents) == tuple(map(len, found))
    assert train.num_bytes + val.num_bytes == sum(len(text.encode()) for text in STORIES)
    assert 0.03 < val.num_bytes / train.num_bytes < 0.08
    assert len(list(train.files())) > 3, "several shards"
    assert {size for _, size in list(train.files())[:-2]} == {2 * 2000}
    meta = json.loads((data.folder / "meta.json").read_text())
    assert meta["tokenizer"]["name"] == "bpe:300"
    assert meta["made_from"]["corpora"]["text"]["documents"] == 300


def test_twice_the_same_bytes_whatever_the_number_of_processes(config, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_TASK_CHARACTERS", 3000)
    prepare_folder(config)
    prepare_folder(replace(config, out=str(tmp_path / "again"), processes=2))
    assert files_of(tmp_path / "again") == files_of(config.out)
    before = os.stat(tmp_path / "out" / "meta.json").st_mtime_ns
    prepare_folder(config)
    assert os.stat(tmp_path / "out" / "meta.json").st_mtime_ns == before, "what is there is not made again"


@pytest.mark.parametrize("at", [0, 1, 3, 10, 20])
def test_an_interrupted_preparation_is_completed(config, tmp_path, prepare, at):
    num_tasks, other = prepare(config), replace(config, out=str(tmp_path / "other"))
    assert num_tasks > 30
    prepare(other, stop_at=at + 1)
    assert not (tmp_path / "other" / "meta.json").exists()
    with pytest.raises(UserError, match=r"was interrupted; run the same .* command again"):
        for_a_run(other)
    assert prepare(other) == num_tasks - at // 4 * 4, "what was on disk for good is not tokenized again"
    assert files_of(other.out) == files_of(config.out)


def test_an_interrupted_preparation_does_not_go_on_with_something_else(config, stories, prepare):
    prepare(config, stop_at=1)
    with pytest.raises(UserError, match=r"was prepared from something else: seed was 0, now 5; choose another --out"):
        prepare(replace(config, seed=5))
    stories.write_text(json_lines(["another text " * 9]))
    with pytest.raises(UserError, match="the input of text is another"):
        prepare(config)
    # As an older version left it.
    (Path(config.out) / "progress.json").write_text('{"made_from": {}, "tokenizer_sha256": "", "counts": {}}')
    with pytest.raises(UserError, match=r"progress.json is corrupt \(.*\); remove the folder and prepare again"):
        prepare(config)


def test_a_killed_preparation_is_completed_and_leaves_no_process(config, tmp_path):
    prepare_folder(config)
    out = tmp_path / "killed"
    (tmp_path / "slow.py").write_text(
        "import time; from moe_jax import errors; from moe_jax.prepare import __main__, encode, folder\n"
        "encode._TASK_CHARACTERS = 1000; folder.COMMIT_TASKS = 4; real = folder.SplitWriter.write\n"
        "def write(self, encoded): real(self, encoded); print(encoded.split, flush=True); time.sleep(0.02)\n"
        "folder.SplitWriter.write = write\n"
        "if __name__ == '__main__': errors.run(__main__.main)\n"
    )
    flags = f"--input {config.input[0]} --tokenizer bpe:300 --shard-tokens 2000 --out {out} --processes 2"
    arguments, environment = [sys.executable, tmp_path / "slow.py", *flags.split()], {**os.environ, "PYTHONPATH": ROOT}
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen(arguments, env=environment, stdout=-1, stderr=-1, text=True) as process:
            for _ in range(4):
                process.stdout.readline()
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            assert len(children) >= 2
            process.send_signal(number)
            _, message = process.communicate()
        assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
        assert "Traceback" not in message
        if number != signal.SIGKILL:
            assert "interrupted; run the same command again to complete it" in message
        deadline = time.monotonic() + 10
        while any(map(is_running, children)):
            assert time.monotonic() < deadline, "processes that tokenize outlive their parent"
            time.sleep(0.05)
    prepare_folder(replace(config, out=str(out)))
    assert files_of(out) == files_of(config.out)


def is_running(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_limits_and_given_validation_files(config, tmp_path):
    held = tmp_path / "held.txt"
    held.write_text("one<|endoftext|>two<|endoftext|>three")
    limits = {"max_documents": 20, "val_documents": 2}
    data = prepare_folder(replace(config, val_input=(str(held),), separator="<|endoftext|>", **limits))
    train, val = splits_of(data)
    assert documents_of(val, data.tokenizer) == ["<|endoftext|>one", "<|endoftext|>two"]
    assert documents_of(train, data.tokenizer) == ["<|endoftext|>" + text for text in STORIES[:20]]
    counted = prepare_folder(replace(config, out=str(tmp_path / "counted"), val_documents=7))
    assert [split.num_documents for split in splits_of(counted)] == [293, 7]


def test_what_was_left_out_is_told_once_in_one_line(tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.jsonl").write_text('{"text": "some words of it"}\n{"text": null}\n' * 9)
    (texts / ".b.txt").write_text("hidden")
    config = PrepareConfig(input=(str(texts),), val_input=(f"{texts}/.b.txt",), out=str(tmp_path / "out"))
    data = prepare_folder(replace(config, tokenizer="byte"))
    assert [split.num_documents for split in splits_of(data)] == [9, 1]
    hidden = f"hidden names left out: 1 ({texts}/.b.txt)"
    assert capsys.readouterr().err == (
        f"note: text: {hidden}; texts that are null, left out: 9 ({texts}/a.jsonl, line 2)\n"
    )


def test_specials_in_the_text_when_asked(tmp_path):
    (tmp_path / "b.txt").write_text("<|im_start|>yo<|im_end|>")
    settings = {"val_input": (str(tmp_path / "b.txt"),), "parse_specials": True}
    data = made(tmp_path, "<|im_start|>hi<|im_end|>", **settings)
    train, val = splits_of(data)
    start, opening, closing = (data.tokenizer.specials[f"<|{name}|>"] for name in ("endoftext", "im_start", "im_end"))
    assert train.stream().read(0, 5).tolist() == [start, opening, *b"hi", closing]
    assert (train.num_bytes, val.num_bytes) == (2, 2), "specials are no bytes of text"


def test_a_document_that_several_processes_share_has_one_length(tmp_path):
    train, val = splits_of(made(tmp_path, "word " * 250_000, processes=2, val_fraction=0.1))
    assert (train.lengths().tolist(), val.lengths().tolist()) == ([1_125_001], [125_001])


def test_the_sample_of_a_tokenizer_is_spread_over_the_text(tmp_path):
    text = "|".join(chr(ord("a") + index // 100) * 50 for index in range(1000))
    data = made(tmp_path, text, separator="|", tokenizer="bpe:300", tokenizer_sample=2000)
    # Every one of the ten letters was seen often enough for a token of several of it.
    assert all(len(data.tokenizer.encode(letter * 50)) < 20 for letter in "abcdefghij")


def test_corpora_have_weights_that_can_change_without_tokenizing_again(stories, tmp_path, monkeypatch):
    (tmp_path / "verse.txt").write_text("the quick brown fox " * 200)
    inputs = (f"tales={stories}", f"verse={tmp_path / 'verse.txt'}")
    config = PrepareConfig(input=inputs, out=str(tmp_path / "out"), tokenizer="byte")
    data = prepare_folder(config)
    tokens = [corpus.train.num_tokens for corpus in data.corpora]
    assert [corpus.weight for corpus in data.corpora] == pytest.approx([n / sum(tokens) for n in tokens])
    monkeypatch.setattr(folder, "encode_all", None)
    again = prepare_folder(replace(config, weights=("tales=1", "verse=3")))
    assert [(corpus.name, corpus.weight) for corpus in again.corpora] == [("tales", 0.25), ("verse", 0.75)]
    assert again.fingerprint != data.fingerprint
    assert open_dataset(tmp_path / "out").fingerprint == again.fingerprint


def edit(old, new):
    return lambda content: content.replace(old, new, 1)


@pytest.mark.parametrize(("name", "change", "words"), [
    ("text/train-00000.bin", lambda content: b"?" + content[1:], "train-00000.bin was changed after it was made"),
    ("text/train-00000.bin", lambda content: content[:100], r"must have \d+ bytes, has 100"),
    ("text/val.lengths", None, "val.lengths is missing"),
    ("meta.json", lambda _: b"{", "meta.json is corrupt"),
    ("meta.json", lambda _: b'{"version": 2}', "format version 2, this program reads 3"),
    ("meta.json", edit(b'"num_documents": ', b'"num_documents": 1'), "meta.json was changed after"),
    ("tokenizer/tokenizer.json", edit(b"endoftext", b"chat"), "the tokenizer in .* is not the one its tokens are"),
])  # fmt: skip
def test_a_damaged_folder_is_refused_and_a_damaged_cache_made_anew(config, stories, tmp_path, name, change, words):
    text, cache = DataConfig(path=str(stories), tokenizer="bpe:300"), tmp_path / "made"
    cached = find_or_prepare(text, cache).folder
    whole = files_of(cached)
    for file in (cached / name, prepare_folder(config).folder / name):
        file.unlink() if change is None else file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match=words):
        for_a_run(config)
    assert find_or_prepare(text, cache).folder == cached
    assert files_of(cached) == whole


def test_a_copied_folder_is_checked_once(config, tmp_path, monkeypatch):
    prepare_folder(config)
    os.rename(config.out, tmp_path / "moved")
    read, real = [], dataset.open_regular
    monkeypatch.setattr(dataset, "open_regular", lambda file: read.append(file) or real(file))
    for _ in range(2):
        open_dataset(tmp_path / "moved")
        assert sorted(read) == sorted((tmp_path / "moved" / "text").iterdir()), "every file, by the first look alone"


def test_a_run_that_asks_for_something_else_is_refused(config):
    found = prepare_folder(config)
    for settings in ({}, {"tokenizer": "bpe:300", "val_fraction": 0.05}, {"tokenizer": f"{config.out}/tokenizer"}):
        assert for_a_run(config, **settings).fingerprint == found.fingerprint
    with pytest.raises(UserError, match=r"data.tokenizer is char, but .* was prepared with bpe:300; leave it out"):
        for_a_run(config, tokenizer="char")
    with pytest.raises(UserError, match=r"data.val_fraction is 0.5, but .* was prepared with 0.05"):
        for_a_run(config, val_fraction=0.5)


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
            prepare_folder(replace(config, out=str(tmp_path / out)))


def test_texts_are_prepared_once_and_found_by_their_content(stories, tmp_path):
    data, cache = DataConfig(path=str(stories), tokenizer="char"), tmp_path / "made"
    first = find_or_prepare(data, cache)
    stamp = (first.folder / "meta.json").stat().st_mtime_ns
    # The order of batches is no matter of the streams.
    again = find_or_prepare(replace(data, seed=7, batch_size=3, mode="packed"), cache)
    assert (again.folder, again.fingerprint) == (first.folder, first.fingerprint)
    assert (first.folder / "meta.json").stat().st_mtime_ns == stamp
    other = find_or_prepare(replace(data, val_fraction=0.5), cache)
    stories.write_text(json_lines(["Another text. " * 40]))
    assert len({first.fingerprint, other.fingerprint, find_or_prepare(data, cache).fingerprint}) == 3
    assert len(list(cache.iterdir())) == 3


def test_a_published_tokenizer_is_not_fetched_for_a_runs_settings(stories, tmp_path, monkeypatch):
    """The run's own copy gives the same tokens; what was prepared under the name is found under the name."""
    data, own = DataConfig(path=str(stories), tokenizer="gpt2"), tmp_path / "own"
    save_tokenizer(build_tokenizer("gpt2", ()), own)
    here = find_or_prepare(data, tmp_path / "made")
    monkeypatch.setattr(making, "PUBLISHED", {"gpt2": None})
    assert find_or_prepare(data, tmp_path / "made", of_run=own).folder == here.folder
    assert find_or_prepare(data, tmp_path / "other", of_run=own).fingerprint == here.fingerprint


def test_unknown_characters_are_counted(tmp_path):
    data = made(tmp_path, "abc" * 100 + "ééé", tokenizer="char", val_fraction=0.01)
    _, val = splits_of(data)
    assert val.num_unknown == 3
    assert val.stream().read(0, 4).tolist() == [document_start(data.tokenizer)] + [data.tokenizer.unknown_id] * 3


@pytest.mark.parametrize("name", ["train-00000.bin", "train.lengths", "val-00000.bin"])
@pytest.mark.parametrize("size", [None, 3])
def test_what_was_written_and_is_gone_is_never_filled_with_zeros(config, prepare, name, size):
    prepare(config, stop_at=13)  # between two commits
    file = Path(config.out, "text", name)
    file.unlink() if size is None else os.truncate(file, size)
    words = rf"{re.escape(name)} must have the \d+ bytes that were written before, has {size or 0}"
    with pytest.raises(UserError, match=words):
        prepare(config)
    assert not Path(config.out, "meta.json").exists()


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
    data = prepare_folder(config)
    assert open_dataset(data.folder).fingerprint == data.fingerprint


def test_without_a_place_for_a_texts_tokens_there_is_one_line(stories, tmp_path):
    (tmp_path / "in the way").write_text("")
    cache = tmp_path / "in the way" / "data"
    words = rf"{cache}, where the tokens of a text are kept, cannot be written \(Not a directory\); set XDG_CACHE_HOME"
    with pytest.raises(EnvironmentFault, match=words):
        find_or_prepare(DataConfig(path=str(stories), tokenizer="byte"), cache)


def test_nothing_of_linux_alone_is_needed(config, monkeypatch):
    for name in ("sched_getaffinity", "posix_fadvise", "posix_fallocate", "copy_file_range", "fdatasync", "pipe2"):
        monkeypatch.delattr(os, name)
    assert prepare_folder(config).corpora


@pytest.mark.parametrize("change", ["longer", "same length", "gone"])
def test_any_change_between_the_passes_is_told(config, stories, monkeypatch, change):
    real = folder.made_from

    def meddle(*arguments):
        found, content = real(*arguments), stories.read_text()
        if change == "gone":
            stories.unlink()
        else:
            time.sleep(0.01)
            longer = content + json_lines(["late"])
            stories.write_text(longer if change == "longer" else content.replace("said", "SAID"))
        return found

    monkeypatch.setattr(folder, "made_from", meddle)
    with pytest.raises(UserError, match="the input of text changed while it was prepared"):
        prepare_folder(replace(config, tokenizer="byte"))


def test_another_tokenizer_at_the_same_path_is_another_cache_entry(stories, tmp_path, monkeypatch):
    file, cache = tmp_path / "tokenizer.json", tmp_path / "made"
    data = DataConfig(path=str(stories), tokenizer=str(file))
    with pytest.raises(UserError, match=r"there is no tokenizer at .*; name a tokenizer.json, a folder"):
        find_or_prepare(data, cache)
    for spec, size in (("byte", 261), ("bpe:300", 300)):
        save_tokenizer(build_tokenizer(spec, STORIES), tmp_path)
        assert find_or_prepare(data, cache).tokenizer.vocab_size == size
    # A name of ours is ours, whatever lies in the working folder.
    monkeypatch.chdir(tmp_path)
    save_tokenizer(build_tokenizer("bpe:300", STORIES), tmp_path / "byte")
    assert find_or_prepare(replace(data, tokenizer="byte"), cache).tokenizer.name == "byte"


def test_names_of_files_that_are_no_unicode(config, tmp_path):
    (tmp_path / "texts").mkdir()
    for name in (b"caf\xe9.txt", b"tea.txt", b"milk.txt"):  # the first is not UTF-8, and meta.json has it
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/texts/" + name)).write_text("a text of some length " * 9)
    data = prepare_folder(replace(config, input=(str(tmp_path / "texts"),), val_documents=1))
    assert data.splits("train")[0].num_documents == 2
    assert find_or_prepare(DataConfig(path=str(tmp_path / "texts"), tokenizer="byte"), tmp_path / "made")


def prefix_adding(kind):
    """A tokenizer of Hugging Face's library that puts a space before a text."""
    if kind == "byte level":
        other = tokenizers.Tokenizer(
            tokenizers.models.BPE({c: i for i, c in enumerate([*"abcĠĊ.", "Ġa", "</s>"])}, [("Ġ", "a")])
        )
        other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
        other.decoder = tokenizers.decoders.ByteLevel()
        other.post_processor = tokenizers.processors.ByteLevel()
    else:
        other = tokenizers.Tokenizer(
            tokenizers.models.BPE({c: i for i, c in enumerate([*"abc▁\n.", "▁a", "</s>"])}, [("▁", "a")])
        )
        other.decoder = tokenizers.decoders.Metaspace()
        if kind == "metaspace":
            other.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        else:
            replace = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
            other.normalizer = tokenizers.normalizers.Sequence(replace)
    return other


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 40)
    monkeypatch.setattr(sources, "in_pieces", lambda chunks: in_pieces(chunks, 40))
    for module in (sources, encode):
        monkeypatch.setattr(module, "AROUND", 12)


def test_pieces_of_a_run_of_one_character_have_all_of_it(tmp_path, small_pieces):
    runs = {"=" * 2**power: power for power in range(4)} | {"a": 4, "</s>": 5}
    merges = [(run, run) for run in list(runs)[:3]]
    other = tokenizers.Tokenizer(tokenizers.models.BPE(runs, merges))
    other.decoder = tokenizers.decoders.Fuse()
    (tmp_path / "tokenizer.json").write_text(other.to_str())
    text = "aaa" + "=" * 1001 + "a" * 100
    data = made(tmp_path, text, tokenizer=str(tmp_path / "tokenizer.json"), val_fraction=0.02)
    train, val = splits_of(data)
    assert (
        "".join([*documents_of(train, data.tokenizer), *documents_of(val, data.tokenizer)]).replace("</s>", "") == text
    )
    assert train.num_unknown == 0
    assert train.num_tokens < 300


@pytest.mark.parametrize("kind", ["byte level", "metaspace", "prepend"])
def test_pieces_have_the_tokens_of_their_whole_document(tmp_path, small_pieces, kind):
    (tmp_path / "tokenizer.json").write_text(prefix_adding(kind).to_str())
    text = "a ba ca.\nab a\n\nbc  a\n" * 50 + "abc" * 60
    data = made(tmp_path, text, tokenizer=str(tmp_path / "tokenizer.json"), val_fraction=0.3)
    cut = len(text) - round(0.3 * len(text))
    for split, part in zip(splits_of(data), (text[:cut], text[cut:]), strict=True):
        ids = split.stream().read(1, split.num_tokens).tolist()
        assert ids == data.tokenizer.encode(part).tolist()
        assert split.num_bytes == len(part)
        assert (split.num_unknown > 0) == (kind == "byte level"), "its added space stays in the text"


UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -1.0]]}
PAIRS = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}


@pytest.mark.parametrize("parse_specials", [False, True])
@pytest.mark.parametrize("model", [UNIGRAM, PAIRS])
def test_text_that_a_foreign_tokenizer_loses_ends_bits_per_byte(tmp_path, model, parse_specials):
    end = {"id": 3, "content": "</s>", "special": True}
    end |= dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    content = {"version": "1.0", "added_tokens": [end], "decoder": {"type": "Fuse"}, "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    settings = {"tokenizer": str(tmp_path / "tokenizer.json"), "val_fraction": 0.2, "parse_specials": parse_specials}
    for text, is_lost in (("ab" * 50, False), ("abz" * 50, True)):
        _, val = splits_of(made(tmp_path, text, out=str(tmp_path / f"out {is_lost}"), **settings))
        assert (val.num_unknown > 0) == is_lost
