"""Routers: pure functions from one group's scores to a routing plan, in float32, and the table of them.

A router of the first kind lets each token choose its experts: ``top_k_plan`` and ``sigmoid_bias_plan``, on scores that
``noisy_scores`` or ``jittered_scores`` may perturb in training. ``expert_choice_plan`` lets each expert choose tokens.
Ties go to the lower expert, or to the earlier token. A masked token has no rows and counts in no statistic.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moe_jax.axes import Array
from moe_jax.config import MoEConfig
from moe_jax.model.layers import float32_product
from moe_jax.model.moe.bias import tokens_in_reach
from moe_jax.model.moe.plan import RoutingPlan, chosen_experts
from moe_jax.model.moe.statistics import RouterStatistics

# Accelerators round float32 factors by default, to 10 bits or fewer: enough to choose another expert.
_product = functools.partial(float32_product, precision=jax.lax.Precision.HIGHEST)


def scores(x_GTD: Array, router_DE: Array, noise_DE: Array | None, keys_G: Array | None, moe: MoEConfig) -> Array:
    """The router's logits x·W_r, [G, T, E], of float32 tokens."""
    return _product(x_GTD, router_DE)


def noisy_scores(
    x_GTD: Array, router_DE: Array, noise_DE: Array | None, keys_G: Array | None, moe: MoEConfig
) -> Array:
    """``scores``, with noise of the learned scale x·W_noise where keys are given, one a group."""
    logits_GTE = _product(x_GTD, router_DE)
    if keys_G is None or noise_DE is None:
        return logits_GTE
    return jax.vmap(noisy_logits)(logits_GTE, _product(x_GTD, noise_DE), keys_G)


def jittered_scores(
    x_GTD: Array, router_DE: Array, noise_DE: Array | None, keys_G: Array | None, moe: MoEConfig
) -> Array:
    """``scores`` of a jittered input where keys are given, one a group."""
    if keys_G is not None:
        x_GTD = jax.vmap(lambda x_TD, key: jittered(x_TD, moe.router_jitter, key))(x_GTD, keys_G)
    return _product(x_GTD, router_DE)


def noisy_logits(router_logits_TE: Array, noise_scale_TE: Array, noise_key: Array) -> Array:
    """Adds Gaussian noise of learned scale to the scores (arXiv 1701.06538, eq. 4).

    H(x) = x·W_g + StandardNormal() · softplus(x·W_noise); ``noise_scale_TE`` is x·W_noise. Both [T, E] float32. The
    noisy scores then choose and weigh experts, and all statistics and losses are of them.
    """
    noise_TE = jax.random.normal(noise_key, router_logits_TE.shape, jnp.float32)
    return router_logits_TE + noise_TE * jax.nn.softplus(noise_scale_TE)


def jittered(x_TD: Array, jitter: float, noise_key: Array) -> Array:
    """Multiplies the router's input by uniform noise in [1 - ε, 1 + ε], element by element (Switch, arXiv 2101.03961,
    appendix C, "input jitter"). Only the router sees it; the experts get the clean input."""
    return x_TD * jax.random.uniform(noise_key, x_TD.shape, x_TD.dtype, 1.0 - jitter, 1.0 + jitter)


