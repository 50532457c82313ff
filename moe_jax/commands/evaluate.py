"""moe_jax.evaluate: parse, find the run, score it."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from moe_jax.cli import check_run
from moe_jax.commands.startup import use_huge_pages
from moe_jax.config.rules import check_input


def main(description: str) -> None:
    from moe_jax.runs.layout import RunDirectory, latest_run

    arguments = parse_evaluate(sys.argv[1:], description)
    use_huge_pages()
    if arguments.workdir is not None:
        run = RunDirectory(Path(arguments.workdir))
    else:
        run = latest_run()
        print(f"note: scoring {run.path}, the run that changed last", file=sys.stderr)
    config = run.load_config()  # what is wrong with it is told before jax is loaded

    from moe_jax.runs.metrics_file import finite
    from moe_jax.sampling.engine import is_causal
    from moe_jax.training.evaluate import evaluate_run

    if not is_causal(config.model):
        print("note: experts that choose have seen later tokens too, and drop some", file=sys.stderr)

    scores = evaluate_run(run, arguments.data, arguments.split, arguments.checkpoint)
    print(json.dumps(finite(scores), allow_nan=False))


@dataclass(frozen=True)
class EvaluateCommand:
    workdir: str | None = None
    """Run directory of the model; None: the run under runs/ that changed last."""
    data: str | None = None
    """Text or prepared folder to score instead of the run's own; a text is tokenized and split as the run's was."""
    split: Literal["val", "train", "all"] = "val"
    """Which part of it: the held-out one, the one to train on, or both, as for a text that was not trained on."""
    checkpoint: Literal["best", "newest"] = "best"
    """Which checkpoint: best (lowest validation loss; the newest where none was evaluated) or newest."""


def parse_evaluate(arguments: list[str], description: str) -> EvaluateCommand:
    """What ``moe_jax.evaluate``'s arguments ask for. Raises UserError."""
    command = tyro.cli(EvaluateCommand, args=arguments, description=description, prog="python -m moe_jax.evaluate")
    check_run(command.workdir)
    if command.data is not None:
        check_input("--data", command.data)
    return command
