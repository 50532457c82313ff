"""The router's plan and statistics, on numbers worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.model.moe.routing import noisy_logits, top_k_plan


def test_a_plan_worked_by_hand():
    # softmax([ln 1, ln 2, ln 5]) = [1/8, 2/8, 5/8]: experts 2 and 1, weights 5/7 and 2/7.
    logits_TE = jnp.log(jnp.asarray([[1.0, 2.0, 5.0], [4.0, 3.0, 1.0]]))
    plan = top_k_plan(logits_TE, 2)
    np.testing.assert_array_equal(plan.expert_TK, [[2, 1], [0, 1]])
    np.testing.assert_allclose(plan.combine_weight_TK, [[5 / 7, 2 / 7], [4 / 7, 3 / 7]], rtol=1e-6)
    np.testing.assert_array_equal(plan.statistics.load_E, [1, 2, 1])
    np.testing.assert_allclose(plan.statistics.probs_E, [1 / 8 + 4 / 8, 2 / 8 + 3 / 8, 5 / 8 + 1 / 8], rtol=1e-6)
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


def test_ties_go_to_the_lower_expert():
    plan = top_k_plan(jnp.zeros((3, 5)), 2)
    np.testing.assert_array_equal(plan.expert_TK, [[0, 1]] * 3)


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
