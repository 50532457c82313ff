"""Block sizes of the grouped products, for each kernel and shape: a stage of ``gpu.py``."""

import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from gpu_session import Row, Session, Shape, seconds_of, text_of

from moe_jax.model.mlp import ExpertWeights
from moe_jax.model.moe.kernels import pallas
from moe_jax.model.moe.kernels.pallas import Blocks

Kind = Literal["hidden", "down", "rows_gradient", "hidden_gradient", "weight_gradient"]
SECONDS = 75.0
"""What the sweep may take, compilation included; each kind and shape gets an equal part of what is left of it."""
BEST = 3
"""Candidates of each kind and shape that are reported."""


CANDIDATES = [
    Blocks(128, 128, 64, 8, 3),
    Blocks(128, 128, 64, 4, 3),
    Blocks(128, 256, 64, 8, 3),
    Blocks(128, 128, 32, 8, 4),
    Blocks(128, 128, 32, 4, 4),
    Blocks(128, 128, 64, 8, 4),
    Blocks(128, 256, 32, 8, 4),
    Blocks(128, 64, 64, 4, 4),
    Blocks(256, 128, 64, 8, 3),
    Blocks(64, 128, 64, 4, 4),
]
"""The likeliest first, for a sweep that is cut."""


def grouped(kind: Kind, shape: Shape, num_tokens: int, blocks: Blocks) -> tuple[Callable, tuple, int]:
    """(a compiled kernel, its arguments, its floating-point operations), on bfloat16 rows in equal shares."""
    D, F, E, K = shape
    R = num_tokens * K // E
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*sizes: int) -> Any:
        return jax.random.normal(next(keys), sizes, jnp.bfloat16) / sizes[-1] ** 0.5

    expert_I = jnp.repeat(jnp.arange(E), R // blocks.rows)
    up, gate, down = normal(E, D, F), normal(E, D, F), normal(E, F, D)
    x, dup, dgate = normal(E * R, D), normal(E * R, F), normal(E * R, F)
    weight_S = jnp.ones(E * R)
    weights = ExpertWeights(up, down, gate)
    one = 2 * E * R * D * F
    found: dict[Kind, tuple[Callable, tuple, int]] = {
        "hidden": (lambda w, x: pallas.hidden(expert_I, x, w, "swiglu", blocks, keep=True), (weights, x), 2 * one),
        "down": (lambda h, w: pallas.product(expert_I, (h,), (w,), None, blocks), (dup, down), one),
        "rows_gradient": (
            lambda du, dg, u, g: pallas.product(expert_I, (du, dg), (u, g), None, blocks, transposed=True),
            (dup, dgate, up, gate),
            2 * one,
        ),
        "hidden_gradient": (
            lambda dy, w, u, g: pallas.hidden_gradient(expert_I, dy, w, weight_S, (u, g), "swiglu", blocks),
            (x, down, dup, dgate),
            one,
        ),
        "weight_gradient": (
            lambda x, du: pallas.weight_gradient(jnp.full(E, R), x, du, jnp.dtype("float32"), blocks),
            (x, dup),
            one,
        ),
    }
    function, arguments, operations = found[kind]
    return jax.jit(function), arguments, operations


def sweep(session: Session, shapes: list[Shape]) -> Iterator[Row]:
    """The best block sizes of each kind, of those that there was time for."""
    num_tokens, candidates = 16384, CANDIDATES
    if session.tiny:
        num_tokens, shapes, candidates = 64, [(64, 32, 8, 2)], [Blocks(16, 16, 16, 4, 2)]
    cases = [(shape, kind) for shape in shapes for kind in get_args(Kind)]
    end = min(time.time() + SECONDS, session.deadline)
    for number, (shape, kind) in enumerate(cases):
        until = time.time() + (end - time.time()) / (len(cases) - number)
        what = f"{kind}, D={shape[0]} F={shape[1]} E={shape[2]} K={shape[3]} T={num_tokens}"
        yield from _case(session, what, kind, shape, num_tokens, candidates, until)


def _case(
    session: Session, what: str, kind: Kind, shape: Shape, num_tokens: int, candidates: list[Blocks], until: float
) -> Iterator[Row]:
    found: list[tuple[float, int, Blocks]] = []
    failed: dict[str, str] = {}
    for blocks in candidates:
        if time.time() > until and found:
            break
        try:
            function, arguments, operations = grouped(kind, shape, num_tokens, blocks)
            found.append((seconds_of(function, arguments, turns=3), operations, blocks))
        except Exception as error:  # noqa: BLE001 - what no kernel can be compiled for is part of the answer
            failed[_name(blocks)] = text_of(error)[:100]
    for seconds, operations, blocks in sorted(found, key=lambda each: each[0])[:BEST]:
        yield {"what": f"{what}, {_name(blocks)}"} | session.speed(seconds, operations)
    tried = len(found) + len(failed)
    yield {"what": f"{what}, tried", "tried": tried, "of": len(candidates), "failed": len(failed), "why": failed}


def _name(blocks: Blocks) -> str:
    return f"{blocks.rows}x{blocks.columns}x{blocks.depth}/{blocks.warps}w{blocks.stages}s"