def top_k_plan(
    router_logits_TE: Array, top_k: int, token_mask_T: Array | None = None, *, renormalise: bool = True
) -> RoutingPlan:
    """Sends each token to its ``top_k`` highest scores, weighted by their softmax (arXiv 1701.06538, eq. 3, 5).

    Renormalised, the weights are a softmax over the chosen scores alone, which equals a softmax over all experts
    divided by its sum over the chosen ones (Mixtral, arXiv 2401.04088, section 2.1). Otherwise they are the
    probabilities among all experts themselves (OLMoE, arXiv 2409.02060). With ``top_k`` = 1 a renormalised weight
    would be 1 whatever the score, and the router would have no gradient, so there it is always the probability, as in
    Switch (arXiv 2101.03961, eq. 2).

    Args:
      router_logits_TE: [T, E] float32.
      top_k: experts per token, in [1, E].
      token_mask_T: [T] bool, True for real tokens; None: all are real.

    >>> plan = top_k_plan(jnp.log(jnp.array([[1.0, 2.0, 5.0]])), top_k=2)  # probabilities 1/8, 2/8, 5/8
    >>> print(plan.expert_TK, plan.combine_weight_TK.round(4))  # 5/7 and 2/7
    [[2 1]] [[0.7143 0.2857]]
    """
    router_logits_TE = _clear_masked(router_logits_TE, token_mask_T)
    log_probs_TE = jax.nn.log_softmax(router_logits_TE)
    chosen_logit_TK, expert_TK = jax.lax.top_k(router_logits_TE, top_k)
    if renormalise and top_k > 1:
        weight_TK = jax.nn.softmax(chosen_logit_TK, axis=-1)
    else:
        weight_TK = jnp.exp(jnp.take_along_axis(log_probs_TE, expert_TK, axis=1))
    return _plan(expert_TK, weight_TK, router_logits_TE, log_probs_TE, token_mask_T)


def sigmoid_bias_plan(
    router_logits_TE: Array,
    expert_bias_E: Array,
    top_k: int,
    token_mask_T: Array | None = None,
    *,
    num_expert_groups: int = 1,
    top_k_groups: int = 1,
    renormalise: bool = True,
    counts_reach: bool = False,
) -> RoutingPlan:
    """Chooses by sigmoid score plus a balancing bias, and weighs by the score alone (DeepSeek-V3, arXiv 2412.19437).

    s = σ(router_logits) (eq. 15); the ``top_k`` highest s + bias are chosen (eq. 16); the weights are s over their sum
    (eq. 13), or s itself where not renormalised and, so that the router has a gradient, where ``top_k`` is 1. With
    groups, only experts of the ``top_k_groups`` groups with the highest sum of their two best s + bias may be chosen:
    as its authors' code does, where the paper (section 2.1.2, node-limited routing) sums the K / ``top_k_groups``
    best. The bias has no gradient: ``updated_bias`` moves it.

    The statistics take s over its sum over all experts as the probabilities (eq. 19).

    Args:
      router_logits_TE: [T, E] float32.
      expert_bias_E: [E] float32.
      top_k: in [1, E / num_expert_groups · top_k_groups].
      token_mask_T: [T] bool, True for real tokens; None: all are real.
      counts_reach: the statistics have ``tokens_in_reach`` too, without regard to groups.
    """
    T, E = router_logits_TE.shape
    router_logits_TE = _clear_masked(router_logits_TE, token_mask_T)
    log_score_TE = jax.nn.log_sigmoid(router_logits_TE)
    biased_TE = jax.lax.stop_gradient(jnp.exp(log_score_TE) + expert_bias_E[None, :])
    reach_EQ = tokens_in_reach(biased_TE, top_k, token_mask_T) if counts_reach else None
    if num_expert_groups > 1:
        grouped = biased_TE.reshape(T, num_expert_groups, E // num_expert_groups)  # experts of a group lie together
        best_two = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0]
        allowed_groups = jax.lax.top_k(jnp.sum(best_two, axis=-1), top_k_groups)[1]
        allowed = chosen_experts(allowed_groups, num_expert_groups)
        biased_TE = jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(T, E)
    expert_TK = jax.lax.top_k(biased_TE, top_k)[1]
    log_weight_TK = jnp.take_along_axis(log_score_TE, expert_TK, axis=1)
    # In logarithms: scores as small as 1e-30 still give weights that sum to one.
    weight_TK = jax.nn.softmax(log_weight_TK, axis=-1) if renormalise and top_k > 1 else jnp.exp(log_weight_TK)
    plan = _plan(expert_TK, weight_TK, router_logits_TE, jax.nn.log_softmax(log_score_TE), token_mask_T)
    return plan.replace(statistics=plan.statistics.replace(reach_EQ=reach_EQ))


