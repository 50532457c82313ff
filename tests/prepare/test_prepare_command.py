"""python -m moe_jax.prepare as a user runs it: what it prints."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.oracles.texts import VERSE, json_lines


def test_it_prints_what_it_made_and_how_to_train_on_it(tmp_path):
    (tmp_path / "good.jsonl").write_text(json_lines(f"{VERSE * 3}{index}" for index in range(40)))
    flags = ("--input", "good.jsonl", "--out", "made", "--tokenizer", "bpe:300")
    command = [sys.executable, "-m", "moe_jax.prepare", *flags]
    environment = {**os.environ, "PYTHONPATH": Path(__file__).parents[2], "XDG_CACHE_HOME": tmp_path / "cache"}
    printed = set()
    for _ in range(2):  # the second time of what is there already
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, ""), "bars are for a terminal"
        printed.add(done.stdout)
    (text,) = printed
    assert re.search(r"text train: 38 documents, [\d,]+ tokens, \d\.\d+ bytes a token\ntext val: 2 doc", text)
    assert "train on it: python train.py --config configs/moe.py --data.path made\n" in text
