"""``pallas``: grouped products for GPUs, as Pallas kernels that Triton compiles; nothing but jax is needed.

Rows lie sorted by expert, and each expert's are rounded up to whole blocks, so that a block of rows is one expert's
and no kernel masks rows. Four kernels make the MLP and its backward pass, all with float32 sums: ``hidden`` (up, gate
and activation in one), ``product`` (down; also the gradient of the rows), ``hidden_gradient`` (through down and the
activation) and ``weight_gradient``.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moe_jax.axes import Array
from moe_jax.model.mlp import Activation, ExpertWeights, activate
from moe_jax.model.moe.dispatch import PRODUCTS, SortedRows, from_slots, sort_rows, sum_of_rows, take_rows, to_slots
from moe_jax.model.moe.plan import RoutingPlan


@dataclass(frozen=True)
class Blocks:
    """How a kernel is cut: a program makes [rows, columns] of the result, ``depth`` terms of its sums at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    """Blocks in flight from memory."""


@dataclass(frozen=True)
class Tuning:
    """The blocks of each kernel. All but the last two are of as many rows as each expert's are rounded up to."""

    hidden: Blocks
    down: Blocks
    hidden_gradient: Blocks
    rows_gradient: Blocks
    up_gradient: Blocks
    down_gradient: Blocks

    @property
    def rows(self) -> int:
        return self.hidden.rows


