"""What does a checkpoint cost a training that goes on while it is written?

    python benchmarks/checkpoints.py [--config configs/moe.py] [--steps 50] [--rounds 5] [--json]

In turns, ``--steps`` optimizer steps are made after a save has begun, and without one, and the medians compared.
``stalled`` is how long the save itself kept the steps waiting, ``slower`` how much longer the steps took while the
checkpoint was written beside them; both are shares of the steps without a save, so they are those of a run that saves
every ``--steps`` steps. ``written`` is when it was whole: copied, hashed, flushed to disk and named.
"""

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from moe_jax.cli import load_recipe
from moe_jax.commands.startup import use_huge_pages
from moe_jax.config import Config
from moe_jax.errors import run


def measure(config: Config, vocab_size: int, steps: int, rounds: int, folder: Path) -> dict[str, float]:
    """Medians over the rounds, in seconds, and shares of the time of the steps alone."""
    import jax
    import numpy as np

    from moe_jax.model.decoder import Decoder
    from moe_jax.model.machine import this_machine
    from moe_jax.model.moe.backends import for_machine
    from moe_jax.runs.checkpoint.record import Record
    from moe_jax.runs.checkpoint.save import Checkpoints, Retention
    from moe_jax.sharding.mesh import make_mesh, put_batch, use_mesh
    from moe_jax.training.optimizer import make_optimizer, make_schedule
    from moe_jax.training.state import init_state
    from moe_jax.training.step import train_step

    B, L = config.data.batch_size, config.model.context_length
    mesh = make_mesh(config.mesh, config.model, B // config.optimizer.accumulation_steps)
    num_tokens = B // config.optimizer.accumulation_steps * L
    model = for_machine(config.model, num_tokens, train=True, machine=this_machine())
    decoder = Decoder(model, vocab_size)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, config.train.num_steps))
    tokens_BL = np.random.default_rng(0).integers(0, vocab_size, (B, L + 1), dtype=np.int32)
    plain, beside, stalled, written = [], [], [], []
    with use_mesh(mesh), Checkpoints(folder, None, Retention(newest=2, best=1)) as checkpoints:
        state = init_state(decoder, optimizer, mesh, 0)
        batch = put_batch({"inputs": tokens_BL[:, :-1], "targets": tokens_BL[:, 1:]}, mesh)
        step = jax.jit(functools.partial(train_step, config, decoder, optimizer), donate_argnums=0)
        state, output = step(state, batch)
        jax.block_until_ready(output)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.checkpoint_items()))
        for number in range(2 * rounds + 1):
            start = time.perf_counter()
            if number % 2:
                checkpoints.save(Record(step=number), state.checkpoint_items())
                stalled.append(time.perf_counter() - start)
            begun = time.perf_counter()
            for _ in range(steps):
                state, output = step(state, batch)
                jax.block_until_ready(output)
            seconds = time.perf_counter() - begun
            checkpoints.wait()
            if number % 2:
                beside.append(seconds)
            elif number:  # the first turn warms up
                plain.append(seconds)
        for number in range(100, 103):
            start = time.perf_counter()
            checkpoints.save(Record(step=number), state.checkpoint_items())
            checkpoints.wait()
            written.append(time.perf_counter() - start)
    alone = statistics.median(plain)
    return {
        "megabytes": round(size / 1e6, 1),
        "steps_s": round(alone, 3),
        "stalled_s": round(statistics.median(stalled), 4),
        "written_s": round(statistics.median(written), 3),
        "stalled": round(statistics.median(stalled) / alone, 4),
        "slower": round(statistics.median(beside) / alone - 1, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/moe.py"))
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps from one save to the next")
    parser.add_argument("--rounds", type=int, default=5, help="turns with a save, and as many without")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--json", action="store_true", help="one object a line instead of a table")
    arguments = parser.parse_args()
    use_huge_pages()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            load_recipe(arguments.config), arguments.vocab_size, arguments.steps, arguments.rounds, Path(folder)
        )
    if arguments.json:
        print(json.dumps(found))
        return
    print("| " + " | ".join(found) + " |\n" + "|---" * len(found) + "|")
    print("| " + " | ".join(str(value) for value in found.values()) + " |")


if __name__ == "__main__":
    run(main)
