"""python -m moe_jax.evaluate: parse the flags, open the run, score it."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_jax.cli import parse
from moe_jax.commands.startup import check_limits, use_huge_pages
from moe_jax.config.bounds import LocalInput, RunFolder


def main() -> None:
    arguments = parse(EvaluateCommand, sys.argv[1:], "python -m moe_jax.evaluate")
    check_limits()
    use_huge_pages()

    from moe_jax.runs.metrics_file import finite
    from moe_jax.runs.opened import open_run

    workdir = None if arguments.workdir is None else Path(arguments.workdir)
    opened = open_run(workdir, arguments.checkpoint)
    if opened.is_latest:
        print(f"note: scoring {opened.directory.path}, the run that changed last", file=sys.stderr)

    from moe_jax.commands.scoring import score  # loads jax: mistakes were reported before

    print(json.dumps(finite(score(opened, arguments.data, arguments.split)), allow_nan=False))


@dataclass(frozen=True)
class EvaluateCommand:
    """Score a trained model on text.

    Prints one JSON object: the loss in nats a token, perplexity, bits per byte and the tokens scored, each of them
    once, in consecutive windows of the training context (or in whole documents, as the model was trained), without
    noise, dropout or drops. bits_per_byte is null where unknown tokens stand for bytes that are not known, and so is
    every number that is not finite.
    """

    workdir: RunFolder | None = None
    """Run directory of the model; None: the run under runs/ that changed last."""
    data: LocalInput | None = None
    """Text or prepared folder to score instead of the run's own; a text is tokenized and split as the run's was."""
    split: Literal["val", "train", "all"] = "val"
    """Which part of it: the held-out one, the one to train on, or both, as for a text that was not trained on."""
    checkpoint: Literal["best", "newest"] = "best"
    """Which checkpoint: best (lowest validation loss; the newest where none was evaluated) or newest."""
