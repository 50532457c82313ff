"""How fast are tokens drawn, and in how much memory, with the cache of keys and values and without it?

    python benchmarks/sampling.py [--batch 1 32] [--new-tokens 64] [--workdir runs/moe] [--json]

A new model of the given shape and the dense one of equal active width continue a prompt of half the context, by the
prefill and the decode loop of the package; or a run's own model does. *Without a cache* is the loop that comes to mind
first: for each token a full forward pass of the last tokens, at one padded shape, the context, under ``jax.jit``. All
variants take turns in one process and medians count, of the whole way from prompt to last token. *First token* is the
time until it is known. *Peak* is the largest resident memory of a process that does nothing else.
"""

import argparse
import dataclasses
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from moe_jax.command import UserError, run
from moe_jax.config import Config, ModelConfig, MoEConfig
from moe_jax.runs.layout import RunDirectory
from moe_jax.validation import validate

SHAPE = ("layers", "width", "heads", "experts", "top_k", "expert_width", "context", "vocab_size")
MB = 1e6


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    """Its name in the table."""
    config: ModelConfig
    vocab_size: int | None
    """None: as the tokenizer of the run."""
    workdir: str | None
    """Of a trained run; None: new parameters."""
    batch: int
    prompt_tokens: int
    new_tokens: int


