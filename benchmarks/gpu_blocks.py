"""Block sizes of the grouped products, for each kernel and shape: a stage of ``gpu.py``."""

import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from gpu_session import Row, Session, Shape, seconds_of, text_of

from moe_jax.model.mlp import ExpertWeights
from moe_jax.model.moe.kernels import grouped
from moe_jax.model.moe.kernels.grouped import Blocks

Kind = Literal[
    "hidden", "down", "rows_gradient", "hidden_gradient", "weight_gradient", "gather", "activation_gradient"
]
"""The last two have no blocks to choose."""
SECONDS = 75.0
"""What the sweep may take, compilation included; each kind and shape gets an equal part of what is left of it."""
BEST = 3
"""Candidates of each kind and shape that are reported."""


_PRODUCTS = [
    Blocks(128, 256, 64, 8, 3),
    Blocks(128, 128, 64, 8, 3),
    Blocks(128, 128, 64, 8, 4),
    Blocks(128, 128, 64, 4, 3),
]
CANDIDATES: dict[Kind, list[Blocks]] = {
    "hidden": [
        Blocks(128, 128, 64, 8, 3),
        Blocks(128, 128, 64, 8, 4),
        Blocks(128, 64, 64, 4, 4),
        Blocks(128, 64, 64, 8, 4),
        Blocks(128, 128, 32, 8, 4),
        Blocks(64, 128, 64, 4, 4),
    ],
    "down": _PRODUCTS,
    "hidden_gradient": _PRODUCTS,
    "rows_gradient": _PRODUCTS,
    "weight_gradient": [
        Blocks(128, 256, 64, 8, 3),
        Blocks(128, 128, 64, 8, 3),
        Blocks(256, 128, 64, 8, 3),
        Blocks(128, 128, 64, 8, 4),
    ],
}
"""The likeliest first, for a sweep that is cut."""


class Operands(NamedTuple):
    """What the kernels of one layer read: rows that lie sorted by expert, as many for each."""

    size_E: jax.Array
    x_SD: jax.Array
    up_SF: jax.Array
    gate_SF: jax.Array
    weights: ExpertWeights


def operands(shape: Shape, rows: int, dtype: str = "bfloat16") -> Operands:
    """Random ones, of ``rows`` an expert."""
    D, F, E, _ = shape
    keys = iter(jax.random.split(jax.random.key(0), 6))

    def normal(*sizes: int) -> jax.Array:
        return jax.random.normal(next(keys), sizes, dtype) / sizes[-1] ** 0.5

    weights = ExpertWeights(normal(E, D, F), normal(E, F, D), normal(E, D, F))
    S = E * rows
    return Operands(jnp.full(E, rows), normal(S, D), normal(S, F), normal(S, F), weights)


def kernel(kind: Kind, blocks: Blocks) -> Callable[[Operands], Any]:
    """One kernel as a function of what there is to read."""

    def call(of: Operands) -> Any:
        E, S, weights = of.size_E.size, len(of.x_SD), of.weights
        expert_I = jnp.repeat(jnp.arange(E), S // E // blocks.rows)
        kept, gate_EDF = (of.up_SF, of.gate_SF), weights.w_gate_EDF
        assert gate_EDF is not None
        if kind == "hidden":
            return grouped.hidden(expert_I, of.x_SD, weights, "swiglu", blocks, keep=True)
        if kind == "down":
            return grouped.product(expert_I, (of.up_SF,), (weights.w_down_EFD,), None, blocks)
        if kind == "rows_gradient":
            matrices = (weights.w_up_EDF, gate_EDF)
            return grouped.product(expert_I, kept, matrices, None, blocks, transposed=True)
        if kind == "gather":
            return grouped.gather(of.x_SD, jnp.arange(S)[::-1])
        if kind == "activation_gradient":
            return grouped.activation_gradient(of.up_SF, jnp.ones(S), kept, "swiglu")
        if kind == "hidden_gradient":
            return grouped.product(expert_I, (of.x_SD,), (weights.w_down_EFD,), None, blocks, transposed=True)
        return grouped.weight_gradient(of.size_E, of.x_SD, of.up_SF, jnp.dtype("float32"), blocks)

    return call


def sweep(session: Session, shapes: list[Shape]) -> Iterator[Row]:
    """The best block sizes of each kind, of those that there was time for."""
    num_tokens, candidates = 16384, CANDIDATES
    if session.tiny:
        num_tokens, shapes = 64, [(64, 32, 8, 2)]
        candidates = {kind: [Blocks(16, 16, 16, 4, 2)] for kind in CANDIDATES}
    cases = [(shape, kind) for shape in shapes for kind in candidates]
    end = min(time.time() + SECONDS, session.deadline)
    for number, (shape, kind) in enumerate(cases):
        until = time.time() + (end - time.time()) / (len(cases) - number)
        what = f"{kind}, D={shape[0]} F={shape[1]} E={shape[2]} K={shape[3]} T={num_tokens}"
        yield from _case(session, what, kind, shape, num_tokens, candidates[kind], until)


def _case(
    session: Session, what: str, kind: Kind, shape: Shape, num_tokens: int, candidates: list[Blocks], until: float
) -> Iterator[Row]:
    D, F, E, K = shape
    of = operands(shape, num_tokens * K // E)
    operations = 2 * num_tokens * K * D * F * (2 if kind in ("hidden", "rows_gradient") else 1)
    found: list[tuple[float, Blocks]] = []
    failed: dict[str, str] = {}
    for blocks in candidates:
        if time.time() > until and found:
            break
        try:
            found.append((seconds_of(jax.jit(kernel(kind, blocks)), (of,), turns=3), blocks))
        except Exception as error:  # noqa: BLE001 - what no kernel can be compiled for is part of the answer
            failed[_name(blocks)] = text_of(error)[:100]
    for seconds, blocks in sorted(found, key=lambda each: each[0])[:BEST]:
        yield {"what": f"{what}, {_name(blocks)}"} | session.speed(seconds, operations)
    tried = len(found) + len(failed)
    yield {"what": f"{what}, tried", "tried": tried, "of": len(candidates), "failed": len(failed), "why": failed}


def _name(blocks: Blocks) -> str:
    return f"{blocks.rows}x{blocks.columns}x{blocks.depth}/{blocks.warps}w{blocks.stages}s"
