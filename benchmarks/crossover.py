"""From how many minutes on are experts better than a dense model that trains as long?

    python benchmarks/crossover.py --out crossover.jsonl [--minutes 2 4 8 16] [--only '8 experts of 256' ...]
    python benchmarks/crossover.py --out crossover.jsonl --plot docs/crossover.png

The recipe with 8 and 32 experts, of which a token passes two, and its dense twin of the same active parameters, with
experts of two widths. Seconds are first measured, for steps of all shapes in turns in one process, and turned into
numbers of steps; the losses of so many steps do not depend on what else the machine does. ``--step-seconds`` names the
time of a step of ``8 experts of 256`` on an idle machine; the other shapes keep their ratio to it.

The schedule is wsd, constant up to a fall over the last fifth: so the run of each budget is a branch of one trunk, the
same steps as ``train.py --optimizer.schedule wsd`` makes with as many. Every result is a line of ``--out``, and what
is there is not made again; the trunk's state lies beside it, so a run that was stopped goes on.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from train_step import prepare_step, with_model

from moe_jax.cli import load_recipe
from moe_jax.commands.startup import use_huge_pages
from moe_jax.config import Config
from moe_jax.config.rules import check
from moe_jax.errors import UserError, run
from moe_jax.files import atomic_file, cache_folder

RECIPE = Path(__file__).parents[1] / "configs/moe.py"
SAVE_EVERY = 250
"""Steps of the trunk after which its state is saved."""


@dataclasses.dataclass(frozen=True)
class Shape:
    experts: int
    """0: dense."""
    width: int
    """Of an expert; the dense MLP is as wide as the two that a token passes."""
    optimizer: str = "adamw"

    @property
    def name(self) -> str:
        kind = f"{self.experts} experts of {self.width}" if self.experts else f"dense, {2 * self.width}"
        return kind + (f", {self.optimizer}" if self.optimizer != "adamw" else "")

    def config(self, num_steps: int) -> Config:
        config = with_model(load_recipe(RECIPE), {"num_experts": self.experts, "expert_dim": self.width})
        optimizer = dataclasses.replace(
            config.optimizer,
            name=self.optimizer,  # pyrefly: ignore[bad-argument-type]
            schedule="wsd",
            decay_steps=num_steps,
        )
        train = dataclasses.replace(config.train, num_steps=num_steps)
        return check(dataclasses.replace(config, optimizer=optimizer, train=train))


SHAPES = [Shape(experts, width) for width in (256, 128) for experts in (8, 0, 32)]
SHAPES += [Shape(experts, 256, "muon") for experts in (8, 0)]
BY_NAME = {shape.name: shape for shape in SHAPES}


def step_seconds(rounds: int) -> dict[str, float]:
    """Median seconds of an optimizer step of every shape, in turns, from the ratios to the first in each turn."""
    steps = [prepare_step(shape.config(1000), 2048) for shape in SHAPES]
    turns: list[list[float]] = []
    for _ in range(rounds):
        turns.append([])
        for step in steps:
            start = time.perf_counter()
            step.run()
            step.run()
            turns[-1].append((time.perf_counter() - start) / 2)
    first = statistics.median(turn[0] for turn in turns)
    return {
        shape.name: first * statistics.median(turn[index] / turn[0] for turn in turns)
        for index, shape in enumerate(SHAPES)
    }


class Results:
    """The lines of ``--out``."""

    def __init__(self, file: Path):
        self.file = file
        self.rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.file.open("a") as stream:
            print(json.dumps(row), file=stream)

    def seconds(self) -> dict[str, float]:
        return {row["shape"]: row["seconds"] for row in self.rows if "seconds" in row}

    def losses(self, name: str) -> dict[float, dict[str, Any]]:
        """By minutes."""
        return {row["minutes"]: row for row in self.rows if row["shape"] == name and "nats" in row}


class Trunk:
    """The training of one shape, at a constant rate up to each budget's fall."""

    def __init__(self, shape: Shape, most_steps: int, file: Path):
        import flax.serialization
        import jax

        from moe_jax.prepare.cache import find_or_prepare
        from moe_jax.training.state import init_state
        from moe_jax.training.step import eval_step
        from moe_jax.training.train import resolve

        self.shape, self.file, self.most_steps = shape, file, most_steps
        config = shape.config(most_steps)
        self.setup = resolve(
            config, lambda: find_or_prepare(config.data, cache_folder("data")), file.with_suffix(".run")
        )
        self.eval_step = jax.jit(functools.partial(eval_step, self.setup.eval_decoder))
        self.new = functools.partial(
            init_state, self.setup.decoder, self.setup.optimizer, self.setup.mesh, config.train.seed
        )
        self.to_bytes, self.from_bytes = flax.serialization.to_bytes, flax.serialization.from_bytes

    def state(self) -> Any:
        """As it was saved last; a new one at the start."""
        import jax

        new = self.new()
        if not self.file.exists():
            return new
        saved = self.from_bytes(new, self.file.read_bytes())
        return jax.tree.map(lambda value, like: jax.device_put(value, like.sharding), saved, new)

    def steps(self, state: Any, stop: int, num_steps: int, save: Callable[[Any], None] | None) -> Any:
        """``state`` at step ``stop`` of a run of ``num_steps``."""
        import jax

        from moe_jax.data.batches import train_batches
        from moe_jax.sharding.mesh import put_batch
        from moe_jax.training.optimizer import make_optimizer, make_schedule
        from moe_jax.training.step import train_step

        config, mesh = self.shape.config(num_steps), self.setup.mesh
        optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, num_steps))
        step = jax.jit(functools.partial(train_step, config, self.setup.decoder, optimizer), donate_argnums=0)
        first = int(state.step)
        with train_batches(self.setup.dataset, config.data, config.model.context_length, start=first) as batches:
            for done in range(first + 1, stop + 1):
                state, output = step(state, put_batch(next(batches), mesh))
                if done % SAVE_EVERY == 0 or done == stop:
                    print(f"{self.shape.name}: step {done} of {num_steps}, {float(output.loss):.4f}", file=sys.stderr)
                    if save is not None:
                        save(state)
        return state

    def save(self, state: Any) -> None:
        with atomic_file(self.file) as unfinished:
            unfinished.write_bytes(self.to_bytes(state))

    def run_of(self, num_steps: int) -> dict[str, Any]:
        """The evaluation of a run of ``num_steps``; the trunk is then at the beginning of its fall."""
        from moe_jax.sharding.mesh import use_mesh
        from moe_jax.training.evaluate import bits_per_byte, evaluate, joined
        from moe_jax.training.metrics import routing_by_layer

        falls_at = num_steps - round(self.setup.config.optimizer.decay_fraction * num_steps)
        data, config = self.setup.dataset, self.setup.config
        with use_mesh(self.setup.mesh):
            state = self.state()
            if int(state.step) > falls_at:  # of other budgets
                state = self.new()
            state = self.steps(state, falls_at, self.most_steps, self.save)
            state = self.steps(state, num_steps, num_steps, None)
            evaluation = joined(
                evaluate(
                    self.eval_step,
                    state.variables,
                    data,
                    "val",
                    self.setup.mesh,
                    mode=config.data.mode,
                    context_length=config.model.context_length,
                    batch_size=config.data.batch_size,
                ).values()
            )
        found: dict[str, Any] = {
            "nats": round(evaluation.loss, 4),
            "bits_per_byte": round(bits_per_byte(evaluation, data.splits("val")) or 0.0, 4),
        }
        if evaluation.routing is not None:
            found["max_load"] = [round(load, 3) for load in routing_by_layer(evaluation.routing)["moe/layer_max_load"]]
        return found


