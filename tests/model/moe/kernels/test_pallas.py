"""The kernels for GPUs against one expert after the other: interpreted on a CPU, and themselves on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MeshConfig, ModelConfig
from moe_jax.model.mlp import ExpertWeights
from moe_jax.model.moe.dispatch import sort_rows
from moe_jax.model.moe.kernels.grouped import Blocks, weight_gradient
from moe_jax.model.moe.kernels.pallas import Tuning, _shared_memory, grouped_mlp, pallas, tuning
from moe_jax.model.moe.plan import RoutingPlan
from moe_jax.model.moe.routing import top_k_plan
from moe_jax.sharding.mesh import make_mesh, on_each_device, use_mesh
from tests.oracles.moe import assert_trees_close, make_weights, moe_loop

# Several blocks of rows an expert, of columns and of depth; no width is a multiple of its block.
D, F, E, K, T = 24, 40, 5, 2, 90
SMALL = Tuning(*(Blocks(16, 16, 16, warps=4, stages=2),) * 5)
LOADS = {"even": 0.0, "skewed": 3.0, "one takes all": 50.0}


def make_plan(
    skew: float, absent: float = 0.0, seed: int = 0, num_experts: int = E, num_tokens: int = T
) -> RoutingPlan:
    """A plan in which expert 1 is liked more by ``skew``, expert 3 never chosen, and some rows are none."""
    rng = np.random.default_rng(seed)
    logits_TE = rng.standard_normal((num_tokens, num_experts)) + skew * (np.arange(num_experts) == 1)
    logits_TE[:, 3] = -1e9
    plan = top_k_plan(jnp.asarray(logits_TE, jnp.float32), K)
    is_row_TK = rng.random((num_tokens, K)) >= absent
    plan = plan.replace(
        expert_TK=jnp.where(is_row_TK, plan.expert_TK, num_experts),
        combine_weight_TK=jnp.where(is_row_TK, plan.combine_weight_TK, 0.0),
    )
    return jax.tree.map(lambda leaf: leaf[None], plan)


@functools.partial(jax.jit, static_argnames=("activation", "tuned"))
def by_kernels(weights: ExpertWeights, x_TD, plan: RoutingPlan, dy_TD, activation: str, tuned: Tuning):
    """(y, gradients of weights, tokens and combine weights)."""
    rows = sort_rows(plan, weights.w_up_EDF.shape[0], tuned.rows)
    mlp = functools.partial(_positional, rows=rows, activation=activation, tuned=tuned)
    y_TD, vjp = jax.vjp(mlp, weights, x_TD, plan.combine_weight_TK[0])
    return y_TD, vjp(dy_TD)


def _positional(weights, x_TD, weight_TK, rows, activation, tuned):
    return grouped_mlp(weights, x_TD, weight_TK, rows, activation, tuned)  # a custom_vjp takes its arguments by place


@functools.partial(jax.jit, static_argnames="activation")
def by_loop(weights: ExpertWeights, x_TD, plan: RoutingPlan, dy_TD, activation: str):
    expert_TK = plan.expert_TK[0]

    def loop(weights, x_TD, weight_TK):
        is_row_TK = expert_TK < weights.w_up_EDF.shape[0]
        return moe_loop(x_TD, weight_TK, weights, expert_TK, is_row_TK, activation).astype(x_TD.dtype)

    with jax.default_matmul_precision("highest"):
        y_TD, vjp = jax.vjp(loop, weights, x_TD, plan.combine_weight_TK[0])
        return y_TD, vjp(dy_TD)


@pytest.mark.parametrize(("load", "activation"), [*((load, "swiglu") for load in LOADS), ("skewed", "gelu")])
def test_kernels_equal_one_expert_after_the_other(load, activation):
    weights = make_weights(E, D, F, activation=activation, bias=True)
    x_TD, dy_TD = np.random.default_rng(1).standard_normal((2, T, D)).astype(np.float32)
    plan = make_plan(LOADS[load], absent=0.3)
    got = by_kernels(weights, x_TD, plan, dy_TD, activation, SMALL)
    want = by_loop(weights, x_TD, plan, dy_TD, activation)
    assert_trees_close(got, want, 3e-6)


def test_no_rows_at_all_give_zeros():
    weights = make_weights(E, D, F)
    x_TD = np.ones((T, D), np.float32)
    y_TD, gradients = by_kernels(weights, x_TD, make_plan(0.0, absent=1.1), x_TD, "swiglu", SMALL)
    assert all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves((y_TD, gradients)))


def test_one_token_and_the_blocks_chosen_for_it():
    weights, plan = make_weights(E, D, F), make_plan(0.0, num_tokens=1)
    x_TD, dy_TD = np.random.default_rng(1).standard_normal((2, 1, D)).astype(np.float32)
    got = by_kernels(weights, x_TD, plan, dy_TD, "swiglu", tuning(K, E, D, F, jnp.dtype("float32"), 99 * 1024))
    assert_trees_close(got, by_loop(weights, x_TD, plan, dy_TD, "swiglu"), 3e-6)


def test_bfloat16_is_as_near_as_its_own_rounding():
    weights = make_weights(E, D, F)
    x_TD, dy_TD = np.random.default_rng(1).standard_normal((2, T, D)).astype(jnp.bfloat16)
    plan = make_plan(1.0)
    got = by_kernels(weights, x_TD, plan, dy_TD, "swiglu", SMALL)
    # Gradients of float32 parameters are float32 and are summed so.
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got[1][0]))
    exact = by_loop(weights, x_TD.astype(jnp.float32), plan, dy_TD.astype(jnp.float32), "swiglu")
    rounded = by_loop(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights), x_TD, plan, dy_TD, "swiglu")
    for ours, plain, want in zip(*map(jax.tree.leaves, (got, rounded, exact)), strict=True):
        assert _distance(ours, want) <= 2 * _distance(plain, want)


def _distance(got, want) -> float:
    """The relative L2 norm of the difference."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.slow  # tests/training/test_meshes.py has it on eight