def cases(arguments: argparse.Namespace) -> list[Case]:
    """Each model with each batch. Raises UserError for a shape that cannot be."""
    if arguments.workdir:
        models = {arguments.workdir: RunDirectory(Path(arguments.workdir)).load_config().model}
    else:
        moe = MoEConfig(arguments.experts, arguments.top_k, arguments.expert_width)
        sparse = ModelConfig(
            num_layers=arguments.layers,
            embed_dim=arguments.width,
            num_heads=arguments.heads,
            context_length=arguments.context,
            moe=moe,
        )
        dense = dataclasses.replace(sparse, moe=dataclasses.replace(moe, num_experts=0))
        name = f"{arguments.experts} experts of {arguments.expert_width}, top-{arguments.top_k}"
        models = {name: sparse, f"dense of {arguments.top_k * arguments.expert_width}": dense}
    found = []
    for name, model in models.items():
        validate(Config(model=model))
        prompt = max(1, model.context_length // 2)
        if model.positions == "learned" and prompt + arguments.new_tokens > model.context_length + 1:
            raise UserError(
                f"--new-tokens must be at most {model.context_length + 1 - prompt} with learned positions and a "
                f"context of {model.context_length}, got {arguments.new_tokens}; lower it"
            )
        vocab_size = None if arguments.workdir else arguments.vocab_size
        for batch in arguments.batch:
            found.append(Case(name, model, vocab_size, arguments.workdir, batch, prompt, arguments.new_tokens))
    return found


def model_of(case: Case) -> tuple[Any, Any]:
    """(unstacked decoder, its variables)."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from moe_jax.model.decoder import Decoder, Variables, initial_expert_bias, unstack
    from moe_jax.sampling.generator import load_generator

    if case.workdir:
        generator, variables = load_generator(RunDirectory(Path(case.workdir)), "best")
        decoder = Decoder(generator.config, generator.tokenizer.vocab_size, unstacked=True)
        return decoder, jax.jit(lambda variables: unstack(variables, generator.config))(variables)
    assert case.vocab_size is not None
    decoder = Decoder(case.config, case.vocab_size, unstacked=True)
    params = jax.jit(decoder.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return decoder, Variables(nn.unbox(params), initial_expert_bias(case.config))


Draw = Callable[[int], None]
"""Draws so many tokens after the prompt."""


def with_cache(case: Case, decoder: Any, variables: Any) -> Draw:
    """The package's own way, in the chunks in which a text is streamed."""
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np

    from moe_jax.sampling.decode import CHUNK, decode, prefill

    first = jax.jit(functools.partial(prefill, decoder))
    # No token is the end, so that every run draws all.
    more = jax.jit(functools.partial(decode, decoder, end_token=-1), donate_argnames="state")
    prompt_BL, rows, settings = arguments_of(case, decoder)

    def draw(num_tokens: int) -> None:
        state = first(variables, prompt_BL, rows)
        index = 0
        while index < num_tokens:
            index = min(num_tokens, index + CHUNK) if index else 1
            drawn, state = more(variables, state, rows, settings, jnp.asarray(index, jnp.int32))
            np.asarray(drawn.tokens_BS)

    return draw


def without_cache(case: Case, decoder: Any, variables: Any) -> Draw:
    """A full forward pass of the last tokens for each new one."""
    import jax
    import jax.numpy as jnp

    from moe_jax.model.decoder import forward
    from moe_jax.sampling.decode import draw as draw_token

    M = decoder.config.context_length
    prompt_BL, rows, settings = arguments_of(case, decoder)
    length = rows.prompt_length_B[0]

    @jax.jit
    def step(variables: Any, window_BM: Any, count: Any) -> Any:
        logits_BMV = forward(decoder, variables, window_BM).logits_BLV
        logits_BV = jnp.take(logits_BMV, jnp.minimum(count, M) - 1, axis=1)
        token_B = draw_token(logits_BV, settings, rows.sample_B, jnp.full(case.batch, count))
        # In a full window the oldest token gives way.
        moved_BM = jnp.where(count < M, window_BM, jnp.roll(window_BM, -1, axis=1))
        return jax.lax.dynamic_update_index_in_dim(moved_BM, token_B, jnp.minimum(count, M - 1), axis=1)

    def draw(num_tokens: int) -> None:
        window_BM = jnp.pad(prompt_BL, ((0, 0), (0, M - prompt_BL.shape[1])))
        for index in range(num_tokens):
            window_BM = step(variables, window_BM, length + index)
        window_BM.block_until_ready()

    return draw


def arguments_of(case: Case, decoder: Any) -> tuple[Any, Any, Any]:
    """(prompts [B, L], rows, settings of the draw)."""
    import jax
    import jax.numpy as jnp

    from moe_jax.sampling.decode import Rows, Settings

    shape = (case.batch, case.prompt_tokens)
    prompt_BL = jax.random.randint(jax.random.key(1), shape, 0, decoder.vocab_size, jnp.int32)
    settings = Settings(
        seed=jnp.zeros((), jnp.uint32),
        temperature=jnp.asarray(0.8, jnp.float32),
        top_k=jnp.asarray(decoder.vocab_size, jnp.int32),
        top_p=jnp.asarray(0.95, jnp.float32),
        min_p=jnp.asarray(0.0, jnp.float32),
        repetition_penalty=jnp.asarray(1.0, jnp.float32),
        is_greedy=False,
        has_penalty=False,
    )
    rows = Rows(
        prompt_length_B=jnp.full(case.batch, case.prompt_tokens, jnp.int32),
        sample_B=jnp.arange(case.batch, dtype=jnp.int32),
        num_tokens_B=jnp.full(case.batch, 2**30, jnp.int32),
    )
    return prompt_BL, rows, settings


WAYS = {"with": with_cache, "without": without_cache}


def peak_bytes(case: Case | None, way: str) -> int:
    """The largest resident memory of this process once it has drawn a text; without a case, once jax has started."""
    import jax

    if case is None:
        jax.numpy.zeros(1).block_until_ready()
    else:
        WAYS[way](case, *model_of(case))(case.new_tokens)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peaks(chosen: list[Case]) -> tuple[int, list[dict[str, int]]]:
    """(bytes of Python and jax alone, peak bytes of each case by way), each from a process of its own.

    To be called while this process is small: on Linux a new process starts with its parent's size as its peak.
    """
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, maxtasksperchild=1) as pool:
        alone = pool.apply(peak_bytes, (None, ""))
        return alone, [{way: pool.apply(peak_bytes, (case, way)) for way in WAYS} for case in chosen]


