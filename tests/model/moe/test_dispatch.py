"""Backends on random plans: where rows go, what comes back, and what is left out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.model.mlp import ExpertWeights
from moe_jax.model.moe.backends import BACKENDS
from moe_jax.model.moe.dispatch import num_slots
from moe_jax.model.moe.plan import RoutingPlan
from moe_jax.model.moe.routing import top_k_plan
from tests.oracles.moe import assert_trees_close, keep, make_weights, moe_loop, with_gradients
from tests.oracles.programs import equations_of

NAMES = list(BACKENDS)
SHAPES = [(1, 1, 1, 1), (1, 1, 6, 2), (2, 5, 3, 2), (1, 9, 4, 4), (3, 4, 6, 1)]
"""(G, T, E, K), few, so that few programs are compiled."""


def make_plan(expert_GTK: np.ndarray, weight_GTK: np.ndarray, num_experts: int) -> RoutingPlan:
    G, T, K = expert_GTK.shape
    return RoutingPlan(jnp.asarray(expert_GTK), jnp.asarray(weight_GTK), _no_statistics(G, T, num_experts), T * K)


@functools.partial(jax.jit, static_argnames=("G", "T", "E"))
def _no_statistics(G, T, E):
    return jax.vmap(lambda logits_TE: top_k_plan(logits_TE, 1))(jnp.zeros((G, T, E))).statistics


@functools.partial(jax.jit, static_argnames=("name", "capacity"))
def dispatch(name, x_GTD, plan, scale_E, capacity):
    """Experts that multiply by a number of their own: whose number a row came back with tells where it was."""
    # relu(x) - relu(-x) is x, exactly.
    both_DF = jnp.concatenate([jnp.eye(3), -jnp.eye(3)], axis=1)[None]
    weights = ExpertWeights(both_DF * jnp.ones_like(scale_E)[:, None, None], scale_E[:, None, None] * both_DF.mT)
    return BACKENDS[name].run(x_GTD, plan, weights, "relu", capacity)


@st.composite
def plans(draw):
    """(experts [G, T, K] with E for no row, E): each token names K different experts, or less where it is E."""
    G, T, E, K = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    favourite = rng.integers(E)
    skew = draw(st.sampled_from([0.0, 1.0, 9.0]))
    scores_GTE = rng.random((G, T, E)) + skew * (np.arange(E) == favourite)
    expert_GTK = np.argsort(-scores_GTE, axis=-1)[..., :K].astype(np.int32)
    absent = rng.random((G, T, K)) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    return np.where(absent, E, expert_GTK), E


@given(plans(), st.sampled_from([2, None]))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_every_row_comes_back_from_its_expert_or_is_dropped_in_priority_order(plan, capacity):
    expert_GTK, E = plan
    G, T, K = expert_GTK.shape
    capacity = min(capacity or T, T)
    rng = np.random.default_rng(0)
    x_GTD = rng.standard_normal((G, T, 3)).astype(np.float32)
    weight_GTK = np.where(expert_GTK < E, rng.random((G, T, K)), 0).astype(np.float32)
    scale_E = 1 + np.arange(E, dtype=np.float32)
    for name in NAMES:
        if name == "pallas":  # compiled by the interpreter for each shape; tests/model/moe/kernels has its like
            continue
        limit = capacity if BACKENDS[name].has_slots else T
        kept = np.stack([keep(group, E, limit) for group in expert_GTK])
        factor_GTK = weight_GTK * kept * np.append(scale_E, 0)[expert_GTK]
        y_GTD, got_kept = dispatch(name, x_GTD, make_plan(expert_GTK, weight_GTK, E), scale_E, limit)
        np.testing.assert_array_equal(got_kept, kept, err_msg=name)
        want = x_GTD * factor_GTK.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(y_GTD, want, rtol=3e-6, atol=1e-6, err_msg=name)


def through_loop(weights, x_TD, plan, activation):
    every_TK = jnp.ones(plan.expert_TK.shape, bool)
    return moe_loop(x_TD, plan.combine_weight_TK, weights, plan.expert_TK, every_TK, activation)


@pytest.mark.parametrize(("activation", "bias"), [("swiglu", True), ("gelu", False), ("relu", True)])
@pytest.mark.parametrize("name", NAMES)
def test_every_backend_equals_the_loop_with_every_activation(name, activation, bias):
    weights = make_weights(4, 5, 6, activation=activation, bias=bias)
    x_TD, logits_TE, dy_TD = (jax.random.normal(jax.random.key(n), (9, width)) for n, width in enumerate((5, 4, 5)))
    plan = top_k_plan(logits_TE, 2)

    def through_backend(weights, x_TD, plan, activation):
        return BACKENDS[name].run(x_TD[None], jax.tree.map(lambda x: x[None], plan), weights, activation, 9)[0][0]

    got, want = (with_gradients(f, weights, x_TD, plan, activation, dy_TD) for f in (through_backend, through_loop))
    assert_trees_close(got, want, 4e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_tokens_rows_are_summed_in_float32(name):
    # 8 rows of weights that bfloat16 cannot hold and that add up to one: the token comes back as it went.
    weight_GTK = np.random.default_rng(0).dirichlet(np.ones(8), (1, 64)).astype(np.float32)
    expert_GTK = np.broadcast_to(np.arange(8, dtype=np.int32), (1, 64, 8))
    x_GTD = jax.random.normal(jax.random.key(0), (1, 64, 3)).astype(jnp.bfloat16)
    y_GTD, _ = dispatch(name, x_GTD, make_plan(expert_GTK, weight_GTK, 8), jnp.ones(8), 64)
    np.testing.assert_array_equal(y_GTD, x_GTD)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.sampled_from([1, 4, 8]))
@settings(derandomize=True, deadline=None)
def test_the_slots_of_sorted_rows_are_enough_for_any_load_and_no_more_than_one_can_need(load, multiple):
    def needed(load):
        return sum(-(-rows // multiple) * multiple for rows in load)

    E, R = len(load), sum(load)
    assert needed(load) <= num_slots(R, E, multiple)
    if R:  # the worst case: as many experts as can have one row, and the rest where it fits badly
        worst = [1] * min(R, E)
        worst[0] += R - len(worst)
        assert num_slots(R, E, multiple) - needed(worst) <= multiple


@pytest.mark.parametrize("name", ["gather", "ragged"])
def test_neither_pass_adds_rows_by_a_scatter(name):
    plan = make_plan(np.array([[[0, 1], [1, 2], [2, 0]]], np.int32), np.full((1, 3, 2), 0.5, np.float32), 3)

    def objective(x_GTD, weight_GTK):
        return jnp.sum(dispatch(name, x_GTD, plan.replace(combine_weight_TK=weight_GTK), jnp.ones(3), 2)[0] ** 2)

    gradient = jax.make_jaxpr(jax.grad(objective, argnums=(0, 1)))(jnp.ones((1, 3, 3)), plan.combine_weight_TK)
    equations = list(equations_of(gradient.jaxpr))
    assert "gather" in {equation.primitive.name for equation in equations}
    # Only index tables are scattered, and those are whole numbers.
    scattered = [equation for equation in equations if equation.primitive.name.startswith("scatter")]
    assert scattered
    assert all(jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.integer) for equation in scattered)
