"""python -m moe_jax.data.prepare as a user runs it: what it says, what it refuses and a disk that is full."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.oracles.texts import VERSE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of good and bad inputs, in which the command is run."""
    folder = tmp_path_factory.mktemp("home")
    lines = "".join(json.dumps({"text": f"{VERSE * 3}{index}"}) + "\n" for index in range(40))
    files = {
        "good.jsonl": lines.encode(),
        "empty.txt": b"",
        "blank.jsonl": b'{"text": " "}\n',
        "latin.txt": "caf\xe9".encode("latin-1"),
        "key.jsonl": b'{"text": "a"}\n{"txt": "b"}\n',
        "cut.jsonl.gz": gzip.compress(lines.encode())[:-9],
        "one.txt": b"x",
        "tokenizer/tokenizer.json": b"{}",
        "folder/readme.png": b"",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def prepare(home, *flags, limit=None):
    """Runs the command; ``limit``: the largest file that it may write, in blocks of half or one kilobyte."""
    shell = [] if limit is None else ["sh", "-c", f'ulimit -f {limit}; exec "$@"', "sh"]
    return subprocess.run(
        [*shell, sys.executable, "-m", "moe_jax.data.prepare", *map(str, flags)],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(home / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
    )


def files_of(folder):
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file() and "cache" not in file.parts}


def test_it_says_what_it_made_and_how_to_train_on_it(home):
    done = prepare(home, "--input", "good.jsonl", "--out", "made", "--tokenizer", "bpe:300")
    assert (done.returncode, done.stderr) == (0, ""), "bars are for a terminal"
    assert re.search(r"text train: 38 documents, [\d,]+ tokens, \d\.\d+ bytes a token\ntext val: 2 doc", done.stdout)
    assert "train on it: python train.py --config configs/moe.py --data.path made\n" in done.stdout
    again = prepare(home, "--input", "good.jsonl", "--out", "made", "--tokenizer", "bpe:300")
    assert (again.returncode, again.stdout) == (0, done.stdout)
    other = prepare(home, "--input", "good.jsonl", "--out", "made", "--tokenizer", "byte")
    assert other.returncode == 2
    assert "tokenizer was bpe:300, now byte" in other.stderr


GOOD = ["--input", "good.jsonl"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--input is required"),
        (GOOD, "--out is required"),
        (["--input", "none.txt", "--out", "new"], "the input none.txt does not exist"),
        (["--input", "folder", "--out", "new"], "the input folder holds no file of a known format"),
        (["--input", "empty.txt", "--out", "new"], "empty.txt has no text in it"),
        (["--input", "blank.jsonl", "--out", "new"], "blank.jsonl has no text in it"),
        (["--input", "latin.txt", "--out", "new"], "latin.txt is not UTF-8 text (byte 3)"),
        (["--input", "good.jsonl", "key.jsonl", "--out", "new"], "key.jsonl, line 2 has no key text (txt)"),
        (["--input", "cut.jsonl.gz", "--out", "new"], "cut.jsonl.gz is damaged or cut short"),
        (["--input", "one.txt", "--out", "new"], "leaves nothing to train on or to validate"),
        ([*GOOD, "--out", "new", "--val-documents", "40"], "--val-documents must leave something to train on"),
        ([*GOOD, "--out", "new", "--val-input", "empty.txt"], "empty.txt has no text in it"),
        ([*GOOD, "--out", "new", "--tokenizer", "bpe:100"], "needs VOCAB in [300, 262144], got 100"),
        ([*GOOD, "--out", "new", "--tokenizer", "word"], "--tokenizer must be char, byte"),
        ([*GOOD, "--out", "new", "--tokenizer", "tokenizer"], "tokenizer.json is corrupt"),
        ([*GOOD, "--out", "new", "--text-key", "story"], "good.jsonl, line 1 has no key story (text)"),
        ([*GOOD, "--out", "new", "--max-documents", "0"], "--max-documents must be at least 1, got 0"),
        ([*GOOD, "--out", "new", "--delimiters", "chat", "--tokenizer", "gpt2"], "has no special token <|im_start|>"),
        ([*GOOD, "--out", "one.txt"], "--out must be a folder, but one.txt is a file"),
        ([*GOOD, "--out", "folder"], "--out folder holds other files"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(home, flags, words):
    before = files_of(home)
    done = prepare(home, *flags)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    assert words in done.stderr
    assert done.stdout == ""
    assert files_of(home) == before
    assert not (home / "new").exists()


def test_a_full_disk_is_one_line_and_the_preparation_goes_on_later(home):
    flags = (*GOOD, "--tokenizer", "byte", "--processes", "2", "--out", "full")
    full = prepare(home, *flags, limit=4)
    assert full.returncode == 1, full.stderr
    where, remedy = "full/text/train-00000.bin", "allow larger files (ulimit -f) and run the same command again"
    assert full.stderr == f"error: File too large: {where}; {remedy}\n"
    assert not (home / "full" / "meta.json").exists()
    assert prepare(home, *flags).returncode == 0
    straight = prepare(home, *GOOD, "--tokenizer", "byte", "--out", "straight")
    assert straight.returncode == 0
    for file in (home / "straight" / "text").iterdir():
        assert (home / "full" / "text" / file.name).read_bytes() == file.read_bytes()


def test_a_folder_that_cannot_be_made_is_a_fault_of_the_environment(home):
    done = prepare(home, *GOOD, "--out", home / "one.txt" / "new")
    assert done.returncode == 1
    assert re.fullmatch(r"error: Not a directory: [^\n]*\n", done.stderr), done.stderr
