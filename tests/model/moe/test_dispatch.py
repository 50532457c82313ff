"""Dispatchers by themselves, on random plans: where rows go, what comes back, and what is left out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import MoEConfig
from moe_jax.model.moe.dispatch import CAPACITY_DISPATCHERS, by_row_dispatch, num_slots, sorted_dispatch
from moe_jax.model.moe.plan import RoutingPlan, expert_capacity, place
from moe_jax.model.moe.routing import top_k_plan
from tests.oracles.moe import keep
from tests.oracles.programs import equations_of

SHAPES = [(1, 1, 1, 1), (2, 5, 3, 2), (1, 9, 4, 4), (3, 4, 6, 1)]
"""(G, T, E, K), few, so that few programs are compiled."""


def make_plan(expert_GTK: np.ndarray, weight_GTK: np.ndarray, num_experts: int) -> RoutingPlan:
    G, T, K = expert_GTK.shape
    statistics = jax.vmap(lambda logits: top_k_plan(logits, 1))(jnp.zeros((G, T, num_experts))).statistics
    return RoutingPlan(jnp.asarray(expert_GTK), jnp.asarray(weight_GTK), statistics, max_rows=T * K)


@functools.partial(jax.jit, static_argnames=("name", "capacity"))
def dispatch(name, x_GTD, plan, scale_E, capacity):
    """Experts that multiply by a number of their own: whose number a row came back with tells where it was."""
    E = scale_E.shape[0]
    if name == "sorted":

        def experts(x_SD, size_E):
            expert_S = jnp.repeat(jnp.arange(E), size_E, total_repeat_length=x_SD.shape[0])
            return x_SD * scale_E[expert_S][:, None]

        return sorted_dispatch(x_GTD, plan, E, 4, experts)
    if name == "by_row":
        return by_row_dispatch(x_GTD, plan, E, lambda x_RD, expert_R: x_RD * scale_E[expert_R][:, None])
    return CAPACITY_DISPATCHERS[name](x_GTD, plan, E, capacity, lambda x_ERD: x_ERD * scale_E[:, None, None])


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
    row_GTK = expert_GTK < E
    kept_GTK = np.stack([keep(group, E, capacity) for group in expert_GTK])
    for name, kept in (("einsum", kept_GTK), ("gather", kept_GTK), ("sorted", row_GTK), ("by_row", row_GTK)):
        factor_GTK = weight_GTK * kept * np.append(scale_E, 0)[expert_GTK]
        limit = capacity if name in CAPACITY_DISPATCHERS else None
        y_GTD, got_kept = dispatch(name, x_GTD, make_plan(expert_GTK, weight_GTK, E), scale_E, limit)
        np.testing.assert_array_equal(got_kept, kept, err_msg=name)
        want = x_GTD * factor_GTK.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(y_GTD, want, rtol=3e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", ["einsum", "gather", "sorted", "by_row"])
def test_a_tokens_rows_are_summed_in_float32(name):
    # 8 rows of weights that bfloat16 cannot hold and that add up to one: the token comes back as it went.
    weight_GTK = np.random.default_rng(0).dirichlet(np.ones(8), (1, 64)).astype(np.float32)
    expert_GTK = np.broadcast_to(np.arange(8, dtype=np.int32), (1, 64, 8))
    x_GTD = jax.random.normal(jax.random.key(0), (1, 64, 3)).astype(jnp.bfloat16)
    plan, capacity = make_plan(expert_GTK, weight_GTK, 8), 64 if name in CAPACITY_DISPATCHERS else None
    y_GTD, _ = dispatch(name, x_GTD, plan, jnp.ones(8, jnp.bfloat16), capacity)
    np.testing.assert_array_equal(y_GTD, x_GTD)


def test_placement_gives_slots_in_token_order():
    # Every token's first choice is expert 2 and its second expert 0, so both accept the first five tokens.
    expert_TK = jnp.broadcast_to(jnp.asarray([[2, 0]]), (12, 2))
    placement = place(expert_TK, 4, 5)
    np.testing.assert_array_equal(placement.kept_TK[:5], True)
    np.testing.assert_array_equal(placement.kept_TK[5:], False)
    np.testing.assert_array_equal(placement.position_TK[:, 0], np.arange(12))


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


@pytest.mark.parametrize("name", ["gather", "sorted"])
def test_neither_pass_adds_rows_by_a_scatter(name):
    plan = make_plan(np.array([[[0, 1], [1, 2], [2, 0]]], np.int32), np.full((1, 3, 2), 0.5, np.float32), 3)

    def objective(x_GTD, weight_GTK):
        return jnp.sum(dispatch(name, x_GTD, plan.replace(combine_weight_TK=weight_GTK), jnp.ones(3), 2)[0] ** 2)

    gradient = jax.make_jaxpr(jax.grad(objective, argnums=(0, 1)))(jnp.ones((1, 3, 2)), plan.combine_weight_TK)
    equations = list(equations_of(gradient.jaxpr))
    assert "gather" in {equation.primitive.name for equation in equations}
    # Only index tables are scattered, and those are whole numbers.
    scattered = [equation for equation in equations if equation.primitive.name.startswith("scatter")]
    assert scattered
    assert all(jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.integer) for equation in scattered)


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "factor", "capacity"),
    [
        (128, 2, 8, 1.25, 40),
        (10, 1, 8, 1.0, 2),  # 1.25 rounded up
        (160, 5, 8, 1.1, 110),  # not 111, though 100 * 1.1 is 110.00000000000001
        (16, 2, 4, 99.0, 16),  # an expert never sees a token twice
        (16, 2, 4, 1e-9, 1),
        (16, 2, 4, None, 16),
    ],
)
def test_expert_capacity(num_tokens, top_k, num_experts, factor, capacity):
    moe = MoEConfig(num_experts=num_experts, top_k=top_k, capacity_factor=factor)
    assert expert_capacity(moe, num_tokens, train=True) == capacity
    assert expert_capacity(moe, num_tokens, train=False) == num_tokens


def test_experts_that_choose_take_as_many_tokens_in_evaluation_as_in_training():
    moe = MoEConfig(num_experts=8, top_k=2, router="expert_choice", capacity_factor=1.25)
    assert expert_capacity(moe, 128, train=False) == expert_capacity(moe, 128, train=True) == 40
