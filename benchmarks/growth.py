"""How do the time and the memory of an optimizer step grow with experts, layers, context and vocabulary?

    python benchmarks/growth.py [--only experts ...] [--rounds 7] [--json]

One size grows, the others stay: experts at equal active parameters, the context at equal tokens a step. All points of
an axis are steps of one process that take turns; medians count. Beside the time and its exponent, the power of the
size that it grew by since the row before, are those of the useful multiplications (as ``flops_per_token`` counts them,
all keys of each query) and of the parameters, which the optimizer reads and writes at every step whatever the tokens.
*Memory* is what the compiled step asks for, its arguments included: parameters, gradients and moments are 16 bytes a
parameter of it.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from train_step import prepare_step

from moe_jax.commands.startup import use_huge_pages
from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig
from moe_jax.config.rules import check
from moe_jax.errors import run


def shape(*, experts: int = 8, layers: int = 2, context: int = 128, tokens: int = 1024) -> Config:
    moe = MoEConfig(num_experts=experts, expert_dim=128)
    model = ModelConfig(
        context_length=context, num_layers=layers, tie_embeddings=False, scan_unroll=layers, qk_norm=True, moe=moe
    )
    data = DataConfig(batch_size=tokens // context)
    return check(Config(model, data, OptimizerConfig(schedule="constant", warmup_steps=0)))


VOCAB = 2048
AXES: dict[str, tuple[list[int], Callable[[int], tuple[Config, int]]]] = {
    "experts": ([8, 16, 32, 64, 128, 256], lambda size: (shape(experts=size), VOCAB)),
    "layers": ([1, 2, 4, 8], lambda size: (shape(layers=size), VOCAB)),
    "context": ([128, 256, 512, 1024, 2048, 4096], lambda size: (shape(context=size, tokens=4096), VOCAB)),
    "vocabulary": ([1024, 2048, 4096, 8192, 16384, 32768], lambda size: (shape(), size)),
}
"""The sizes of each axis, and the configuration and vocabulary of a size."""


def measure(axis: str, rounds: int) -> list[dict[str, Any]]:
    sizes, config_of = AXES[axis]
    steps = [prepare_step(*config_of(size)) for size in sizes]
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, mine in zip(steps, seconds, strict=True):
            for _ in range(2):
                start = time.perf_counter()
                step.run()
                mine.append(time.perf_counter() - start)
    rows: list[dict[str, Any]] = []
    found = [
        {
            "ms": 1000 * statistics.median(mine),
            "gflop": step.operations / 1e9,
            "memory_mb": step.program_bytes / 1e6,
            "parameters_m": step.num_params / 1e6,
        }
        for step, mine in zip(steps, seconds, strict=True)
    ]
    for index, (size, values) in enumerate(zip(sizes, found, strict=True)):
        row: dict[str, Any] = {axis: size}
        for name, value in values.items():
            row[name] = round(value, 1)
            before = found[index - 1][name]
            grew = math.log(value / before) / math.log(size / sizes[index - 1]) if index else None
            row[f"{name}_exponent"] = None if grew is None else round(grew, 2)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--rounds", type=int, default=7, help="turns of every size, of two steps each")
    parser.add_argument("--json", action="store_true", help="one object a line instead of tables")
    arguments = parser.parse_args()
    use_huge_pages()
    for axis in arguments.only:
        rows = measure(axis, arguments.rounds)
        if arguments.json:
            print("\n".join(json.dumps(row) for row in rows), flush=True)
            continue
        names = ["exponent" if name.endswith("exponent") else name.replace("_", " ") for name in rows[0]]
        print("\n| " + " | ".join(names) + " |\n|" + "---|" * len(names))
        for row in rows:
            print("| " + " | ".join("" if value is None else str(value) for value in row.values()) + " |", flush=True)


if __name__ == "__main__":
    run(main)
