"""python -m moe_jax.report: parse the flags, draw the pictures of a run."""

import sys
from dataclasses import dataclass
from pathlib import Path

from moe_jax.cli import parse
from moe_jax.config.bounds import RunFolder
from moe_jax.errors import UserError


@dataclass(frozen=True)
class ReportCommand:
    """Draw loss_curve.png and expert_load.png of a run again, from its metrics.jsonl."""

    workdir: RunFolder | None = None
    """Run directory; None: the run under runs/ that changed last."""


def main() -> None:
    arguments = parse(ReportCommand, sys.argv[1:], "python -m moe_jax.report")

    from moe_jax.report.pictures import draw
    from moe_jax.runs.layout import RunDirectory, latest_run

    run = latest_run() if arguments.workdir is None else RunDirectory(Path(arguments.workdir))
    files = draw(run)
    if not files:
        raise UserError(f"{run.path} has no metrics to draw yet; train it for a while first")
    for file in files:
        print(file)
