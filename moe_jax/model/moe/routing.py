"""Routers: pure functions from one group's scores to a routing plan, in float32."""

import jax
import jax.numpy as jnp

from moe_jax.axes import Array
from moe_jax.model.moe.plan import RouterStatistics, RoutingPlan


def noisy_logits(router_logits_TE: Array, noise_scale_TE: Array, noise_key: Array) -> Array:
    """Adds Gaussian noise of learned scale to the scores (arXiv 1701.06538, eq. 4).

    H(x) = x·W_g + StandardNormal() · softplus(x·W_noise); ``noise_scale_TE`` is x·W_noise. Both [T, E] float32. The
    noisy scores then choose and weigh experts, and all statistics and losses are of them.
    """
    noise_TE = jax.random.normal(noise_key, router_logits_TE.shape, jnp.float32)
    return router_logits_TE + noise_TE * jax.nn.softplus(noise_scale_TE)


def top_k_plan(router_logits_TE: Array, top_k: int, token_mask_T: Array | None = None) -> RoutingPlan:
    """Sends each token to its ``top_k`` highest scores, weighted by a softmax over those (arXiv 1701.06538, eq. 3, 5).

    Equal to a softmax over all experts renormalised over the chosen ones. With ``top_k`` = 1 that weight would be 1
    whatever the score, and the router would have no gradient, so the probability itself is used instead, as in Switch
    (arXiv 2101.03961, eq. 2). Ties go to the lower expert. Masked tokens have no rows and count in no statistic.

    Args:
      router_logits_TE: [T, E] float32.
      top_k: experts per token, in [1, E].
      token_mask_T: [T] bool, True for real tokens; None: all are real.
    """
    T, E = router_logits_TE.shape
    if token_mask_T is not None:
        # Clears NaN from padding, so that 0 * NaN reaches neither values nor gradients.
        router_logits_TE = jnp.where(token_mask_T[:, None], router_logits_TE, 0.0)
    log_normaliser_T = jax.nn.logsumexp(router_logits_TE, axis=-1)
    log_probs_TE = router_logits_TE - log_normaliser_T[:, None]
    probs_TE = jnp.exp(log_probs_TE)
    chosen_logit_TK, expert_TK = jax.lax.top_k(router_logits_TE, top_k)
    combine_weight_TK = jax.nn.softmax(chosen_logit_TK, axis=-1) if top_k > 1 else jnp.max(probs_TE, -1, keepdims=True)
    entropy_T = -jnp.sum(probs_TE * log_probs_TE, axis=-1)
    real_T = jnp.ones(T, jnp.float32) if token_mask_T is None else token_mask_T.astype(jnp.float32)
    if token_mask_T is not None:
        expert_TK = jnp.where(token_mask_T[:, None], expert_TK, E)
        combine_weight_TK = jnp.where(token_mask_T[:, None], combine_weight_TK, 0.0)
    load_E = jnp.sum(expert_TK.reshape(-1, 1) == jnp.arange(E)[None, :], axis=0).astype(jnp.float32)
    statistics = RouterStatistics(
        num_tokens=jnp.sum(real_T),
        load_E=load_E,
        probs_E=jnp.sum(probs_TE * real_T[:, None], axis=0),
        squared_logsumexp=jnp.sum(log_normaliser_T**2 * real_T),
        entropy=jnp.sum(entropy_T * real_T),
    )
    return RoutingPlan(expert_TK=expert_TK, combine_weight_TK=combine_weight_TK, statistics=statistics)
