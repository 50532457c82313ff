"""Whole recipes, as the README runs them: minutes each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(folder, *arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "bits_per_byte"), [("moe", 2.20), ("dense", 2.30)])
def test_a_recipe_reaches_its_loss_and_speaks(tmp_path, recipe, bits_per_byte):
    run(tmp_path, "train.py", "--config", f"configs/{recipe}.py", "--workdir", str(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    reached = [line["val/bits_per_byte"] for line in lines if "val/bits_per_byte" in line]
    assert reached[-1] <= bits_per_byte
    assert reached == sorted(reached, reverse=True)
    text = run(tmp_path, "sample.py", "--workdir", str(tmp_path / "run"), "--max-new-tokens", "400")
    # Speakers in capitals and a colon, on lines of their own, as in the plays.
    assert sum(line.endswith(":") and line.isupper() for line in text.splitlines()) >= 3