def expert_choice_plan(
    router_logits_TE: Array, capacity: int, token_mask_T: Array | None = None, accepted: Array | None = None
) -> RoutingPlan:
    """Each expert takes the ``capacity`` tokens that score it highest (Expert Choice, arXiv 2202.09368, eq. 1-2).

    S = softmax over experts; expert e takes the largest entries of column e, and the weight of a row is its entry. A
    token may end up with any number of experts, none included, and its choice depends on *later* tokens of its group:
    the router is not causal.

    Args:
      router_logits_TE: [T, E] float32.
      capacity: tokens that an expert takes, in [1, T]; fewer where fewer are real.
      token_mask_T: [T] bool, True for real tokens; None: all are real.
      accepted: [] int32, how many of the ``capacity`` each expert takes, as fewer tokens are real; None: all.
    """
    T, E = router_logits_TE.shape
    router_logits_TE = _clear_masked(router_logits_TE, token_mask_T)
    log_probs_TE = jax.nn.log_softmax(router_logits_TE)
    score_TE = log_probs_TE if token_mask_T is None else jnp.where(token_mask_T[:, None], log_probs_TE, -jnp.inf)
    token_EC = jax.lax.top_k(score_TE.T, capacity)[1]
    is_taken_C = True if accepted is None else (jnp.arange(capacity) < accepted)[None, :]  # the best come first
    chosen_TE = jnp.zeros((T, E), bool).at[token_EC, jnp.arange(E)[:, None]].set(is_taken_C)
    expert_TE = jnp.where(chosen_TE, jnp.arange(E)[None, :], E)
    weight_TE = jnp.where(chosen_TE, jnp.exp(log_probs_TE), 0.0)
    plan = _plan(expert_TE, weight_TE, router_logits_TE, log_probs_TE, token_mask_T)
    return plan.replace(max_rows=E * capacity)


def _clear_masked(router_logits_TE: Array, token_mask_T: Array | None) -> Array:
    """Zeros for masked tokens, so that a NaN in padding, times zero, reaches neither values nor gradients."""
    return router_logits_TE if token_mask_T is None else jnp.where(token_mask_T[:, None], router_logits_TE, 0.0)


def _plan(
    expert_TK: Array, weight_TK: Array, router_logits_TE: Array, log_probs_TE: Array, token_mask_T: Array | None
) -> RoutingPlan:
    """The plan of the given choice, without masked tokens' rows, and its statistics."""
    T, E = router_logits_TE.shape
    real_T = jnp.ones(T, jnp.float32)
    if token_mask_T is not None:
        real_T = token_mask_T.astype(jnp.float32)
        expert_TK = jnp.where(token_mask_T[:, None], expert_TK, E)
        weight_TK = jnp.where(token_mask_T[:, None], weight_TK, 0.0)
    probs_TE = jnp.exp(log_probs_TE)
    statistics = RouterStatistics(
        num_tokens=jnp.sum(real_T),
        load_E=jnp.sum(chosen_experts(expert_TK, E).astype(jnp.float32), axis=0),
        probs_E=jnp.sum(probs_TE * real_T[:, None], axis=0),
        squared_logsumexp=jnp.sum(jax.nn.logsumexp(router_logits_TE, axis=-1) ** 2 * real_T),
        entropy=-jnp.sum(probs_TE * log_probs_TE * real_T[:, None]),
    )
    return RoutingPlan(expert_TK, weight_TK, statistics, max_rows=expert_TK.size)


def expert_capacity(moe: MoEConfig, num_tokens: int, *, train: bool) -> int:
    """Rows that one expert accepts from a group of ``num_tokens``: ceil(T·K/E · capacity_factor), or all T.

    >>> expert_capacity(MoEConfig(num_experts=8, top_k=2, capacity_factor=1.25), 10, train=True)  # 10·2/8 · 1.25 = 3.1
    4
    """
    if moe.capacity_factor is None or not limits_capacity(moe, train=train):
        return num_tokens
    # Rounded first: 10 rows at a factor of 1.1 are 11, not ceil(11.000000000000002).
    rows = round(num_tokens * moe.top_k / moe.num_experts * moe.capacity_factor, 6)
    return min(num_tokens, max(1, math.ceil(rows)))


