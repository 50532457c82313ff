"""``blocked`` against one expert after the other, and how much of the slots it computes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model.moe.dispatch import num_slots
from moe_jax.model.moe.kernels.blocked import _blocks, block_sizes, blocked_mlp
from tests.oracles.moe import (
    assert_equals_one_by_one,
    assert_equals_one_by_one_on_a_gpu,
    assert_trees_close,
    experts_of,
    make_weights,
    one_expert,
    with_gradients,
)

D, F, E, S = 6, 10, 5, 48
SIZES = (16, 8, 4)
# Slots of each expert, multiples of 4: every mixture of blocks, none at all, and slots past the last expert's.
LOADS = [(16, 8, 4, 12, 8), (0, 48, 0, 0, 0), (4, 0, 28, 0, 12), (0, 0, 0, 0, 0), (20, 4, 4, 4, 4)]


def in_blocks(weights, x_SD, size_E, activation, sizes=SIZES):
    return blocked_mlp(weights, x_SD, size_E, activation, sizes)  # a custom_vjp takes static arguments by place


@pytest.mark.parametrize(("activation", "bias"), [("swiglu", True), ("gelu", False), ("relu", True)])
def test_blocks_equal_one_expert_after_the_other(activation, bias):
    for load in LOADS:
        assert_equals_one_by_one(in_blocks, load, activation, bias, S)


def test_blocks_leave_rows_past_the_last_expert_alone():
    poisoned = jnp.full((S, D), jnp.nan).at[:16].set(1.0)
    size_E = jnp.asarray([4, 0, 8, 0, 4])
    y_SD, (dweights, dx) = with_gradients(in_blocks, make_weights(E, D, F), poisoned, size_E, "swiglu", poisoned)
    assert np.all(np.asarray(y_SD)[16:] == 0)
    assert np.all(np.asarray(dx)[16:] == 0)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((dweights, y_SD)))


@jax.jit
def blocks_of(size_E):
    return list(_blocks(size_E, SIZES, S))


@pytest.mark.parametrize("load", LOADS)
def test_blocks_cover_every_slot_once_and_hold_one_expert_each(load):
    covered = np.full(S, -1)
    for size, count, expert_I, start_I in jax.device_get(blocks_of(jnp.asarray(load))):
        for expert, start in zip(expert_I[:count], start_I[:count], strict=True):
            assert np.all(covered[start : start + size] == -1)
            covered[start : start + size] = expert
    np.testing.assert_array_equal(covered, np.where(experts_of(load, S) < E, experts_of(load, S), -1))


def test_sorted_computes_at_most_half_as_much_again_as_it_must():
    # The slots are what all blocks together may compute, each once in each of the three (backward six) products.
    for T, K, E in itertools.product([1, 7, 64, 100, 1000, 8192], [1, 2, 8], [1, 4, 8, 64, 100]):
        if K <= E and T * K >= 16 * E:
            sizes = block_sizes(T * K, E)
            assert all(large % small == 0 for large, small in itertools.pairwise(sizes))
            assert num_slots(T * K, E, sizes[-1]) <= 1.5 * T * K


def test_gradients_of_weights_add_up_in_float32_over_many_blocks():
    # One expert has 400 rows of bfloat16 in blocks of 8: added up in bfloat16 their sum would lose its last bits.
    rng = np.random.default_rng(0)
    weights = make_weights(1, D, F)
    x_SD, dy_SD = (jnp.asarray(1 + 0.1 * rng.standard_normal((400, D)), jnp.bfloat16) for _ in range(2))

    def gradient(mlp, dy_SD):
        return jax.jit(lambda weights: jax.vjp(mlp, weights)[1](dy_SD))(weights)

    got = gradient(lambda weights: blocked_mlp(weights, x_SD, jnp.asarray([400]), "swiglu", (8,)), dy_SD)
    whole = x_SD.astype(jnp.float32), dy_SD.astype(jnp.float32)
    want = gradient(lambda weights: one_expert(weights, 0, whole[0], "swiglu"), whole[1])
    # What is kept in between is bfloat16, with errors of either sign.
    assert_trees_close(got, want, 2.0**-9)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_a_gpu_blocks_equal_one_expert_after_the_other(dtype):
    assert_equals_one_by_one_on_a_gpu(functools.partial(in_blocks, sizes=(128, 32)), dtype)
