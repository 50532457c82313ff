"""Auxiliary losses and health metrics, on numbers worked by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model.moe.routing import top_k_plan
from moe_jax.model.moe.statistics import health_metrics, importance_loss, load_balancing_loss, router_z_loss


@functools.partial(jax.jit, static_argnames="top_k")
def statistics(logits_GTE, top_k=2, mask_GT=None):
    return jax.vmap(lambda logits, mask: top_k_plan(logits, top_k, mask))(logits_GTE, mask_GT).statistics


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_balanced_router_has_loss_one_for_any_number_of_choices(top_k):
    # Token t prefers experts t, t+1, ...: over 8 tokens each of the 4 experts is chosen equally often.
    base = -jnp.arange(4.0)
    logits = jnp.stack([jnp.roll(base, t) for t in range(8)])[None]
    np.testing.assert_allclose(load_balancing_loss(statistics(logits, top_k), "sequence", 1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(importance_loss(statistics(logits, top_k), "sequence", 1), 0.0, atol=1e-6)


def test_a_collapsed_router_has_loss_e():
    logits = jnp.zeros((1, 8, 4)).at[..., 2].set(50.0)
    np.testing.assert_allclose(load_balancing_loss(statistics(logits, 1), "sequence", 1), 4.0, rtol=1e-6)
    # Importance [0, 0, 8, 0]: mean 2, variance (4+4+36+4)/4 = 12, CV² = 3.
    np.testing.assert_allclose(importance_loss(statistics(logits, 1), "sequence", 1), 3.0, rtol=1e-6)


def test_load_balancing_by_hand():
    # Probabilities [1/8, 2/8, 5/8] and [4/8, 3/8, 1/8]; top-2 rows: experts 2, 1 and 0, 1: f = [1/4, 2/4, 1/4].
    logits = jnp.log(jnp.asarray([[[1.0, 2.0, 5.0], [4.0, 3.0, 1.0]]]))
    p = np.array([5 / 16, 5 / 16, 6 / 16])
    expected = 3 * (p @ [1 / 4, 2 / 4, 1 / 4])
    np.testing.assert_allclose(load_balancing_loss(statistics(logits), "sequence", 1), expected, rtol=1e-6)
    np.testing.assert_allclose(router_z_loss(statistics(logits), 2), np.log(8) ** 2, rtol=1e-6)


def test_scopes_differ_and_the_sequence_scope_adds_up_over_microbatches():
    logits = 2 * jax.random.normal(jax.random.key(0), (4, 16, 4))
    whole = statistics(logits)
    parts = [statistics(logits[:2]), statistics(logits[2:])]
    for loss in (load_balancing_loss, importance_loss):
        assert abs(float(loss(whole, "sequence", 4) - loss(whole, "batch", 1))) > 1e-3
        summed = sum(loss(part, "sequence", 4) for part in parts)
        np.testing.assert_allclose(summed, loss(whole, "sequence", 4), rtol=1e-6)
        by_group = [loss(statistics(logits[g : g + 1]), "batch", 1) for g in range(4)]
        np.testing.assert_allclose(np.mean(by_group), loss(whole, "sequence", 4), rtol=1e-6)


def test_padding_and_an_empty_sequence_change_nothing():
    logits = jax.random.normal(jax.random.key(0), (2, 6, 4))
    padded = jnp.full((3, 9, 4), jnp.nan).at[:2, :6].set(logits)
    mask = jnp.zeros((3, 9), bool).at[:2, :6].set(True)
    for loss in (load_balancing_loss, importance_loss):
        for scope, units in (("sequence", 2), ("batch", 1)):
            expected = loss(statistics(logits), scope, units)
            np.testing.assert_allclose(loss(statistics(padded, 2, mask), scope, units), expected, rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: load_balancing_loss(statistics(x, 2, mask), "sequence", 2)))(padded)
    assert np.all(np.isfinite(gradient))


def test_the_gradient_pushes_load_away_from_the_busy_expert():
    logits = jnp.zeros((1, 8, 4)).at[..., 2].set(1.0)
    gradient = jax.grad(lambda x: load_balancing_loss(statistics(x, 1), "sequence", 1))(logits)
    assert np.all(np.asarray(gradient)[..., 2] > 0)
    assert np.all(np.asarray(gradient)[..., [0, 1, 3]] < 0)


def test_health_metrics_by_hand():
    # 10 tokens, 2 choices, 4 experts: 20 rows a layer; layer 0 drops 4 of them.
    load_NE = jnp.asarray([[10.0, 9.0, 1.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
    health = health_metrics(load_NE, jnp.asarray([4.0, 0.0]), jnp.asarray([5.0, 10.0]), 10)
    np.testing.assert_allclose(health["load"][0], [0.5, 0.45, 0.05, 0.0], rtol=1e-6)
    np.testing.assert_allclose(health["max_load"], [2.0, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(health["dead_experts"], [1, 0])
    np.testing.assert_allclose(health["dropped_fraction"], [0.2, 0.0], rtol=1e-6)
    np.testing.assert_allclose(health["router_entropy"], [0.5, 1.0], rtol=1e-6)
    # A tenth of a balanced share is 0.5 rows: all but the dead expert have it, 7 of 8 pairs.
    np.testing.assert_allclose(health["expert_usage"], 87.5, rtol=1e-6)
    # (16 + 20) / 2 = 18 of 40 (token, expert) pairs are computed.
    np.testing.assert_allclose(health["sparsity"], 1 - 18 / 40, rtol=1e-6)