def accepted_rows(moe: MoEConfig, token_mask_T: Array) -> Array:
    """``expert_capacity`` in training by the number of real tokens, [] int32, however long the padding is."""
    # One entry for each number of tokens, so that both round alike.
    capacities = [expert_capacity(moe, num_tokens, train=True) for num_tokens in range(token_mask_T.size + 1)]
    return jnp.asarray(capacities, jnp.int32)[jnp.sum(token_mask_T)]


def limits_capacity(moe: MoEConfig, *, train: bool) -> bool:
    """Whether experts accept a limited number of rows: in training with a capacity factor, or where they choose.

    Outside of training nothing is dropped, so that a token's output does not depend on its neighbours' choices.
    """
    return ROUTERS[moe.router].has_own_capacity or (train and moe.capacity_factor is not None)


def _token_choice(
    logits_TE: Array, token_mask_T: Array | None, expert_bias_E: Array | None, moe: MoEConfig
) -> RoutingPlan:
    return top_k_plan(logits_TE, moe.top_k, token_mask_T, renormalise=moe.renormalise)


def _biased_choice(
    logits_TE: Array, token_mask_T: Array | None, expert_bias_E: Array | None, moe: MoEConfig
) -> RoutingPlan:
    if expert_bias_E is None:
        raise ValueError("sigmoid_bias needs its router state expert_bias_E, got None; pass initial_expert_bias")
    return sigmoid_bias_plan(
        logits_TE,
        expert_bias_E,
        moe.top_k,
        token_mask_T,
        num_expert_groups=moe.num_expert_groups,
        top_k_groups=moe.top_k_groups,
        renormalise=moe.renormalise,
        counts_reach=moe.bias_update == "quantile",
    )


def _expert_choice(
    logits_TE: Array, token_mask_T: Array | None, expert_bias_E: Array | None, moe: MoEConfig
) -> RoutingPlan:
    accepted = None if token_mask_T is None else accepted_rows(moe, token_mask_T)
    return expert_choice_plan(logits_TE, expert_capacity(moe, logits_TE.shape[0], train=True), token_mask_T, accepted)


@dataclass(frozen=True)
class Router:
    """A way of choosing experts, and what the rest of the package has to know of it."""

    plan: Callable[[Array, Array | None, Array | None, MoEConfig], RoutingPlan]
    """(router_logits_TE, token_mask_T, expert_bias_E, settings) -> the plan of one group."""
    score: Callable[[Array, Array, Array | None, Array | None, MoEConfig], Array] = scores
    """(x_GTD, router_DE, noise_DE, keys_G, settings) -> router_logits_GTE."""
    has_noise: bool = False
    """``score`` draws random numbers in training."""
    has_noise_matrix: bool = False
    """``score`` takes a second parameter [D, E], the scale of the noise."""
    has_state: bool = False
    """``plan`` takes a bias [E], which each optimizer step moves by the load (``updated_bias``)."""
    has_own_capacity: bool = False
    """Experts choose tokens, K = E: they take as many as their capacity, in evaluation too."""
    is_causal: bool = True
    """A token's rows do not depend on later tokens, as sampling needs."""


ROUTERS = {
    "top_k": Router(_token_choice),
    "noisy_top_k": Router(_token_choice, noisy_scores, has_noise=True, has_noise_matrix=True),
    "switch": Router(_token_choice, jittered_scores, has_noise=True),
    "expert_choice": Router(_expert_choice, has_own_capacity=True, is_causal=False),
    "sigmoid_bias": Router(_biased_choice, has_state=True),
}
"""By the names of ``model.moe.router``."""


def is_causal(moe: MoEConfig) -> bool:
    """Whether no token's experts depend on later tokens, as sampling needs; so too in a dense model."""
    return not moe.num_experts or ROUTERS[moe.router].is_causal
