"""Grouped products for GPUs, as Pallas kernels that Triton compiles; nothing but jax is needed.

Rows lie sorted by expert, where ``gather`` brings them, and each expert's are rounded up to whole blocks, so that a
block of rows is one expert's and no kernel masks rows. Four kernels make the MLP and its backward pass, all with
float32 sums: ``hidden`` (up, gate and activation in one), ``product`` (down; also the gradients of the hidden layer
and of the rows), ``activation_gradient`` and ``weight_gradient``. Each program finds its block of rows and of columns,
sums over the depth of a product, and stores; S is the number of slots, I = S / rows that of blocks of rows.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moe_jax.axes import Array
from moe_jax.model.mlp import Activation, ExpertWeights, activate


@dataclass(frozen=True)
class Blocks:
    """How a kernel is cut: a program makes [rows, columns] of the result, ``depth`` terms of its sums at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    """Blocks in flight from memory."""


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


def gather(x_TD: Array, token_S: Array) -> Array:
    """x[token], [S, D], for S a multiple of 16: in two thirds of the time of XLA's."""
    S, D = token_S.size, x_TD.shape[1]
    blocks = Blocks(16, 128, 0, 4, 1)
    num_columns = pl.cdiv(D, blocks.columns)

    def kernel(token_ref: Any, x_ref: Any, y_ref: Any) -> None:
        row, column = pl.program_id(0) // num_columns, pl.program_id(0) % num_columns
        token = plgpu.load(token_ref.at[pl.ds(row * blocks.rows, blocks.rows)])
        mask = _across(_within(column * blocks.columns, blocks.columns, D))
        columns = column * blocks.columns + jnp.arange(blocks.columns)
        index = jnp.broadcast_arrays(token[:, None], columns[None, :])
        mask = None if mask is None else jnp.broadcast_to(mask, index[0].shape)
        _store(y_ref, _load(x_ref, *index, masks=(mask,)), row, column, blocks)

    out = jax.ShapeDtypeStruct((S, D), x_TD.dtype)
    return _call(kernel, blocks, S // blocks.rows * num_columns, out, "moe_gather", token_S, x_TD)


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


def activation_gradient(
    dh_SF: Array, weight_S: Array, kept: tuple[Array, ...], activation: Activation
) -> tuple[Array, tuple[Array, ...], Array]:
    """(weight · h [S, F], gradients of the pre-activations, gradient of the combine weights [S]).

    No part of the product before it: there all this waited for memory at the end of each program, and took longer
    than both do. XLA would write the exponential to memory for its several uses.
    """
    S, F = dh_SF.shape
    blocks = Blocks(16, 128, 0, 4, 1)  # S is a multiple of 16, as blocks of rows are
    num_columns = pl.cdiv(F, blocks.columns)

    def kernel(
        dh_ref: Any, weight_ref: Any, kept_refs: tuple, h_ref: Any, dkept_refs: tuple, dweight_ref: Any
    ) -> None:
        row, column = pl.program_id(0) // num_columns, pl.program_id(0) % num_columns
        rows, columns = pl.ds(row * blocks.rows, blocks.rows), pl.ds(column * blocks.columns, blocks.columns)
        mask = _across(_within(column * blocks.columns, blocks.columns, F))
        dh, *pre = (_load(ref, rows, columns, masks=(mask,)).astype(jnp.float32) for ref in (dh_ref, *kept_refs))
        weight = plgpu.load(weight_ref.at[rows])
        h, vjp = jax.vjp(lambda pre: activate(pre, activation), tuple(pre))
        plgpu.store(dweight_ref.at[column, rows], jnp.sum(h * dh, axis=1))
        for ref, each in zip(dkept_refs, vjp(dh * weight[:, None])[0], strict=True):
            _store(ref, each, row, column, blocks)
        _store(h_ref, h * weight[:, None], row, column, blocks)

    like = jax.ShapeDtypeStruct((S, F), dh_SF.dtype)
    out = (like, (like,) * len(kept), jax.ShapeDtypeStruct((num_columns, S), jnp.float32))
    num_programs = S // blocks.rows * num_columns
    h_SF, dkept, dweight_NS = _call(
        kernel, blocks, num_programs, out, "moe_activation_gradient", dh_SF, weight_S, kept
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
