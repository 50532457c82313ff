"""How long does an optimizer step take, by dispatcher and by unrolling of the loop over layers?

    python benchmarks/train_step.py [--config configs/moe.py] [--rounds 7] [--json]

Every variant trains on the same random tokens in one process; the variants take turns, and the median counts, so that
what else the machine does falls on all of them. The bound is what this machine reaches on one large float32 matrix
product, measured between the turns: ``of bound`` is the share of it that the step's useful multiplications take, those
of the K experts that a token is sent to, without padding, routing, or anything that is no matrix product.
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

from moe_jax.cli import load_recipe
from moe_jax.commands.startup import use_huge_pages
from moe_jax.config import Config, ModelConfig
from moe_jax.config.rules import check
from moe_jax.errors import UserError, run


def with_model(config: Config, moe: dict | None = None, **model: Any) -> Config:
    """``config`` with some settings of model and model.moe replaced."""
    sparse = dataclasses.replace(config.model.moe, **(moe or {}))
    return check(dataclasses.replace(config, model=dataclasses.replace(config.model, moe=sparse, **model)))


def variants(config: Config) -> dict[str, Config]:
    """What is compared, by name; the first is what the others are a ratio of."""
    periods = (config.model.num_layers - config.model.moe.first_dense) // config.model.moe.every
    dispatchers = {
        "dropless": {"dispatch": "auto", "capacity_factor": None},
        "capacity 1.25, gather": {"dispatch": "gather", "capacity_factor": 1.25},
        "capacity 1.25, einsum": {"dispatch": "einsum", "capacity_factor": 1.25},
    }
    found = {
        f"{name}, unroll {unroll}": with_model(config, moe, scan_unroll=unroll)
        for name, moe in dispatchers.items()
        for unroll in sorted({periods, 1}, reverse=True)
    }
    found[f"dropless, gather, unroll {periods}"] = with_model(
        config, {"dispatch": "gather", "capacity_factor": None}, scan_unroll=periods
    )
    found[f"dense of equal active parameters, unroll {periods}"] = with_model(
        config, {"num_experts": 0}, scan_unroll=config.model.num_layers
    )
    return found


@dataclasses.dataclass(frozen=True)
class Step:
    """An optimizer step that is compiled and has run once."""

    run: Callable[[], None]
    """One more."""
    model: ModelConfig
    """With the backend that was chosen."""
    operations: int
    """Useful ones of a step: forward and backward, with all keys of each query counted, as flops_per_token says."""
    attention: int
    """Those of them that are products of queries, keys and values."""
    num_params: int
    first_seconds: float
    """Of the compilation and the first step."""
    program_bytes: int
    """Memory that the compiled step asks for, its arguments included."""


def prepare_step(config: Config, vocab_size: int) -> Step:
    """A step of ``config`` on random tokens."""
    import jax
    import numpy as np

    from moe_jax.model.decoder import Decoder
    from moe_jax.model.machine import this_machine
    from moe_jax.model.moe.backends import for_machine
    from moe_jax.sharding.mesh import make_mesh, put_batch, use_mesh
    from moe_jax.training.flops import count_params, flops_per_token
    from moe_jax.training.optimizer import make_optimizer, make_schedule
    from moe_jax.training.state import init_state
    from moe_jax.training.step import train_step

    B, L = config.data.batch_size, config.model.context_length
    num_tokens = B // config.optimizer.accumulation_steps * L
    model = for_machine(config.model, num_tokens, train=True, machine=this_machine())
    mesh = make_mesh(config.mesh, config.model, B // config.optimizer.accumulation_steps)
    decoder = Decoder(model, vocab_size)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, config.train.num_steps))
    tokens_BL = np.random.default_rng(0).integers(0, vocab_size, (B, L + 1), dtype=np.int32)
    with use_mesh(mesh):
        state = init_state(decoder, optimizer, mesh, 0)
        batch = put_batch({"inputs": tokens_BL[:, :-1], "targets": tokens_BL[:, 1:]}, mesh)
        operations = B * L * flops_per_token(state.params, model)
        num_params, _ = count_params(state.params, model.moe)
        jax.block_until_ready(state)
        start = time.perf_counter()
        step = jax.jit(functools.partial(train_step, config, decoder, optimizer), donate_argnums=0)
        compiled = step.lower(state, batch).compile()
        state, output = compiled(state, batch)
        jax.block_until_ready(output)
        first = time.perf_counter() - start

    held = [state]

    def one_step() -> None:
        with use_mesh(mesh):
            held[0], output = compiled(held[0], batch)
            jax.block_until_ready(output)

    memory = compiled.memory_analysis()
    assert memory is not None
    size = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return Step(
        run=one_step,
        model=model,
        operations=operations,
        attention=B * L * 12 * model.num_layers * model.embed_dim * L,
        num_params=num_params,
        first_seconds=first,
        program_bytes=size - memory.alias_size_in_bytes,
    )


def product_rate(size: int = 2048) -> Callable[[], float]:
    """A function that times one float32 product of two square matrices: operations per second."""
    import jax
    import jax.numpy as jnp

    matrix = jnp.ones((size, size))
    multiply = jax.jit(jnp.matmul)
    multiply(matrix, matrix).block_until_ready()

    def rate() -> float:
        start = time.perf_counter()
        multiply(matrix, matrix).block_until_ready()
        return 2 * size**3 / (time.perf_counter() - start)

    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/moe.py"))
    parser.add_argument("--rounds", type=int, default=7, help="turns of every variant, of three steps each")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--json", action="store_true", help="one object a line instead of a table")
    arguments = parser.parse_args()
    use_huge_pages()
    config = load_recipe(arguments.config)
    if not config.model.moe.num_experts:
        raise UserError(f"--config {arguments.config} has no experts to dispatch to; name a sparse recipe")
    prepared = {name: prepare_step(each, arguments.vocab_size) for name, each in variants(config).items()}
    rate = product_rate()
    rates: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in prepared}
    for _ in range(arguments.rounds):
        rates.append(rate())
        for name, step in prepared.items():
            for _ in range(3):
                start = time.perf_counter()
                step.run()
                seconds[name].append(time.perf_counter() - start)
    bound = statistics.median(rates)
    baseline = statistics.median(next(iter(seconds.values())))
    tokens = config.data.batch_size * config.model.context_length
    rows = []
    for name, step in prepared.items():
        median = statistics.median(seconds[name])
        rows.append(
            {
                "variant": name,
                "ms_per_step": round(1000 * median, 1),
                "ratio": round(median / baseline, 2),
                "tokens_per_second": round(tokens / median),
                "of_bound": round(step.operations / median / bound, 3),
                "first_step_s": round(step.first_seconds, 1),
            }
        )
    if arguments.json:
        print("\n".join(json.dumps(row) for row in rows))
        return
    print(f"{arguments.config}, {tokens} tokens a step; bound: {bound / 1e9:.0f} GFLOP/s in one product\n")
    print("| variant | ms/step | ratio | tokens/s | of bound | first step, s |\n|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    run(main)
