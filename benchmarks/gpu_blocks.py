"""Block sizes of the grouped products, for each kind of product and shape: a stage of ``gpu.py``.

All that knows the kernels is ``grouped``.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from gpu_session import Row, Session, Shape, seconds_of, text_of

Kind = Literal["up_gate", "down", "input_gradient", "weight_gradient"]
SECONDS = 75.0
"""What the sweep may take, compilation included; each kind and shape gets an equal part of what is left of it."""
BEST = 3
"""Candidates of each kind and shape that are reported."""


@dataclass(frozen=True)
class Blocks:
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


CANDIDATES = [
    Blocks(128, 128, 64, 8, 3),
    Blocks(128, 128, 64, 4, 3),
    Blocks(128, 256, 64, 8, 3),
    Blocks(128, 128, 64, 8, 4),
    Blocks(128, 256, 64, 8, 4),
    Blocks(256, 128, 64, 8, 3),
    Blocks(128, 128, 128, 8, 2),
    Blocks(128, 128, 32, 4, 4),
    Blocks(64, 256, 64, 4, 3),
    Blocks(64, 128, 64, 4, 4),
    Blocks(128, 64, 64, 4, 4),
    Blocks(64, 64, 64, 4, 4),
]
"""The likeliest first, for a sweep that is cut."""


# ---- The adapter: what a kernel of ``kind`` is called with. Until kernels are there, products that ignore ``blocks``.


def grouped(kind: Kind, shape: Shape, num_tokens: int, blocks: Blocks) -> tuple[Callable, tuple, int]:
    """(a compiled function, its arguments, its floating-point operations), on bfloat16 rows in equal shares.

    up_gate: x -> x w_up, x w_gate. down: h -> h w_down. input_gradient: dup, dgate -> dx. weight_gradient: x, dup,
    dgate -> dw_up, dw_gate.
    """
    del blocks
    D, F, E, K = shape
    R = num_tokens * K // E
    keys = iter(jax.random.split(jax.random.key(0), 4))

    def normal(*sizes: int) -> Any:
        return jax.random.normal(next(keys), (E, *sizes), jnp.bfloat16) / sizes[-1] ** 0.5

    arguments: tuple = {
        "up_gate": lambda: (normal(R, D), normal(D, F), normal(D, F)),
        "down": lambda: (normal(R, F), normal(F, D)),
        "input_gradient": lambda: (normal(R, F), normal(R, F), normal(D, F), normal(D, F)),
        "weight_gradient": lambda: (normal(R, D), normal(R, F), normal(R, F)),
    }[kind]()
    return _PLAIN[kind], arguments, 2 * E * R * D * F * (1 if kind == "down" else 2)


_PLAIN: dict[Kind, Callable] = {
    "up_gate": jax.jit(lambda x, up, gate: (x @ up, x @ gate)),
    "down": jax.jit(jnp.matmul),
    "input_gradient": jax.jit(lambda dup, dgate, up, gate: dup @ up.mT + dgate @ gate.mT),
    "weight_gradient": jax.jit(lambda x, dup, dgate: (x.mT @ dup, x.mT @ dgate)),
}

# ---- The end of the adapter.


def sweep(session: Session, shapes: list[Shape]) -> Iterator[Row]:
    """The best block sizes of each kind, of those that there was time for."""
    num_tokens, candidates = 16384, CANDIDATES
    if session.tiny:
        num_tokens, shapes, candidates = 64, [(64, 32, 8, 2)], CANDIDATES[:2]
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
