"""docs/reference_systems.md: what it tells people to type is understood, and what it names is there."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

from moe_jax.cli import parse
from moe_jax.commands.evaluate import EvaluateCommand
from moe_jax.commands.sample import SampleCommand, parse_sample
from moe_jax.commands.train import parse_train
from moe_jax.config.fields import settings
from moe_jax.prepare.settings import parse_prepare

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
    _, workdir = parse_train(shlex.split(arguments))
    assert workdir.name in arguments


@pytest.mark.parametrize("flags", sorted({code for code in CODE if code.startswith("--") and "moe_jax" not in code}))
def test_flags_go_with_a_recipe(flags):
    given = shlex.split(flags.replace("STEPS", "100"))
    config, _ = parse_train(["--config", "configs/moe.py", *given])
    read = {name: value for name, _, value in settings(config)}
    for flag, value in itertools.pairwise(given):
        if flag.startswith("--"):
            got = read[flag.removeprefix("--").replace("-", "_")]
            assert value in got if isinstance(got, tuple) else got == type(got)(value)


@pytest.mark.parametrize("arguments", of_command("python -m moe_jax.prepare"))
def test_preparing_commands(arguments):
    assert parse_prepare(shlex.split(arguments)).out.startswith("data/")


@pytest.mark.parametrize("arguments", of_command("python sample.py"))
def test_sampling_commands(arguments):
    assert parse_sample(shlex.split(arguments)) != SampleCommand()


@pytest.mark.parametrize("arguments", of_command("python -m moe_jax.evaluate"))
def test_evaluating_commands(arguments):
    assert parse(EvaluateCommand, shlex.split(arguments)).workdir


def test_files_that_it_names_are_there():
    named = {word for code in CODE for word in re.findall(r"\b(?:configs|docs|benchmarks)/\w+\.py", code)}
    named |= {f"docs/{link}" for link in re.findall(r"\]\((\w+\.md)\)", PAGE)}
    assert len(named) > 12
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


# What the five descriptions say that they have: words of the page's row, and who has it.
FEATURES = {
    "top-k and noisy top-k routing": "01234",
    "auxiliary loss for balance": "01",
    "squared coefficient of variation": "2",
    "balance by noise alone": "3",
    "balance by capacity alone": "4",
    "expert capacity": "4",
    "input tokens dropped": "1",
    "LayerNorm, learned positions": "0134",
    "RMSNorm, rotary positions": "2",
    "a dense model": "3",
    "Kaiming initialisation": "14",
    "AdamW, warm-up, cosine": "01",
    "OneCycle": "3",
    "gradient clipping": "01",
    "gradient accumulation": "3",
    "mixed precision": "3",
    "gradient checkpointing": "3",
    "random windows": "0124",
    "epochs over documents": "3",
    "tiktoken": "01",
    "own BPE of 2,048": "3",
    "own BPE with end": "2",
    "characters": "4",
    "several corpora": "2",
    "TinyStories, 2.1 M": "3",
    "train and validation loss": "01234",
    "expert usage %": "013",
    "MLflow tracking": "0124",
    "progress bars": "01234",
    "`loss_curve.png`, heatmap": "01",
    "checkpoints at intervals": "0123",
    "end of each epoch": "3",
    "load the latest": "01",
    "top-p with temperature": "0123",
    "greedy at temperature 0": "0123",
    "generated text": "0123",
    "plain sampling": "4",
    "interactive generation": "23",
    "generation speed and memory": "3",
    "expert usage analysis": "3",
    "model summary": "234",
    "from Python in a few lines": "3",
    "CSV inputs": "2",
    "limits on the number": "3",
    "training log file": "3",
    "a notebook": "24",
    "more compute": "01234",
}


def rows_of_page():
    """(what, the numbers of the systems, how) of every row in the tables below the first."""
    lines = PAGE.split("## The model")[1].replace("\\|", "").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [
        (what, re.findall(r"\d", who.replace("S0-S4", "01234")), how) for what, who, how in cells if what != "what"
    ]


@pytest.mark.parametrize("words", FEATURES)
def test_every_feature_of_every_system_has_a_row(words):
    found = [row for row in rows_of_page() if words in row[0]]
    assert len(found) == 1
    assert set(FEATURES[words]) <= set(found[0][1])
    assert found[0][2]
