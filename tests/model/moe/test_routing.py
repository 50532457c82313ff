"""The router's plan and statistics, on numbers worked by hand."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MoEConfig
from moe_jax.config.rules import ROUTER_RULES, router_rules
from moe_jax.model.moe import routing
from moe_jax.model.moe.backends import BACKENDS
from moe_jax.model.moe.bias import SHIFT_Q, tokens_in_reach, updated_bias
from moe_jax.model.moe.routing import ROUTERS, accepted_rows, expert_capacity, jittered, noisy_logits
from tests.oracles.moe import choose_tokens, shifts_to_share

# One program each, which compiles faster than its operations one by one.
SETTINGS = ("top_k", "renormalise", "num_expert_groups", "top_k_groups", "counts_reach")
top_k_plan = jax.jit(routing.top_k_plan, static_argnames=SETTINGS[:2])
sigmoid_bias_plan = jax.jit(routing.sigmoid_bias_plan, static_argnames=SETTINGS)
expert_choice_plan = jax.jit(routing.expert_choice_plan, static_argnames="capacity")


def test_a_plan_worked_by_hand():
    # softmax([ln 1, ln 2, ln 5]) = [1/8, 2/8, 5/8]: experts 2 and 1, weights 5/7 and 2/7.
    logits_TE = jnp.log(jnp.asarray([[1.0, 2.0, 5.0], [4.0, 3.0, 1.0]]))
    plan = top_k_plan(logits_TE, 2)
    np.testing.assert_array_equal(plan.expert_TK, [[2, 1], [0, 1]])
    np.testing.assert_allclose(plan.combine_weight_TK, [[5 / 7, 2 / 7], [4 / 7, 3 / 7]], rtol=1e-6)
    np.testing.assert_array_equal(plan.statistics.load_E, [1, 2, 1])
    np.testing.assert_allclose(plan.statistics.probs_E, [1 / 8 + 4 / 8, 2 / 8 + 3 / 8, 5 / 8 + 1 / 8], rtol=1e-6)
    raw = top_k_plan(logits_TE, 2, renormalise=False)
    np.testing.assert_allclose(raw.combine_weight_TK, [[5 / 8, 2 / 8], [4 / 8, 3 / 8]], rtol=1e-6)
    # Both rows sum to 8, so logsumexp = ln 8 twice.
    np.testing.assert_allclose(plan.statistics.squared_logsumexp, 2 * np.log(8) ** 2, rtol=1e-6)
    p, q = np.array([1, 2, 5]) / 8, np.array([4, 3, 1]) / 8
    np.testing.assert_allclose(plan.statistics.entropy, -(p * np.log(p)).sum() - (q * np.log(q)).sum(), rtol=1e-6)


def test_one_choice_is_weighted_by_its_probability_so_that_the_router_learns():
    logits_TE = jnp.log(jnp.asarray([[1.0, 2.0, 5.0]]))
    plan = top_k_plan(logits_TE, 1)
    np.testing.assert_allclose(plan.combine_weight_TK, [[5 / 8]], rtol=1e-6)
    gradient = jax.grad(lambda logits: top_k_plan(logits, 1).combine_weight_TK.sum())(logits_TE)
    assert np.all(np.asarray(gradient) != 0)


@pytest.mark.parametrize(("top_k", "renormalise"), [(1, True), (3, False)])
@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_weights_that_are_probabilities_are_exact_however_large_the_scores(top_k, renormalise, size):
    logits_TE = size + np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    plan = top_k_plan(jnp.asarray(logits_TE), top_k, renormalise=renormalise)
    odds_TE = np.exp(logits_TE.astype(np.float64) - size)
    probs_TE = odds_TE / odds_TE.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(plan.combine_weight_TK, -np.sort(-probs_TE)[:, :top_k], rtol=5e-7)


def test_masked_tokens_have_no_rows_and_count_in_no_statistic():
    logits_TE = jax.random.normal(jax.random.key(0), (6, 4))
    mask_T = jnp.asarray([True, False, True, True, False, True])
    masked = top_k_plan(jnp.where(mask_T[:, None], logits_TE, jnp.nan), 2, mask_T)
    alone = top_k_plan(logits_TE[mask_T], 2)
    np.testing.assert_array_equal(masked.expert_TK[~mask_T], 4)
    np.testing.assert_array_equal(masked.combine_weight_TK[~mask_T], 0)
    for got, want in zip(jax.tree.leaves(masked.statistics), jax.tree.leaves(alone.statistics), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_noise_has_the_learned_scale():
    scale_TE = jnp.broadcast_to(jnp.asarray([-3.0, 0.0, 3.0])[None, :], (20_000, 3))
    noise = noisy_logits(jnp.ones((20_000, 3)), scale_TE, jax.random.key(0)) - 1
    np.testing.assert_allclose(jnp.std(noise, axis=0), np.log1p(np.exp([-3.0, 0.0, 3.0])), rtol=0.03)
    gradient = jax.grad(lambda scale: jnp.sum(noisy_logits(jnp.zeros((4, 3)), scale, jax.random.key(0)) ** 2))
    assert np.all(np.asarray(gradient(jnp.zeros((4, 3)))) > 0), "a larger scale makes larger noise"


def logits_of(scores):
    """The logits whose sigmoid is ``scores``."""
    scores = jnp.asarray(scores)
    return jnp.log(scores) - jnp.log1p(-scores)


def test_a_sigmoid_plan_worked_by_hand():
    # s = [0.2, 0.6, 0.5, 0.3]; with the bias 0.2, 0.6, 0.5, 0.7: experts 3 and 1, weights 0.3/0.9 and 0.6/0.9.
    logits_TE = logits_of([[0.2, 0.6, 0.5, 0.3]])
    bias_E = jnp.asarray([0.0, 0.0, 0.0, 0.4])
    plan = sigmoid_bias_plan(logits_TE, bias_E, 2)
    np.testing.assert_array_equal(plan.expert_TK, [[3, 1]])
    np.testing.assert_allclose(plan.combine_weight_TK, [[1 / 3, 2 / 3]], rtol=1e-6)
    np.testing.assert_allclose(plan.statistics.probs_E, np.array([0.2, 0.6, 0.5, 0.3]) / 1.6, rtol=1e-6)
    np.testing.assert_array_equal(plan.statistics.load_E, [0, 1, 0, 1])
    raw = sigmoid_bias_plan(logits_TE, bias_E, 2, renormalise=False)
    np.testing.assert_allclose(raw.combine_weight_TK, [[0.3, 0.6]], rtol=1e-6)
    tiny = sigmoid_bias_plan(jnp.full((1, 4), -80.0), jnp.zeros(4), 2)
    np.testing.assert_allclose(tiny.combine_weight_TK, [[0.5, 0.5]], rtol=1e-6)
    # The bias chooses and does nothing else: it has no gradient.
    gradient = jax.grad(lambda bias: jnp.sum(sigmoid_bias_plan(logits_TE, bias, 2).combine_weight_TK ** 2))(bias_E)
    np.testing.assert_array_equal(gradient, 0)


def test_groups_are_judged_by_their_two_best_experts():
    # Groups {0,1,2}: 0.9 + 0.1, {3,4,5}: 0.6 + 0.6. The single best expert is not in the group that is taken.
    logits_TE = logits_of([[0.9, 0.1, 0.1, 0.6, 0.6, 0.1]])
    plan = sigmoid_bias_plan(logits_TE, jnp.zeros(6), 2, num_expert_groups=2, top_k_groups=1)
    np.testing.assert_array_equal(plan.expert_TK, [[3, 4]])
    # With so low a bias that every s + bias is negative, experts outside of the group are still refused.
    low = sigmoid_bias_plan(logits_TE, jnp.full(6, -2.0), 3, num_expert_groups=2, top_k_groups=1)
    np.testing.assert_array_equal(low.expert_TK, [[3, 4, 5]])


def test_the_bias_rises_for_the_underloaded_and_falls_for_the_overloaded():
    # Mean loads are 4 and 2; an expert at the mean stays as it is.
    load_NE = jnp.asarray([[6.0, 4.0, 2.0], [0.0, 6.0, 0.0]])
    bias_NE = updated_bias(jnp.asarray([[0.1, -0.2, 0.1], [0.0, 0.0, 0.0]]), load_NE, 0.03)
    np.testing.assert_allclose(bias_NE, [[0.07, -0.2, 0.13], [0.02, -0.04, 0.02]], rtol=1e-5)


def test_the_bias_does_not_drift_where_most_experts_are_always_below_the_mean():
    load_NE = jnp.asarray([[7.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 4.0]])
    bias_NE = jnp.full((2, 4), 97.0)  # as it was left by versions that let it
    for _ in range(3):
        bias_NE = updated_bias(bias_NE, load_NE, 0.5)
    np.testing.assert_allclose(bias_NE, [[-2.25, 0.75, 0.75, 0.75], [0.75, 0.75, 0.75, -2.25]], rtol=1e-6)


@pytest.mark.parametrize("num_experts", [7, 13, 14, 64])
def test_a_balanced_layer_keeps_its_bias_though_its_mean_load_is_rounded(num_experts):
    update = jax.jit(lambda load_NE: updated_bias(jnp.zeros((1, num_experts)), load_NE, 1.0))
    for load in (7.0, 13.0, 4097.0):
        np.testing.assert_array_equal(update(jnp.full((1, num_experts), load)), 0)


def quantile_plan(logits_TE, bias_E, top_k=2, mask_T=None):
    return sigmoid_bias_plan(logits_TE, bias_E, top_k, mask_T, counts_reach=True)


def test_a_bias_by_quantile_worked_by_hand():
    # Thresholds are 0.45, 0.4, 0.35, 0.5: expert 0 is above by 0.35, 0.3, 0.25, -0.3, and half of the tokens are two.
    biased_TE = jnp.asarray([[0.8, 0.1], [0.7, 0.1], [0.6, 0.1], [0.2, 0.8]])
    reach_EQ = tokens_in_reach(biased_TE, 1)
    for shift, counts in ((-2.0, [0, 0]), (0.0, [3, 1]), (2.0, [4, 4])):
        np.testing.assert_array_equal(reach_EQ[:, list(SHIFT_Q).index(shift)], counts)
    bias_E = updated_bias(jnp.zeros(2), jnp.asarray([3.0, 1.0]), 0.001, reach_EQ)
    assert -0.35 < bias_E[0] < -0.25
    np.testing.assert_allclose(bias_E[1], -bias_E[0], rtol=1e-6)


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (16, 1), (6, 5)])
def test_a_bias_by_quantile_is_that_of_sorted_margins_within_the_distance_of_two_counts(num_experts, top_k):
    rng = np.random.default_rng(0)
    biased_TE = rng.uniform(size=(960, num_experts)) + 0.3 * rng.standard_normal(num_experts)
    biased_TE = biased_TE.astype(np.float32)
    low_E, high_E = shifts_to_share(biased_TE, top_k)
    load_E = jnp.full(num_experts, 960 * top_k / num_experts)
    shift_E = np.asarray(updated_bias(jnp.zeros(num_experts), load_E, 0.0, tokens_in_reach(biased_TE, top_k)))
    middle_E = (low_E + high_E) / 2
    distance_E = np.diff(SHIFT_Q)[np.searchsorted(SHIFT_Q, middle_E) - 1]
    assert np.all(np.abs(shift_E - (middle_E - middle_E.mean())) < distance_E + distance_E.mean())


def test_skewed_scores_are_balanced_by_quantiles_within_a_few_steps_and_stay_so():
    rng = np.random.default_rng(0)
    logits_TE = jnp.asarray(rng.standard_normal((4096, 8)) + np.linspace(-2, 2, 8), jnp.float32)
    bias_E, worst = jnp.zeros(8), []
    for _ in range(8):
        statistics = quantile_plan(logits_TE, bias_E).statistics
        worst.append(float(statistics.load_E.max()) / 1024)
        bias_E = updated_bias(bias_E, statistics.load_E, 0.001, statistics.reach_EQ)
    assert worst[0] > 2
    assert worst[3] < 1.1
    assert max(worst[5:]) < 1.02


def test_counts_for_quantiles_add_up_over_any_split_and_masked_tokens_are_in_none():
    logits_TE = jax.random.normal(jax.random.key(0), (96, 4))
    whole_EQ = quantile_plan(logits_TE, jnp.zeros(4)).statistics.reach_EQ
    parts = [quantile_plan(logits_TE[first::3], jnp.zeros(4)).statistics.reach_EQ for first in range(3)]
    np.testing.assert_array_equal(sum(parts), whole_EQ)
    padded_TE = jnp.concatenate([logits_TE, jnp.full((7, 4), jnp.nan)])
    padded = quantile_plan(padded_TE, jnp.zeros(4), mask_T=jnp.arange(103) < 96)
    np.testing.assert_array_equal(padded.statistics.reach_EQ, whole_EQ)


def test_quantiles_of_no_token_and_of_experts_that_all_are_chosen_move_no_choice():
    nothing = updated_bias(jnp.asarray([0.5, -0.5]), jnp.zeros(2), 0.1, jnp.zeros((2, SHIFT_Q.size)))
    np.testing.assert_allclose(nothing, [0.5, -0.5], rtol=1e-6)
    statistics = quantile_plan(jnp.asarray([[0.0, 1.0], [2.0, 1.0]]), jnp.zeros(2)).statistics
    assert np.all(np.isfinite(updated_bias(jnp.zeros(2), statistics.load_E, 0.1, statistics.reach_EQ)))


def test_an_expert_choice_plan_worked_by_hand():
    # Expert 0 prefers tokens 0 and 2, expert 1 tokens 1 and 2: token 2 has two experts, and token 3 none.
    odds = jnp.asarray([[6.0, 2.0, 2.0], [1.0, 8.0, 1.0], [5.0, 4.0, 1.0], [1.0, 1.0, 8.0]])
    plan = expert_choice_plan(jnp.log(odds[:, :2]), 2)
    np.testing.assert_array_equal(plan.expert_TK, [[0, 2], [2, 1], [0, 2], [2, 1]])
    plan = expert_choice_plan(jnp.log(odds), 1)
    np.testing.assert_array_equal(plan.expert_TK, [[0, 3, 3], [3, 1, 3], [3, 3, 3], [3, 3, 2]])
    np.testing.assert_allclose(plan.combine_weight_TK, [[0.6, 0, 0], [0, 0.8, 0], [0, 0, 0], [0, 0, 0.8]], rtol=1e-6)
    np.testing.assert_array_equal(plan.statistics.load_E, [1, 1, 1])
    assert plan.max_rows == 3


def test_experts_that_choose_take_no_masked_token_though_they_have_room():
    mask_T = jnp.asarray([True, False, False])
    plan = expert_choice_plan(jnp.asarray([[1.0, 0.0], [jnp.nan, 5.0], [9.0, 9.0]]), 2, mask_T)
    np.testing.assert_array_equal(plan.expert_TK, [[0, 1], [2, 2], [2, 2]])
    np.testing.assert_array_equal(plan.statistics.load_E, [1, 1])
    np.testing.assert_array_equal(plan.statistics.num_tokens, 1)


@pytest.mark.parametrize("length", [8, 16, 64])
def test_experts_that_choose_take_as_many_tokens_however_long_the_padding(length):
    moe = MoEConfig(num_experts=8, top_k=2, router="expert_choice", capacity_factor=1.0)
    logits_TE = np.random.default_rng(0).standard_normal((8, 8))
    padded_TE = jnp.asarray(np.pad(logits_TE, ((0, length - 8), (0, 0)), constant_values=9.0), jnp.float32)
    plan = jax.jit(ROUTERS["expert_choice"].plan, static_argnums=3)(padded_TE, jnp.arange(length) < 8, None, moe)
    probs_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(plan.expert_TK[:8], choose_tokens(probs_TE, 2))  # 8 tokens, twice, over 8 experts
    np.testing.assert_array_equal(plan.expert_TK[8:], 8)


def test_capacity_by_the_real_tokens_is_rounded_as_without_padding():
    moe = MoEConfig(num_experts=8, top_k=5, capacity_factor=1.1)
    for num_real in (0, 1, 7, 160, 161):
        accepted = accepted_rows(moe, jnp.arange(200) < num_real)
        assert int(accepted) == expert_capacity(moe, num_real, train=True)


def test_equal_scores_are_settled_the_same_way_by_every_router():
    # Lower experts, lower groups and earlier tokens go first, whatever the device.
    equal_TE = jnp.zeros((3, 6))
    np.testing.assert_array_equal(top_k_plan(equal_TE, 3).expert_TK, [[0, 1, 2]] * 3)
    grouped = sigmoid_bias_plan(equal_TE, jnp.zeros(6), 2, num_expert_groups=3, top_k_groups=1)
    np.testing.assert_array_equal(grouped.expert_TK, [[0, 1]] * 3)
    np.testing.assert_array_equal(expert_choice_plan(equal_TE, 2).expert_TK < 6, [[True] * 6, [True] * 6, [False] * 6])


def test_jitter_multiplies_by_noise_around_one():
    x_TD = jnp.full((400, 50), 2.0)
    noisy = jittered(x_TD, 0.1, jax.random.key(0)) / x_TD
    assert 0.9 <= float(noisy.min()) < 0.901
    assert 1.099 < float(noisy.max()) <= 1.1
    np.testing.assert_allclose(jnp.mean(noisy), 1, atol=1e-3)


@pytest.mark.parametrize(
    ("router", "num_tokens", "top_k", "num_experts", "factor", "capacity"),
    [
        ("top_k", 128, 2, 8, 1.25, 40),
        ("expert_choice", 128, 2, 8, 1.25, 40),
        ("top_k", 10, 1, 8, 1.0, 2),  # 1.25 rounded up
        ("top_k", 160, 5, 8, 1.1, 110),  # not 111, though 100 * 1.1 is 110.00000000000001
        ("top_k", 16, 2, 4, 99.0, 16),  # an expert never sees a token twice
        ("top_k", 16, 2, 4, 1e-9, 1),
        ("top_k", 16, 2, 4, None, 16),
    ],
)
def test_expert_capacity(router, num_tokens, top_k, num_experts, factor, capacity):
    moe = MoEConfig(num_experts=num_experts, top_k=top_k, router=router, capacity_factor=factor)
    assert expert_capacity(moe, num_tokens, train=True) == capacity
    # Experts that choose take as many tokens in evaluation; for the others nothing is dropped there.
    assert expert_capacity(moe, num_tokens, train=False) == (capacity if router == "expert_choice" else num_tokens)


def test_the_settings_and_their_rules_know_the_same_routers_and_backends_as_the_model():
    settings = {name: set(typing.get_args(hint)) for name, hint in typing.get_type_hints(MoEConfig).items()}
    assert settings["router"] == set(ROUTERS) >= set(ROUTER_RULES)
    assert settings["dispatch"] == {"auto", *BACKENDS}
    for name, router in ROUTERS.items():
        assert router_rules(MoEConfig(router=name)).needs_capacity == router.has_own_capacity, name
