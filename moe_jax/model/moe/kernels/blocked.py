"""``blocked``: a loop over blocks of rows of one expert each, every block the whole MLP. For CPUs."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.axes import Array
from moe_jax.model.mlp import Activation, ExpertWeights, activate, mlp
from moe_jax.model.moe.dispatch import PRODUCTS, through_sorted_rows
from moe_jax.model.moe.plan import RoutingPlan


def blocked(
    x_GTD: Array, plan: RoutingPlan, weights: ExpertWeights, activation: Activation, capacity: int
) -> tuple[Array, Array]:
    """The sorted rows of ``plan`` through ``blocked_mlp``; arguments and results as in ``dispatch.einsum``."""
    E = weights.w_up_EDF.shape[0]
    sizes = block_sizes(x_GTD.shape[0] * plan.max_rows, E)
    # A custom_vjp function takes its static arguments by place.
    return through_sorted_rows(
        x_GTD, plan, E, sizes[-1], lambda x_SD, size_E: blocked_mlp(weights, x_SD, size_E, activation, sizes)
    )


def block_sizes(num_rows: int, num_experts: int) -> tuple[int, ...]:
    """Falling block sizes for ``blocked_mlp``, by the balanced share R/E of an expert: such as (512, 128, 32).

    Most rows should lie in large blocks, which read an expert's weights and add to their gradients once for many rows.
    But each expert's rows are rounded up to the smallest size, half of which is padding on average: at a sixteenth of
    the share, 3 % of the work. A CPU gains nothing from blocks of fewer than 8 rows; one of 16 costs it little
    more, so where experts have some 8 rows, as when many texts are decoded, those with more take it.
    """
    largest = min(512, max(16, _power_of_two_below(max(1, num_rows // num_experts))))
    return tuple(sorted({largest, max(8, largest // 4), max(8, largest // 16)}, reverse=True))


def _power_of_two_below(number: int) -> int:
    return 1 << (number.bit_length() - 1)


class _Blocks(NamedTuple):
    """The blocks of one size: block i < count is ``size`` rows from start_I[i], all of expert expert_I[i]."""

    size: int
    count: Array
    expert_I: Array
    start_I: Array


def _blocks(size_E: Array, sizes: tuple[int, ...], num_slots: int) -> Iterator[_Blocks]:
    """Cuts each expert's slots, a multiple of the last of ``sizes``, into blocks of falling size."""
    E = size_E.shape[0]
    start_E, left_E = jnp.cumsum(size_E) - size_E, size_E
    for size in sizes:
        if size > num_slots:  # as where there are fewer rows than the smallest blocks hold
            continue
        count_E = left_E // size
        end_E = jnp.cumsum(count_E)
        index_I = jnp.arange(num_slots // size)
        expert_I = jnp.minimum(jnp.sum(index_I[:, None] >= end_E[None, :], axis=1), E - 1)
        start_I = start_E[expert_I] + (index_I - (end_E - count_E)[expert_I]) * size
        yield _Blocks(size, end_E[-1], expert_I, start_I)
        start_E, left_E = start_E + count_E * size, left_E % size


def _rows(array: Array, start: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, start, size).astype(jnp.float32)


def _put_rows(array: Array, rows: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array, rows.astype(array.dtype), start, axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def blocked_mlp(
    weights: ExpertWeights, x_SD: Array, size_E: Array, activation: Activation, sizes: tuple[int, ...]
) -> Array:
    """Rows sorted by expert, in a loop over blocks of rows of one expert each: [S, D] in the type of ``x``.

    A block is computed from input to output while it lies in the CPU's cache; only blocks that hold rows are computed.
    For the backward pass the pre-activations are kept, and nothing else of width F. What is kept and what comes out
    has the type of ``x``; within a block everything is float32, to which XLA converts every factor on a CPU anyway.

    Args:
      size_E: [E] slots of each expert, multiples of ``sizes[-1]``; rows past their sum come out as zeros.
      sizes: block sizes, falling, each a multiple of the next.
    """
    return _blocked_forward(weights, x_SD, size_E, activation, sizes, keep=False)[0]


def _blocked_forward(
    weights: ExpertWeights, x_SD: Array, size_E: Array, activation: Activation, sizes: tuple[int, ...], keep: bool
) -> tuple[Array, tuple[Array, ...]]:
    """The output, and with ``keep`` the pre-activations [S, F]: of w_up, and of w_gate where there is one."""
    S, dtype = x_SD.shape[0], x_SD.dtype
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), weights)
    num_kept = keep * (1 if weights.w_gate_EDF is None else 2)
    carry = (jnp.zeros_like(x_SD), *[jnp.zeros((S, weights.w_up_EDF.shape[-1]), dtype)] * num_kept)

    for blocks in _blocks(size_E, sizes, S):

        def one_block(index: Array, carry: tuple[Array, ...], blocks: _Blocks = blocks) -> tuple[Array, ...]:
            start = blocks.start_I[index]
            weights = jax.tree.map(lambda leaf: leaf[blocks.expert_I[index]], cast)
            y, kept = mlp(_affine, weights, _rows(x_SD, start, blocks.size), activation)
            # Without ``keep`` there is room for y alone.
            return tuple(_put_rows(old, rows, start) for old, rows in zip(carry, (y, *kept), strict=False))

        carry = jax.lax.fori_loop(0, blocks.count, one_block, carry)
    return carry[0], carry[1:]