def test_two_devices_compute_what_one_does():
    x_GTD = jnp.asarray(np.random.default_rng(1).standard_normal((2, 8, D)), jnp.float32)
    plan = jax.vmap(lambda logits_TE: top_k_plan(logits_TE, K))(x_GTD[..., :E])

    def loss(weights):
        y_GTD, _ = on_each_device(lambda own, weights: pallas(*own, weights, "swiglu", 8), (x_GTD, plan), weights)
        return jnp.sum(y_GTD * x_GTD), y_GTD

    weights = make_weights(E, D, F)
    one = jax.jit(jax.grad(loss, has_aux=True))(weights)
    with use_mesh(make_mesh(MeshConfig(data=2), ModelConfig(), 2)):
        two = jax.jit(jax.grad(loss, has_aux=True))(weights)
    assert len(two[1].sharding.device_set) == 2
    assert_trees_close(two, one, 3e-6)


def test_blocks_past_the_last_experts_reach_nothing():
    # Slots of no expert are never written, and hold what was in memory: here NaN.
    x_SD, dy_SF = jnp.full((64, D), jnp.nan).at[:32].set(1.0), jnp.full((64, F), jnp.nan).at[:32].set(1.0)
    dw_EDF = weight_gradient(jnp.asarray([16, 0, 16]), x_SD, dy_SF, jnp.dtype("float32"), SMALL.up_gradient)
    np.testing.assert_array_equal(dw_EDF, np.broadcast_to([[[16.0]], [[0.0]], [[16.0]]], (3, D, F)))


@pytest.mark.parametrize("shared_memory", [99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("num_rows", [1, 100, 5_000, 1_000_000])
def test_blocks_fit_the_shared_memory_and_each_other(num_rows, dtype, shared_memory):
    tuned = tuning(num_rows, 8, 1024, 1280, jnp.dtype(dtype), shared_memory)
    for name, blocks in dataclasses.asdict(tuned).items():
        if name in ("up_gradient", "down_gradient"):
            assert tuned.rows % blocks["depth"] == 0, "a block of the weights' gradient is of one expert"
        else:
            assert blocks["rows"] == tuned.rows, "experts' rows are rounded up once"
        matrices = 2 if name == "hidden" else 1
        elements = blocks["depth"] * (blocks["rows"] + matrices * blocks["columns"])
        assert blocks["stages"] * elements * jnp.dtype(dtype).itemsize <= shared_memory


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(128, 256, 4096), (96, 264, 300), (64, 40, 3)])
def test_on_a_gpu_kernels_equal_one_expert_after_the_other(shape, dtype):
    D, F, T = shape
    weights, plan = make_weights(E, D, F, bias=True), make_plan(2.0, absent=0.1, num_tokens=T)
    x_TD, dy_TD = (jax.random.normal(jax.random.key(n), (T, D)).astype(dtype) for n in range(2))
    exact = by_loop(weights, x_TD.astype(jnp.float32), plan, dy_TD.astype(jnp.float32), "swiglu")
    with jax.default_matmul_precision("highest"):
        got = by_kernels(
            weights, x_TD, plan, dy_TD, "swiglu", tuning(T * K, E, D, F, jnp.dtype(dtype), _shared_memory())
        )
    for ours, want in zip(*map(jax.tree.leaves, (got, exact)), strict=True):
        assert _distance(ours, want) <= (1e-5 if dtype == "float32" else 2e-2)