def seconds(chosen: list[Case], rounds: int) -> list[dict[str, Any]]:
    """Of each case the medians of its ways and of the first token, and the bytes of its parameters and cache."""
    import jax

    from moe_jax.model.decoder import init_caches

    found, draws = [], []
    for case in chosen:
        decoder, variables = model_of(case)
        caches = jax.eval_shape(
            lambda case=case, config=decoder.config: init_caches(config, case.batch, config.context_length)
        )
        sizes = [
            sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) for tree in (variables, caches)
        ]
        found.append({"parameters": sizes[0], "cache": sizes[1]})
        ways = {way: (make(case, decoder, variables), case.new_tokens) for way, make in WAYS.items()}
        draws.append({**ways, "first": (ways["with"][0], 1)})
    taken: list[dict[str, list[float]]] = [{name: [] for name in each} for each in draws]
    for turn in range(rounds + 1):  # the first compiles
        for times, each in zip(taken, draws, strict=True):
            for name, (draw, num_tokens) in each.items():
                start = time.perf_counter()
                draw(num_tokens)
                if turn:
                    times[name].append(time.perf_counter() - start)
    medians = [{name: statistics.median(each) for name, each in times.items()} for times in taken]
    return [sizes | times for sizes, times in zip(found, medians, strict=True)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for name, default in zip(SHAPE, (8, 128, 8, 8, 2, 512, 32, 2048), strict=True):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--workdir", help="a trained run, whose shape and parameters are taken")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="texts at a time")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="turns of every variant")
    parser.add_argument("--json", action="store_true", help="one object a line instead of a table")
    arguments = parser.parse_args()
    for name, value in (
        ("--batch", min(arguments.batch)),
        ("--new-tokens", arguments.new_tokens),
        ("--rounds", arguments.rounds),
        ("--vocab-size", arguments.vocab_size),
    ):
        if value < 1:
            raise UserError(f"{name} must be positive, got {value}; raise it")
    changed = [name for name in SHAPE if getattr(arguments, name) != parser.get_default(name)]
    if arguments.workdir and changed:
        flag = "--" + changed[0].replace("_", "-")
        raise UserError(f"--workdir takes the shape of its run, got {flag} too; leave one of them out")
    return arguments


def main() -> None:
    arguments = parse()
    chosen = cases(arguments)
    alone, peak = peaks(chosen)
    rows = []
    for case, by_way, times in zip(chosen, peak, seconds(chosen, arguments.rounds), strict=True):
        tokens = case.batch * case.new_tokens
        rows.append(
            {
                "model": case.model,
                "batch": case.batch,
                "tokens_per_second": round(tokens / times["with"]),
                "without_cache": round(tokens / times["without"]),
                "ratio": round(times["without"] / times["with"], 1),
                "first_token_ms": round(1000 * times["first"], 1),
                "parameters_mb": round(times["parameters"] / MB, 1),
                "cache_mb": round(times["cache"] / MB, 2),
                "peak_mb": round(by_way["with"] / MB),
                "peak_without_cache_mb": round(by_way["without"] / MB),
            }
        )
    if arguments.json:
        print("\n".join(json.dumps(row) for row in rows))
        return
    case, model = chosen[0], chosen[0].config
    print(f"{model.num_layers} layers of width {model.embed_dim}, context {model.context_length}; ", end="")
    print(f"{case.new_tokens} new tokens after {case.prompt_tokens}; Python and jax alone: {alone / MB:.0f} MB\n")
    columns = ("model", "batch", "new tokens/s", "without a cache", "ratio", "first token, ms", "parameters, MB")
    print("| " + " | ".join((*columns, "cache, MB", "peak, MB", "peak without a cache, MB")) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    run(main)
