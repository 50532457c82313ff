"""train.py: parse the flags, compose, train."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from moe_jax.cli import parse_on_recipe
from moe_jax.commands.startup import check_limits, use_huge_pages
from moe_jax.config import Config
from moe_jax.config.bounds import LocalFolder
from moe_jax.config.rules import check
from moe_jax.errors import show


def main() -> None:
    config, workdir = parse_train(sys.argv[1:])
    check_limits()
    use_huge_pages()
    show("stdout")

    from moe_jax.commands.training import train

    train(config, workdir)


@dataclass(frozen=True)
class TrainCommand:
    """Train a model; run the same command again to go on where it stopped.

    Together with --config, --help shows the recipe's values.
    """

    config: str
    """Recipe to start from: a file with get_config(), such as configs/moe.py; the flags below change it."""
    workdir: str | None = None
    """Run directory; None: runs/ and the recipe's name."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def parse_train(arguments: list[str]) -> tuple[Config, Path]:
    """The checked configuration and the run directory that ``train.py``'s arguments ask for. Raises UserError."""
    command = parse_on_recipe(TrainCommand, arguments)
    workdir = Path("runs") / Path(command.config).stem
    if command.workdir is not None:
        LocalFolder("mount the bucket, or copy the run directory there afterwards")("--workdir", command.workdir)
        workdir = Path(command.workdir)
    return check(command.settings), workdir
