"""Values and gradients of backends that drop nothing, against a loop in float32: a stage of ``gpu.py``."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from gpu_session import Row, Session, guarded

from moe_jax.model.mlp import ExpertWeights
from moe_jax.model.moe.backends import BACKENDS
from moe_jax.model.moe.routing import top_k_plan


def loop_over_experts(x_TD: Any, expert_TK: Any, weight_TK: Any, weights: ExpertWeights) -> Any:
    """The layer with every expert on every token; the products are in the type of ``x``."""
    assert weights.w_gate_EDF is not None
    y_TD = jnp.zeros(x_TD.shape, jnp.float32)
    for expert, up, down, gate in zip(range(len(weights.w_up_EDF)), *jax.tree.leaves(weights), strict=True):
        up, down, gate = (matrix.astype(x_TD.dtype) for matrix in (up, down, gate))
        hidden_TF = jax.nn.silu(x_TD @ gate) * (x_TD @ up)
        y_TD += jnp.sum(jnp.where(expert_TK == expert, weight_TK, 0), 1, keepdims=True) * (hidden_TF @ down)
    return y_TD.astype(x_TD.dtype)


def parity(session: Session) -> Iterator[Row]:
    """Values and gradients of backends that drop nothing, against a loop in float32: relative L2 errors.

    In bfloat16 they may be twice those of the same loop in bfloat16; one expert has no rows.
    """
    T, D, F, E, K = (64, 64, 128, 8, 2) if session.tiny else (512, 256, 512, 8, 2)
    keys = iter(jax.random.split(jax.random.key(0), 6))

    def normal(*shape: int) -> Any:
        return jax.random.normal(next(keys), shape) / shape[-2] ** 0.5

    weights = ExpertWeights(normal(E, D, F), normal(E, F, D), normal(E, D, F))
    logits_TE = jax.random.normal(next(keys), (T, E)) - jnp.arange(E) / 2 - jnp.where(jnp.arange(E) == E - 1, 99, 0)
    x_TD, dy_TD = jax.random.normal(next(keys), (2, T, D))

    def with_gradients(apply: Callable, dtype: Any) -> dict[str, Any]:
        """By name: y and what its cotangent gives."""

        def layer(x_TD: Any, logits_TE: Any, weights: ExpertWeights) -> Any:
            return apply(x_TD, top_k_plan(logits_TE, K), weights)

        def values_and_gradients(x_TD: Any, dy_TD: Any) -> tuple:
            y_TD, vjp = jax.vjp(layer, x_TD, logits_TE, weights)
            return y_TD, *vjp(dy_TD)

        y, dx, dlogits, dweights = jax.jit(values_and_gradients)(x_TD.astype(dtype), dy_TD.astype(dtype))
        return {"y": y, "x": dx, "logits": dlogits, "up": dweights.w_up_EDF, "down": dweights.w_down_EFD} | {
            "gate": dweights.w_gate_EDF
        }

    def loop(x_TD: Any, plan: Any, weights: ExpertWeights) -> Any:
        return loop_over_experts(x_TD, plan.expert_TK, plan.combine_weight_TK, weights)

    def backend(name: str) -> Callable:
        def apply(x_TD: Any, plan: Any, weights: ExpertWeights) -> Any:
            plans = jax.tree.map(lambda leaf: leaf[None], plan)
            return BACKENDS[name].run(x_TD[None], plans, weights, "swiglu", T)[0][0]

        return apply

    # The oracle's inputs are those that bfloat16 holds exactly: what is left is the error of computing with them.
    x_TD, dy_TD = (array.astype(jnp.bfloat16).astype(jnp.float32) for array in (x_TD, dy_TD))
    with jax.default_matmul_precision("highest"):
        want = with_gradients(loop, jnp.float32)

    def errors(got: dict[str, Any]) -> dict[str, float]:
        norm = {name: jnp.linalg.norm(want[name].ravel()) for name in want}
        return {
            name: float(jnp.linalg.norm((got[name].astype(jnp.float32) - want[name]).ravel()) / norm[name])
            for name in want
        }

    plain = errors(with_gradients(loop, jnp.bfloat16))

    def in_bfloat16(name: str) -> Row:
        found = errors(with_gradients(backend(name), jnp.bfloat16))
        ratio = {tensor: round(found[tensor] / plain[tensor], 2) for tensor in found}
        return {"ok": all(value <= 2 for value in ratio.values()), "worst": max(ratio.values())} | {
            "ratio": ratio,
            "relative_l2": {tensor: float(f"{value:.2e}") for tensor, value in found.items()},
        }

    def in_float32(name: str) -> Row:
        with jax.default_matmul_precision("highest"):
            found = errors(with_gradients(backend(name), jnp.float32))
        return {"ok": all(value <= 1e-4 for value in found.values()), "worst": float(f"{max(found.values()):.2e}")}

    for name in ("pallas", "gather"):
        yield guarded(f"{name}, bfloat16 over the plain loop", functools.partial(in_bfloat16, name))
        yield guarded(f"{name}, float32", functools.partial(in_float32, name))