def train(shape: Shape, minutes: list[float], results: Results) -> None:
    """Adds what is missing of ``shape``: a line for each budget."""
    seconds, done = results.seconds()[shape.name], results.losses(shape.name)
    missing = [budget for budget in sorted(minutes) if budget not in done]
    if not missing:
        return
    steps = {budget: round(60 * budget / seconds) for budget in minutes}
    file = results.file.with_name(f"{results.file.stem}-{shape.name.replace(', ', '-').replace(' ', '-')}.trunk")
    trunk = Trunk(shape, max(steps.values()), file)
    for budget in missing:
        row = {"shape": shape.name, "minutes": budget, "steps": steps[budget], **trunk.run_of(steps[budget])}
        results.add(row)
        print(json.dumps(row), flush=True)
    file.unlink()


def plot(results: Results, picture: Path) -> None:
    """Bits per byte by minutes, a panel for each width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, width in zip(panels, (256, 128), strict=True):
        for shape in SHAPES:
            losses = sorted(results.losses(shape.name).items())
            if shape.width == width and losses:
                values = [row["bits_per_byte"] for _, row in losses]
                style = ("s" if shape.experts else "o") + ("--" if shape.optimizer == "muon" else "-")
                axes.plot([budget for budget, _ in losses], values, style, markersize=4, label=shape.name)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="minutes in steps", title=f"experts of {width}, dense of {2 * width}")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("validation, bits per byte")
    figure.savefig(picture, dpi=120)


def table(results: Results, minutes: list[float]) -> None:
    print("| shape | ms a step | " + " | ".join(f"{budget:g} min" for budget in minutes) + " |")
    print("|---" * (2 + len(minutes)) + "|")
    for shape in SHAPES:
        if losses := results.losses(shape.name):
            cells = [f"{losses[budget]['bits_per_byte']:.3f}" if budget in losses else "" for budget in minutes]
            print(f"| {shape.name} | {1000 * results.seconds()[shape.name]:.0f} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="lines of results; those that are there are kept")
    parser.add_argument("--minutes", type=float, nargs="+", default=[2.0, 4.0, 8.0, 16.0])
    parser.add_argument("--only", nargs="+", default=list(BY_NAME), choices=list(BY_NAME), metavar="SHAPE")
    parser.add_argument("--rounds", type=int, default=15, help="turns in which the seconds of a step are measured")
    parser.add_argument("--step-seconds", type=float, help="of the first shape; left out: as measured")
    parser.add_argument("--plot", type=Path, help="draw what is there, and train nothing")
    arguments = parser.parse_args()
    use_huge_pages()
    results = Results(arguments.out)
    if arguments.plot:
        if not any("nats" in row for row in results.rows):
            raise UserError(f"--out {arguments.out} must have losses to plot, got none; train first")
        plot(results, arguments.plot)
    else:
        if not results.seconds():
            seconds = step_seconds(arguments.rounds)
            scale = (arguments.step_seconds or seconds[SHAPES[0].name]) / seconds[SHAPES[0].name]
            for name, each in seconds.items():
                results.add({"shape": name, "seconds": round(scale * each, 4), "measured": round(each, 4)})
        for name in arguments.only:
            train(BY_NAME[name], arguments.minutes, results)
    table(results, arguments.minutes)


if __name__ == "__main__":
    run(main)