def _affine(x: Array, kernel: Array, bias: Array | None) -> Array:
    return x @ kernel if bias is None else x @ kernel + bias[None, :]


def _blocked_vjp_forward(
    weights: ExpertWeights, x_SD: Array, size_E: Array, activation: Activation, sizes: tuple[int, ...]
) -> tuple[Array, tuple]:
    y_SD, kept = checkpoint_name(_blocked_forward(weights, x_SD, size_E, activation, sizes, keep=True), PRODUCTS)
    return y_SD, (weights, x_SD, size_E, kept)


def _blocked_vjp_backward(
    activation: Activation, sizes: tuple[int, ...], residuals: tuple, dy_SD: Array
) -> tuple[ExpertWeights, Array, None]:
    weights, x_SD, size_E, kept = residuals
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), weights)
    # Gradients of weights add up in float32 over an expert's blocks.
    carry = (jnp.zeros_like(x_SD), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), weights))

    for blocks in _blocks(size_E, sizes, x_SD.shape[0]):

        def one_block(
            index: Array, carry: tuple[Array, ExpertWeights], blocks: _Blocks = blocks
        ) -> tuple[Array, ExpertWeights]:
            dx_SD, dweights = carry
            start, expert = blocks.start_I[index], blocks.expert_I[index]
            of_expert = jax.tree.map(lambda leaf: leaf[expert], cast)
            x, kept_rows, dy = jax.tree.map(lambda leaf: _rows(leaf, start, blocks.size), (x_SD, kept, dy_SD))
            dx, dblock = _block_gradients(of_expert, x, kept_rows, dy, activation)
            dweights = jax.tree.map(lambda total, part: total.at[expert].add(part), dweights, dblock)
            return _put_rows(dx_SD, dx, start), dweights

        carry = jax.lax.fori_loop(0, blocks.count, one_block, carry)
    dx_SD, dweights = carry
    return jax.tree.map(lambda d, leaf: d.astype(leaf.dtype), dweights, weights), dx_SD, None


def _block_gradients(
    weights: ExpertWeights, x: Array, kept: tuple[Array, ...], dy: Array, activation: Activation
) -> tuple[Array, ExpertWeights]:
    """Gradients, in float32, of one block with respect to its rows and to its expert's weights."""
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)

    def bias_gradient(bias: Array | None, dy: Array) -> Array | None:
        return None if bias is None else jnp.sum(dy, axis=0, dtype=jnp.float32)

    hidden, activation_vjp = jax.vjp(lambda kept: activate(kept, activation), kept)
    ((dup, *dgate),) = activation_vjp(dy @ weights.w_down_EFD.T)
    dx = product(dup, weights.w_up_EDF.T)
    if weights.w_gate_EDF is not None:
        dx += product(dgate[0], weights.w_gate_EDF.T)
    return dx, ExpertWeights(
        w_up_EDF=product(x.T, dup),
        w_down_EFD=product(hidden.T, dy),
        w_gate_EDF=product(x.T, dgate[0]) if dgate else None,
        b_up_EF=bias_gradient(weights.b_up_EF, dup),
        b_gate_EF=bias_gradient(weights.b_gate_EF, dgate[0]) if dgate else None,
        b_down_ED=bias_gradient(weights.b_down_ED, dy),
    )


blocked_mlp.defvjp(_blocked_vjp_forward, _blocked_vjp_backward)