def tuning(num_rows: int, num_experts: int, D: int, F: int, dtype: jnp.dtype, shared_memory: int) -> Tuning:
    """The fastest blocks measured (docs/performance.md) for a GPU with so many bytes of shared memory a block.

    Each expert's rows are rounded up to whole blocks, half a block on average: where experts have few, it is small.
    """
    share = max(1, num_rows // num_experts)
    rows = min(128, max(16, 1 << (share.bit_length() - 1)))
    depth = 128 // dtype.itemsize
    if rows < 128:
        few = Blocks(rows, 64, depth, 4, 3)
        gradient = Blocks(64, 64, min(rows, depth), 4, 3)
        return Tuning(few, few, few, few, gradient, gradient)

    def blocks(columns: int, width: int = 0) -> Blocks:
        """128 rows by ``columns``, or by 256 where these divide the ``width`` and fit into shared memory."""
        wide = Blocks(128, 256, depth, 8, 3)
        fits = wide.stages * wide.depth * (wide.rows + wide.columns) * dtype.itemsize <= shared_memory
        return wide if fits and width and width % 256 == 0 else Blocks(128, columns, depth, 8, 3)

    # Two sums and an activation's derivative must stay in registers: wider blocks of these two spill them.
    hidden = blocks(128) if shared_memory >= AMPERE else Blocks(128, 128, depth // 2, 8, 4)
    return Tuning(hidden, blocks(128, D), blocks(64), blocks(128, D), blocks(128, F), blocks(128, D))


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
    """Sorted rows, by the kernels of this file; arguments and results as in ``dispatch.einsum``."""
    G, T, D = x_GTD.shape
    E = weights.w_up_EDF.shape[0]
    F = weights.w_up_EDF.shape[2]
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
    x_SD = to_slots(x_TD, rows.slot_TK, rows.row_S)
    h_SF, kept = hidden(expert_I, x_SD, cast, activation, tuned.hidden, keep)
    y_SD = product(expert_I, (h_SF,), (cast.w_down_EFD,), cast.b_down_ED, tuned.down)
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
    x_SD, dy_SD = (to_slots(each_TD, rows.slot_TK, rows.row_S) for each_TD in (x_TD, dy_TD))
    weight_S = take_rows(weight_TK.reshape(-1), rows.row_S)
    weighted_h_SF, dkept, dweight_S = hidden_gradient(
        expert_I, dy_SD, cast.w_down_EFD, weight_S, kept, activation, tuned.hidden_gradient
    )
    matrices = (cast.w_up_EDF,) if cast.w_gate_EDF is None else (cast.w_up_EDF, cast.w_gate_EDF)
    dx_SD = product(expert_I, dkept, matrices, None, tuned.rows_gradient, transposed=True)

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


# The kernels. Each program finds its block of rows and of columns, sums over the depth, and stores.


def _call(kernel: Callable, blocks: Blocks, num_programs: int, out: Any, name: str, *arguments: Any) -> Any:
    """``kernel`` on a grid of one axis; on a CPU by the interpreter, which is for tests."""
    params = plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)

    def call(*arguments: Any, interpret: bool = False) -> Any:
        return pl.pallas_call(
            kernel, out, grid=(num_programs,), compiler_params=params, interpret=interpret, name=name
        )(*arguments)

    return jax.lax.platform_dependent(*arguments, cpu=functools.partial(call, interpret=True), default=call)


_GROUP = 8
"""Blocks of rows whose programs run next to each other: so many share the columns' matrix in the cache."""


def _place(num_row_blocks: int, num_column_blocks: int) -> tuple[Array, Array]:
    """(block of rows, block of columns) of this program: all columns of ``_GROUP`` blocks of rows, then the next."""
    program = pl.program_id(0)
    first = program // (_GROUP * num_column_blocks) * _GROUP
    within = program % (_GROUP * num_column_blocks)
    height = jnp.minimum(num_row_blocks - first, _GROUP)
    return first + within % height, within // height


def _load(ref: Any, *index: Any, masks: tuple[Array | None, ...] = ()) -> Array:
    """ref[index], and zeros where one of ``masks``, which broadcast to its shape, is False."""
    present = [mask for mask in masks if mask is not None]
    if not present:
        return plgpu.load(ref.at[index])
    return plgpu.load(ref.at[index], mask=functools.reduce(jnp.logical_and, present), other=0)


def _within(start: Array, size: int, width: int) -> Array | None:
    """[size] bool: which of the places from ``start`` on are in [0, width); None where all always are."""
    return None if width % size == 0 else start + jnp.arange(size) < width


def _across(mask: Array | None) -> Array | None:
    return None if mask is None else mask[None, :]


def _down(mask: Array | None) -> Array | None:
    return None if mask is None else mask[:, None]


def _sums(
    sums: tuple[Array, ...], x_ref: Any, w_refs: tuple, expert: Array, row: Array, column: Array, blocks: Blocks,
    transposed: bool = False,
) -> tuple[Array, ...]:  # fmt: skip
    """``sums`` of [rows, columns] plus x[rows] @ w[expert][:, columns] of each matrix, which may be transposed."""
    K, N = w_refs[0].shape[1:][:: -1 if transposed else 1]
    rows, columns = pl.ds(row * blocks.rows, blocks.rows), pl.ds(column * blocks.columns, blocks.columns)
    in_columns = _within(column * blocks.columns, blocks.columns, N)

    def step(turn: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        depth, in_depth = pl.ds(turn * blocks.depth, blocks.depth), _within(turn * blocks.depth, blocks.depth, K)
        x = _load(x_ref, rows, depth, masks=(_across(in_depth),))
        added = []
        for total, w_ref in zip(sums, w_refs, strict=True):
            if transposed:
                w = _load(w_ref, expert, columns, depth, masks=(_down(in_columns), _across(in_depth)))
            else:
                w = _load(w_ref, expert, depth, columns, masks=(_down(in_depth), _across(in_columns)))
            added.append(total + plgpu.dot(x, w, trans_b=transposed))
        return tuple(added)

    return jax.lax.fori_loop(0, pl.cdiv(K, blocks.depth), step, sums)


def _zeros(blocks: Blocks) -> Array:
    return jnp.zeros((blocks.rows, blocks.columns), jnp.float32)


def _store(ref: Any, value: Array, row: Array, column: Array, blocks: Blocks) -> None:
    mask = _across(_within(column * blocks.columns, blocks.columns, ref.shape[1]))
    target = ref.at[pl.ds(row * blocks.rows, blocks.rows), pl.ds(column * blocks.columns, blocks.columns)]
    # Rows are never masked; a mask of the store has the value's shape.
    mask = None if mask is None else jnp.broadcast_to(mask, value.shape)
    plgpu.store(target, value.astype(ref.dtype), mask=mask)


def hidden(
    expert_I: Array, x_SD: Array, weights: ExpertWeights, activation: Activation, blocks: Blocks, keep: bool
) -> tuple[Array, tuple[Array, ...]]:
    """The hidden layer [S, F] and, with ``keep``, its pre-activations."""
    E, _, F = weights.w_up_EDF.shape
    matrices = tuple(leaf for leaf in (weights.w_up_EDF, weights.w_gate_EDF) if leaf is not None)
    biases = tuple(leaf for leaf in (weights.b_up_EF, weights.b_gate_EF) if leaf is not None)
    like = jax.ShapeDtypeStruct((x_SD.shape[0], F), x_SD.dtype)
    num_columns = pl.cdiv(F, blocks.columns)

    def kernel(expert_ref: Any, x_ref: Any, w_refs: tuple, b_refs: tuple, h_ref: Any, kept_refs: tuple) -> None:
        row, column = _place(expert_I.size, num_columns)
        expert = expert_ref[row]

        @pl.when(expert < E)
        def _() -> None:
            sums = _sums((_zeros(blocks),) * len(w_refs), x_ref, w_refs, expert, row, column, blocks)
            if b_refs:
                sums = tuple(s + _bias(b_ref, expert, column, blocks) for s, b_ref in zip(sums, b_refs, strict=True))
            # Rounded first, so that the backward pass finds the same hidden layer again.
            kept = tuple(total.astype(h_ref.dtype).astype(jnp.float32) for total in sums)
            for ref, each in zip(kept_refs, kept, strict=False):
                _store(ref, each, row, column, blocks)
            _store(h_ref, activate(kept, activation), row, column, blocks)

    out = (like, (like,) * (len(matrices) * keep))
    return _call(kernel, blocks, expert_I.size * num_columns, out, "moe_hidden", expert_I, x_SD, matrices, biases)


def _bias(b_ref: Any, expert: Array, column: Array, blocks: Blocks) -> Array:
    """[1, columns] float32."""
    start = column * blocks.columns
    mask = _within(start, blocks.columns, b_ref.shape[1])
    return _load(b_ref, expert, pl.ds(start, blocks.columns), masks=(mask,)).astype(jnp.float32)[None, :]


def product(
    expert_I: Array,
    x: tuple[Array, ...],
    w: tuple[Array, ...],
    bias_EN: Array | None,
    blocks: Blocks,
    transposed: bool = False,
) -> Array:
    """Σ over the pairs of x [S, in] times its expert's matrix [in, out], or its transpose, plus a bias: [S, out]."""
    E, N = w[0].shape[0], w[0].shape[1 if transposed else 2]
    num_columns = pl.cdiv(N, blocks.columns)

    def kernel(expert_ref: Any, x_refs: tuple, w_refs: tuple, b_refs: tuple, y_ref: Any) -> None:
        row, column = _place(expert_I.size, num_columns)
        expert = expert_ref[row]

        @pl.when(expert < E)
        def _() -> None:
            total = _zeros(blocks)
            for x_ref, w_ref in zip(x_refs, w_refs, strict=True):
                (total,) = _sums((total,), x_ref, (w_ref,), expert, row, column, blocks, transposed)
            for b_ref in b_refs:
                total += _bias(b_ref, expert, column, blocks)
            _store(y_ref, total, row, column, blocks)

    out = jax.ShapeDtypeStruct((x[0].shape[0], N), x[0].dtype)
    biases = () if bias_EN is None else (bias_EN,)
    return _call(kernel, blocks, expert_I.size * num_columns, out, "moe_product", expert_I, x, w, biases)


def hidden_gradient(
    expert_I: Array,
    dy_SD: Array,
    w_down_EFD: Array,
    weight_S: Array,
    kept: tuple[Array, ...],
    activation: Activation,
    blocks: Blocks,
) -> tuple[Array, tuple[Array, ...], Array]:
    """(weight · h [S, F], gradients of the pre-activations, gradient of the combine weights [S])."""
    E, F, _ = w_down_EFD.shape
    num_columns = pl.cdiv(F, blocks.columns)

    def kernel(
        expert_ref: Any, dy_ref: Any, w_ref: Any, weight_ref: Any, kept_refs: tuple,
        h_ref: Any, dkept_refs: tuple, dweight_ref: Any,
    ) -> None:  # fmt: skip
        row, column = _place(expert_I.size, num_columns)
        expert = expert_ref[row]
        rows, columns = pl.ds(row * blocks.rows, blocks.rows), pl.ds(column * blocks.columns, blocks.columns)

        @pl.when(expert < E)
        def _() -> None:
            zeros = (_zeros(blocks),)
            (dh,) = _sums(zeros, dy_ref, (w_ref,), expert, row, column, blocks, transposed=True)
            mask = _across(_within(column * blocks.columns, blocks.columns, F))
            pre = tuple(_load(ref, rows, columns, masks=(mask,)).astype(jnp.float32) for ref in kept_refs)
            h, vjp = jax.vjp(lambda pre: activate(pre, activation), pre)
            weight = plgpu.load(weight_ref.at[rows])
            plgpu.store(dweight_ref.at[column, rows], jnp.sum(h * dh, axis=1))
            for ref, each in zip(dkept_refs, vjp(dh * weight[:, None])[0], strict=True):
                _store(ref, each, row, column, blocks)
            _store(h_ref, h * weight[:, None], row, column, blocks)

    S = dy_SD.shape[0]
    like = jax.ShapeDtypeStruct((S, F), dy_SD.dtype)
    out = (like, (like,) * len(kept), jax.ShapeDtypeStruct((num_columns, S), jnp.float32))
    h_SF, dkept, dweight_NS = _call(
        kernel,
        blocks,
        expert_I.size * num_columns,
        out,
        "moe_hidden_gradient",
        expert_I,
        dy_SD,
        w_down_EFD,
        weight_S,
        kept,
    )
    return h_SF, dkept, jnp.sum(dweight_NS, axis=0)


def weight_gradient(size_E: Array, x_SD: Array, dy_SF: Array, dtype: jnp.dtype, blocks: Blocks) -> Array:
    """x^T @ dy over each expert's rows: [E, D, F], zeros for an expert without rows."""
    E, D, F = size_E.size, x_SD.shape[1], dy_SF.shape[1]
    num_rows, num_columns = pl.cdiv(D, blocks.rows), pl.cdiv(F, blocks.columns)

    def kernel(end_ref: Any, x_ref: Any, dy_ref: Any, dw_ref: Any) -> None:
        expert = pl.program_id(0) // (num_rows * num_columns)
        within = pl.program_id(0) % (num_rows * num_columns)
        row, column = within // num_columns, within % num_columns
        rows, columns = pl.ds(row * blocks.rows, blocks.rows), pl.ds(column * blocks.columns, blocks.columns)
        in_rows = _within(row * blocks.rows, blocks.rows, D)
        in_columns = _within(column * blocks.columns, blocks.columns, F)

        def step(turn: Array, total: Array) -> Array:
            slots = pl.ds(turn * blocks.depth, blocks.depth)
            x = _load(x_ref, slots, rows, masks=(_across(in_rows),))
            dy = _load(dy_ref, slots, columns, masks=(_across(in_columns),))
            return total + plgpu.dot(x, dy, trans_a=True)

        total = jax.lax.fori_loop(
            end_ref[expert] // blocks.depth, end_ref[expert + 1] // blocks.depth, step, _zeros(blocks)
        )
        masks = [mask for mask in (_down(in_rows), _across(in_columns)) if mask is not None]
        mask = jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), total.shape) if masks else None
        plgpu.store(dw_ref.at[expert, rows, columns], total.astype(dtype), mask=mask)

    end_E = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(size_E, dtype=jnp.int32)])
    out = jax.ShapeDtypeStruct((E, D, F), dtype)
    return _call(kernel, blocks, E * num_rows * num_columns, out, "moe_weight_gradient", end_E, x_SD, dy_SF)
