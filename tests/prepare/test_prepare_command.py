"""python -m moe_jax.prepare as a user runs it: what it says, and a disk that is full."""

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
    """A folder with an input, in which the command is run."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "good.jsonl").write_text(
        "".join(json.dumps({"text": f"{VERSE * 3}{index}"}) + "\n" for index in range(40))
    )
    return folder


def prepare(home, *flags, limit=None):
    """Runs the command; ``limit``: the largest file that it may write, in blocks of half or one kilobyte."""
    shell = [] if limit is None else ["sh", "-c", f'ulimit -f {limit}; exec "$@"', "sh"]
    return subprocess.run(
        [*shell, sys.executable, "-m", "moe_jax.prepare", *map(str, flags)],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(home / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
    )


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
