"""docs/reference_systems.md: what it tells people to type is understood, and what it names is there."""

import re
import shlex
from pathlib import Path

import pytest

from moe_jax.command_line import parse_evaluate, parse_prepare, parse_sample, parse_train
from moe_jax.config import SampleConfig
from moe_jax.validation import validate_prepare

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference_systems.md").read_text()
CODE = re.findall(r"`([^`]+)`", PAGE.replace("\\|", "|"))


def of_command(name):
    return sorted({code.removeprefix(name) for code in CODE if code.startswith(name + " ")})


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("arguments", of_command("python train.py"))
def test_training_commands(arguments):
    parse_train(shlex.split(arguments))


@pytest.mark.parametrize("flags", sorted({code for code in CODE if code.startswith("--") and "moe_jax" not in code}))
def test_flags_go_with_a_recipe(flags):
    if "num-experts 0" not in flags:
        flags += " --model.moe.num-experts 8"
    parse_train(["--config", "configs/moe.py", *shlex.split(flags.replace("STEPS", "100"))])


@pytest.mark.parametrize("arguments", of_command("python -m moe_jax.data.prepare"))
def test_preparing_commands(arguments):
    assert validate_prepare(parse_prepare(shlex.split(arguments), "")).out.startswith("data/")


@pytest.mark.parametrize("arguments", of_command("python sample.py"))
def test_sampling_commands(arguments):
    parse_sample(shlex.split(arguments), SampleConfig())


@pytest.mark.parametrize("arguments", of_command("python -m moe_jax.evaluate"))
def test_evaluating_commands(arguments):
    assert parse_evaluate(shlex.split(arguments), "").workdir


def test_files_that_it_names_are_there():
    named = {word for code in CODE for word in re.findall(r"\b(?:configs|docs|benchmarks)/\w+\.py", code)}
    named |= {f"docs/{link}" for link in re.findall(r"\]\((\w+\.md)\)", PAGE)}
    assert len(named) > 12
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_system_has_every_kind_of_row():
    for part in ("## The model", "## Training", "## Text", "## After training"):
        rows = [line for line in PAGE.split(part)[1].split("\n## ")[0].splitlines() if line.startswith("| ")][1:]
        systems = " ".join(row.replace("\\|", "").split("|")[2] for row in rows).replace("S0-S4", "S0 S1 S2 S3 S4")
        assert set(re.findall(r"S\d", systems)) == {"S0", "S1", "S2", "S3", "S4"}, part
        assert all(row.replace("\\|", "").split("|")[3].strip() for row in rows)
