"""What does each way of keeping experts even cost, in loss and in time?

    python benchmarks/balancers.py --out runs/balancers [--steps 400] [--seeds 0 1 2] [--only 'no loss' ...]

Each balancer trains the recipe by ``train.py``, all else equal: same batches, schedule and number of steps. Losses and
loads are those of the last evaluation in ``metrics.jsonl``, so a run may share the machine with other work. A run that
is there already is not made again.

The time of a step depends on how skewed the loads are that a run has arrived at. So it is measured on the parameters
of each run's last checkpoint: all take turns in one process, on the same batches, and the median of the ratios to the
first counts.
Expert choice is left out: it looks ahead, so its loss is of another task.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from moe_jax.commands.startup import use_huge_pages
from moe_jax.commands.train import parse_train
from moe_jax.errors import UserError, run
from moe_jax.files import cache_folder
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.metrics_file import read_metrics

ROOT = Path(__file__).parents[1]
NO_LOSS = {"load-balancing-weight": 0}
SIGMOID = {"router": "sigmoid_bias", "load-balancing-weight": 0.0001}
BALANCERS: dict[str, dict[str, Any]] = {
    "sequence 0.05": {"load-balancing-weight": 0.05},
    "sequence 0.01": {"load-balancing-weight": 0.01},
    "no loss": NO_LOSS,
    **{
        f"batch {weight}": {"load-balancing-scope": "batch", "load-balancing-weight": weight}
        for weight in (0.01, 0.05, 0.1)
    },
    "importance 0.05": NO_LOSS | {"importance-weight": 0.05},
    "noisy_top_k, no loss": NO_LOSS | {"router": "noisy_top_k"},
    "switch 0.05, 4 experts of 512": {"router": "switch", "top-k": 1, "num-experts": 4, "expert-dim": 512},
    "bias by 0.001": SIGMOID,
    "bias by 0.006": SIGMOID | {"bias-update-rate": 0.006},
    "bias by quantile": SIGMOID | {"bias-update": "quantile"},
}
"""Settings of model.moe by name, that of the recipe first; the rest is the recipe's."""


def arguments_of(name: str, seed: int, arguments: argparse.Namespace) -> list[str]:
    """The arguments of train.py for one run."""
    found = ["--config", str(arguments.config), "--workdir", str(folder_of(name, seed, arguments))]
    for setting, value in BALANCERS[name].items():
        found += [f"--model.moe.{setting}", str(value)]
    found += ["--train.seed", str(seed), "--data.seed", str(seed), "--train.keep-best", "0"]
    if arguments.steps:
        for setting in ("num-steps", "eval-every", "checkpoint-every"):
            found += [f"--train.{setting}", str(arguments.steps)]
    return found


def folder_of(name: str, seed: int, arguments: argparse.Namespace) -> Path:
    return arguments.out / f"{name.replace(', ', '-').replace(' ', '-')}-{arguments.steps or 'full'}-{seed}"


def train(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The last evaluation of a run, which is made, or gone on with, if it is not finished."""
    command = [sys.executable, "train.py", *arguments_of(name, seed, arguments)]
    config, workdir = parse_train(command[2:])
    metrics = RunDirectory(workdir).metrics_file
    if not metrics.exists() or read_metrics(metrics)[-1]["step"] < config.train.num_steps:
        done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
        if done.returncode:
            raise UserError(f"train.py ended with {done.returncode} for {name}; what it printed says why")
    return next(line for line in reversed(read_metrics(metrics)) if "val/loss" in line)


def row_of(name: str, evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds; of loads the worst."""

    losses = [evaluation["val/loss"] for evaluation in evaluations]
    busiest = zip(*(evaluation["moe/layer_max_load"] for evaluation in evaluations), strict=True)
    row: dict[str, Any] = {"balancer": name, "nats": round(statistics.mean(losses), 4)}
    if len(losses) > 1:
        row["each"] = ", ".join(f"{loss:.4f}" for loss in losses)
    return row | {
        "bits_per_byte": round(statistics.mean(each["val/bits_per_byte"] for each in evaluations), 4),
        "max_load": ", ".join(f"{max(layer):.2f}" for layer in busiest),
        "dead": max(round(sum(each["moe/layer_dead_experts"])) for each in evaluations),
        "entropy": round(
            statistics.mean(statistics.mean(each["moe/layer_router_entropy"]) for each in evaluations), 3
        ),
    }


def step_of(name: str, seed: int, arguments: argparse.Namespace) -> Callable[[dict[str, Any]], None]:
    """One optimizer step on a batch, from the run's last checkpoint on."""
    import jax

    from moe_jax.prepare.cache import find_or_prepare
    from moe_jax.runs.checkpoint.save import Checkpoints, Retention
    from moe_jax.sharding.mesh import put_batch, use_mesh
    from moe_jax.training.step import train_step
    from moe_jax.training.train import resolve, restore_or_init

    config, workdir = parse_train(arguments_of(name, seed, arguments))
    setup = resolve(config, lambda: find_or_prepare(config.data, cache_folder("data")), workdir)
    with use_mesh(setup.mesh), Checkpoints(setup.run.checkpoints, setup.saved, Retention(2, 0)) as checkpoints:
        held = [restore_or_init(setup, checkpoints).state]
    step = jax.jit(functools.partial(train_step, setup.config, setup.decoder, setup.optimizer), donate_argnums=0)

    def one(batch: dict[str, Any]) -> None:
        with use_mesh(setup.mesh):
            held[0], output = step(held[0], put_batch(batch, setup.mesh))
            jax.block_until_ready(output)

    return one


def times(names: list[str], arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step of each balancer, over those of the first: medians of turns."""
    from moe_jax.data.batches import train_batches
    from moe_jax.prepare.cache import find_or_prepare

    config, _ = parse_train(["--config", str(arguments.config)])
    data = find_or_prepare(config.data, cache_folder("data"))
    steps = {name: step_of(name, arguments.seeds[0], arguments) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    # Other text than the runs began with; parameters move on a little, at the end of the schedule.
    with train_batches(data, dataclasses.replace(config.data, seed=99), config.model.context_length) as batches:
        for turn in range(arguments.rounds + 1):
            batch = next(batches)
            for name, step in steps.items():
                start = time.perf_counter()
                step(batch)
                if turn:  # the first compiles
                    seconds[name].append(time.perf_counter() - start)
    # A ratio within each turn: what else the machine does comes and goes.
    first = seconds[names[0]]
    return {
        name: statistics.median(mine / theirs for mine, theirs in zip(each, first, strict=True))
        for name, each in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/moe.py"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, help="steps of each run, the schedule's end; left out: the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", default=list(BALANCERS), choices=list(BALANCERS), metavar="BALANCER")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each balancer that are timed; 0: none")
    parser.add_argument("--json", action="store_true", help="one object a line instead of a table")
    arguments = parser.parse_args()
    use_huge_pages()
    rows = [row_of(name, [train(name, seed, arguments) for seed in arguments.seeds]) for name in arguments.only]
    if arguments.rounds:
        for name, seconds in times(arguments.only, arguments).items():
            next(row for row in rows if row["balancer"] == name)["step_time"] = round(seconds, 2)
    if arguments.json:
        print("\n".join(json.dumps(row) for row in rows))
        return
    print("| " + " | ".join(rows[0]).replace("_", " ") + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    run(main)
