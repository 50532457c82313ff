"""The size of the house: the path to read, the core and the package stay as small as README.md says."""

import subprocess
import sys

import pytest

from tests import house

LARGEST = {"path": 2500, "core": 7800, "package": 12000}


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
