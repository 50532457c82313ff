"""``pallas``: sorted rows by the kernels of ``grouped.py``, for GPUs: their blocks, and the gradient of the whole."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.axes import Array
from moe_jax.model.mlp import Activation, ExpertWeights
from moe_jax.model.moe.dispatch import PRODUCTS, SortedRows, from_slots, sort_rows, sum_of_rows, take_rows
from moe_jax.model.moe.kernels.grouped import Blocks, activation_gradient, gather, hidden, product, weight_gradient
from moe_jax.model.moe.plan import RoutingPlan


@dataclass(frozen=True)
class Tuning:
    """The blocks of each kernel. Those of the first three are of as many rows as each expert's are rounded up to."""

    hidden: Blocks
    into_D: Blocks
    """Products whose result is D wide: down, and the gradient of the rows."""
    into_F: Blocks
    """The gradient of the hidden layer."""
    up_gradient: Blocks
    down_gradient: Blocks

    @property
    def rows(self) -> int:
        return self.hidden.rows


def tuning(num_rows: int, num_experts: int, D: int, F: int, dtype: jnp.dtype, shared_memory: int) -> Tuning:
    """Blocks for a GPU with so many bytes of shared memory a block.

    Those of many rows on a GPU like Hopper were the fastest measured on an H200, but for one shape
    (docs/performance.md); those of few rows and of other GPUs were not timed, and are chosen to spill no registers.

    Each expert's rows are rounded up to whole blocks, half a block on average: where experts have few, it is small.
    """
    share = max(1, num_rows // num_experts)
    rows = min(128, max(16, 1 << (share.bit_length() - 1)))
    depth = 128 // dtype.itemsize
    if rows < 128:
        few = Blocks(rows, 64, depth, 4, 3)
        gradient = Blocks(64, 64, min(rows, depth), 4, 3)
        return Tuning(few, few, few, gradient, gradient)

    def into(width: int) -> Blocks:
        """128 rows by 256 columns where these divide the ``width`` and fit into shared memory, else by 128."""
        wide = Blocks(128, 256, depth, 8, 3)
        fits = wide.stages * wide.depth * (wide.rows + wide.columns) * dtype.itemsize <= shared_memory
        return wide if fits and width % 256 == 0 else Blocks(128, 128, depth, 8, 3)

    # Two sums must stay in registers: wider blocks spill them.
    hidden = Blocks(128, 128, depth, 8, 3) if shared_memory >= HOPPER else Blocks(128, 128, depth // 2, 8, 4)
    return Tuning(hidden, into(D), into(F), into(F), into(D))


AMPERE, HOPPER, OTHERS = 163 * 1024, 227 * 1024, 99 * 1024
"""Shared memory that one program may have, in bytes, by GPU."""


def _shared_memory() -> int:
    """That of this process's GPU; without one, as where a program is only compiled for another, that of Hopper."""
    if jax.default_backend() != "gpu":
        return HOPPER
    capability = getattr(jax.local_devices()[0], "compute_capability", "")
    return {"8.0": AMPERE, "9.0": HOPPER, "10.0": HOPPER, "10.3": HOPPER}.get(capability, OTHERS)


def pallas(
    x_GTD: Array, plan: RoutingPlan, weights: ExpertWeights, activation: Activation, capacity: int
) -> tuple[Array, Array]:
    """Sorted rows, by the kernels of ``grouped.py``; arguments and results as in ``dispatch.einsum``."""
    G, T, D = x_GTD.shape
    E, _, F = weights.w_up_EDF.shape
    tuned = tuning(G * plan.max_rows, E, D, F, x_GTD.dtype, _shared_memory())
    rows = sort_rows(plan, E, tuned.rows)
    weight_TK = plan.combine_weight_TK.reshape(rows.slot_TK.shape)
    y_TD = grouped_mlp(weights, x_GTD.reshape(G * T, D), weight_TK, rows, activation, tuned)
    return y_TD.reshape(G, T, D), rows.kept_TK.reshape(plan.expert_TK.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def grouped_mlp(
    weights: ExpertWeights, x_TD: Array, weight_TK: Array, rows: SortedRows, activation: Activation, tuned: Tuning
) -> Array:
    """y_t = Σ_k weight_tk · expert_tk(x_t): [T, D] in the type of ``x``.

    For the backward pass the pre-activations are kept, and of each row nothing else: the gradient of a combine weight
    is <h, dh>, the product of its row's hidden layer and that layer's gradient before the weight (SonicMoE,
    arXiv 2512.14080), so that the experts' outputs are not needed.
    """
    return _forward(weights, x_TD, weight_TK, rows, activation, tuned, keep=False)[0]


def _forward(
    weights: ExpertWeights,
    x_TD: Array,
    weight_TK: Array,
    rows: SortedRows,
    activation: Activation,
    tuned: Tuning,
    keep: bool,
) -> tuple[Array, tuple[Array, ...]]:
    """The output and, with ``keep``, the pre-activations [S, F] (up, and gate where there is one)."""
    expert_I = _expert_of_blocks(rows, tuned.rows)
    cast = jax.tree.map(lambda leaf: leaf.astype(x_TD.dtype), weights)
    x_SD = _to_slots(x_TD, rows)
    h_SF, kept = hidden(expert_I, x_SD, cast, activation, tuned.hidden, keep)
    y_SD = product(expert_I, (h_SF,), (cast.w_down_EFD,), cast.b_down_ED, tuned.into_D)
    return from_slots(y_SD, weight_TK, rows.slot_TK, rows.row_S), kept


def _vjp_forward(
    weights: ExpertWeights, x_TD: Array, weight_TK: Array, rows: SortedRows, activation: Activation, tuned: Tuning
) -> tuple[Array, tuple]:
    y_TD, kept = _forward(weights, x_TD, weight_TK, rows, activation, tuned, keep=True)
    return y_TD, (weights, x_TD, weight_TK, rows, checkpoint_name(kept, PRODUCTS))


def _vjp_backward(activation: Activation, tuned: Tuning, residuals: tuple, dy_TD: Array) -> tuple:
    weights, x_TD, weight_TK, rows, kept = residuals
    expert_I = _expert_of_blocks(rows, tuned.rows)
    cast = jax.tree.map(lambda leaf: leaf.astype(x_TD.dtype), weights)
    x_SD, dy_SD = _to_slots(x_TD, rows), _to_slots(dy_TD, rows)
    weight_S = take_rows(weight_TK.reshape(-1), rows.row_S)
    dh_SF = product(expert_I, (dy_SD,), (cast.w_down_EFD,), None, tuned.into_F, transposed=True)
    weighted_h_SF, dkept, dweight_S = activation_gradient(dh_SF, weight_S, kept, activation)
    matrices = (cast.w_up_EDF,) if cast.w_gate_EDF is None else (cast.w_up_EDF, cast.w_gate_EDF)
    dx_SD = product(expert_I, dkept, matrices, None, tuned.into_D, transposed=True)

    def matrix(x_SD: Array, dy_SD: Array, blocks: Blocks) -> Array:
        return weight_gradient(rows.size_E, x_SD, dy_SD, weights.w_up_EDF.dtype, blocks)

    def bias(dy_SD: Array, like: Array | None) -> Array | None:
        return None if like is None else _bias_gradient(expert_I, dy_SD, like)

    dgate_SF = dkept[-1]  # of up where there is no gate, and then not used
    dweights = ExpertWeights(
        w_up_EDF=matrix(x_SD, dkept[0], tuned.up_gradient),
        w_down_EFD=matrix(weighted_h_SF, dy_SD, tuned.down_gradient),
        w_gate_EDF=None if weights.w_gate_EDF is None else matrix(x_SD, dgate_SF, tuned.up_gradient),
        b_up_EF=bias(dkept[0], weights.b_up_EF),
        b_gate_EF=bias(dgate_SF, weights.b_gate_EF),
        b_down_ED=bias(dy_SD * weight_S[:, None], weights.b_down_ED),
    )
    dx_TD = sum_of_rows(dx_SD, rows.slot_TK)
    dweight_TK = take_rows(dweight_S, rows.slot_TK)
    if weights.b_down_ED is not None:  # of an expert's output, h is all but the bias
        bias_SD = jnp.repeat(take_rows(cast.b_down_ED, expert_I), tuned.rows, axis=0)
        dweight_S = jnp.sum((bias_SD * dy_SD).astype(jnp.float32), axis=1)
        dweight_TK += take_rows(dweight_S, rows.slot_TK)
    return dweights, dx_TD, dweight_TK, None


grouped_mlp.defvjp(_vjp_forward, _vjp_backward)


def _to_slots(x_TD: Array, rows: SortedRows) -> Array:
    """[T, D] -> [S, D]: each slot gets its row's token, and an empty one, whose weight is zero, any finite."""
    T, K = rows.slot_TK.shape
    return gather(x_TD, jnp.minimum(rows.row_S // K, T - 1))


def _expert_of_blocks(rows: SortedRows, size: int) -> Array:
    """[I] int32: the expert of each block of ``size`` slots; E where the slots are no expert's."""
    end_E = jnp.cumsum(rows.size_E) // size
    index_I = jnp.arange(rows.row_S.size // size)
    return jnp.sum(index_I[:, None] >= end_E[None, :], axis=1, dtype=jnp.int32)


def _bias_gradient(expert_I: Array, dy_SF: Array, like_EF: Array) -> Array:
    """The sum of each expert's rows, [E, F]. Blocks of no expert hold anything, so they are cleared first."""
    E = like_EF.shape[0]
    dy_IBF = dy_SF.reshape(expert_I.size, -1, dy_SF.shape[-1])
    dy_IF = jnp.sum(jnp.where(expert_I[:, None, None] < E, dy_IBF, 0), axis=1, dtype=jnp.float32)
    of_expert_EI = (expert_I[None, :] == jnp.arange(E)[:, None]).astype(jnp.float32)
    return jnp.matmul(of_expert_EI, dy_IF, precision=jax.lax.Precision.HIGHEST).astype(like_EF.dtype)
