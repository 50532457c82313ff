"""The size of the house: the path to read, the core and the package stay as small as README.md says."""

import re
import subprocess
import sys

import pytest

from tests import house

LARGEST = {"path": 2500, "core": 10_150, "package": 16_300}


@pytest.mark.parametrize("part", LARGEST)
def test_what_is_read_stays_small(part):
    assert house.totals()[part] <= LARGEST[part]


def test_every_file_of_the_package_is_in_the_map_once():
    rows = house.CORE + house.EDGES
    total = sum(house.lines_of_rows(rows).values()) + house.lines_of("__init__.py")
    assert total == house.totals()["package"]


def test_the_script_prints_the_map_and_the_path():
    done = subprocess.run(
        [sys.executable, "-m", "tests.house"], cwd=house.ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == house.block()
    assert "| **the core** |" in done.stdout
    assert f"A path to read, {house.totals()['path']:,} lines: [axes](moe_jax/axes.py)" in done.stdout


def test_readme_has_the_map_and_the_path_with_counts_that_are_about_right():
    """Within 5 % or ten lines: small changes of code need no change of the README."""
    page = (house.ROOT / "README.md").read_text()
    written = page.split(house.BEGIN)[1].split(house.END)[0]
    number = r"\d[\d,]*"
    words, want = (" ".join(re.sub(number, "#", text).split()) for text in (written, house.block()))
    assert words == want, "run python -m tests.house --write"
    for got, now in zip(re.findall(number, written), re.findall(number, house.block()), strict=True):
        count, today = int(got.replace(",", "")), int(now.replace(",", ""))
        assert abs(count - today) <= max(10, 0.05 * today), "run python -m tests.house --write"
