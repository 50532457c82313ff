"""docs/walkthrough.py: the whole, and that its parts are the seven expected, each with all that it names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "walkthrough.py"
PARTS = ("data", "attention", "router", "dispatch", "balance", "training", "sampling")


def parts(source: str) -> dict[str, str]:
    """The cells of each part, by the first word of its heading."""
    pieces = re.split(r"^# %% \[markdown\]\n# ## \d+\. (\w+).*$", source, flags=re.MULTILINE)
    return {name.lower(): cells for name, cells in zip(pieces[1::2], pieces[2::2], strict=True)}


def run(program: list[str], folder: Path) -> None:
    """Runs ``program`` in ``folder``: it must succeed, warn of nothing and leave nothing there."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "TMPDIR": str(folder / "temporary"),
    }
    here = folder / "here"
    for each in (here, folder / "temporary"):
        each.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "error", *program],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [*here.iterdir(), *(folder / "temporary").iterdir()] == []


def test_its_parts_are_the_seven():
    found = parts(FILE.read_text(encoding="utf-8"))
    assert tuple(found) == PARTS
    for cells in found.values():
        # Its first cell of code begins with its imports: it brings all that it needs.
        assert re.search(r"^# %%\n(import|from) ", cells, flags=re.MULTILINE)
        assert "assert " in cells
        # So it runs alone: the whole, in the slow run, shows that each name does what it should.
        undefined = [sys.executable, "-m", "ruff", "check", "--isolated", "--quiet", "--select", "F821", "-"]
        done = subprocess.run(undefined, input=cells, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.slow
def test_the_whole_runs_in_order(tmp_path):
    run([str(FILE)], tmp_path)
