"""What routing did: statistics of a MoE layer, and the auxiliary losses and health metrics that are functions of them.

Statistics arrive with a leading axis G, one entry a sequence. ``scope`` says over what a nonlinear loss is taken:
"sequence": each group by itself, then the mean, which is linear and so exact under accumulation and any number of
devices; "batch": all groups given, over all devices (one microbatch, where gradients are accumulated).
Each loss is a sum divided by the count of the whole optimizer batch, so the losses of microbatches simply add up.
"""

from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from moe_jax.axes import Array

Scope = Literal["sequence", "batch"]


class RouterStatistics(flax.struct.PyTreeNode):
    """What one group's router did, as float32 sums over its real tokens, which add up over any split."""

    num_tokens: Array
    """[] real (not masked) tokens."""
    load_E: Array
    """[E] rows sent to each expert, before any is dropped."""
    probs_E: Array
    """[E] summed normalised scores."""
    squared_logsumexp: Array
    """[] summed logsumexp(router_logits)², the router z-loss before its mean."""
    entropy: Array
    """[] summed entropy of the normalised scores, in nats."""
    reach_EQ: Array | None = None
    """[E, Q] tokens that would choose each expert at each shift of its bias, where quantiles set the bias."""


class MoEStatistics(flax.struct.PyTreeNode):
    """What one layer's routing did to each of G groups; every leaf has a leading axis G."""

    router: RouterStatistics
    num_dropped: Array
    """[G] rows over capacity."""


class RoutingTotals(flax.struct.PyTreeNode):
    """Router statistics of N MoE layers, summed over tokens."""

    num_tokens: Array
    load_NE: Array
    dropped_N: Array
    entropy_N: Array
    reach_NEQ: Array | None = None


def routing_totals(statistics: MoEStatistics) -> RoutingTotals:
    """Sums [N, G, ...] statistics over the groups."""
    return RoutingTotals(
        num_tokens=jnp.sum(statistics.router.num_tokens[0]),
        load_NE=jnp.sum(statistics.router.load_E, axis=1),
        dropped_N=jnp.sum(statistics.num_dropped, axis=1),
        entropy_N=jnp.sum(statistics.router.entropy, axis=1),
        reach_NEQ=jax.tree.map(lambda reach_NGEQ: jnp.sum(reach_NGEQ, axis=1), statistics.router.reach_EQ),
    )


def load_balancing_loss(statistics: RouterStatistics, scope: Scope, num_units: Array | float) -> Array:
    """E · Σ_e f_e · p_e (Switch, arXiv 2101.03961, eq. 4-6): 1 when balanced, E/K at the worst.

    f_e is the fraction of *rows* sent to expert e before drops (Switch has one row a token, so there rows are tokens)
    and p_e the mean normalised score. f_e has no gradient. ``num_units``: sequences with a token, or microbatches
    under scope "batch", of the whole optimizer batch.

    >>> one = jnp.ones(1)  # one sequence of 4 tokens with one row each, 3 of them to expert 0; E = 2
    >>> statistics = RouterStatistics(4 * one, jnp.array([[3.0, 1.0]]), jnp.array([[2.5, 1.5]]), one, one)
    >>> float(load_balancing_loss(statistics, "sequence", num_units=1))  # 2 · (3/4 · 2.5/4 + 1/4 · 1.5/4)
    1.125
    """
    load_UE, probs_UE = _units(statistics, scope)
    E = load_UE.shape[-1]
    rows_U = jnp.maximum(jnp.sum(load_UE, axis=-1), 1.0)
    tokens_U = jnp.maximum(jnp.sum(probs_UE, axis=-1), 1e-9)
    return jnp.sum(E * jnp.sum(load_UE * probs_UE, axis=-1) / (rows_U * tokens_U)) / num_units


def importance_loss(statistics: RouterStatistics, scope: Scope, num_units: Array | float) -> Array:
    """Squared coefficient of variation of the router probabilities (arXiv 1701.06538, eq. 6-7): 0 when balanced.

    The paper sums the gates after the top-k; the probabilities before it, used here, give every expert a gradient.
    """
    _, probs_UE = _units(statistics, scope)
    mean_U = jnp.maximum(jnp.mean(probs_UE, axis=-1), 1e-9)
    return jnp.sum(jnp.var(probs_UE, axis=-1) / mean_U**2) / num_units


def router_z_loss(statistics: RouterStatistics, num_tokens: Array | float) -> Array:
    """Mean over the whole batch's tokens of logsumexp(router_logits)² (ST-MoE, arXiv 2202.08906, eq. 5).

    >>> no = jnp.zeros(1)  # one sequence of two tokens, whose logsumexp is 1 and 3: (1² + 3²) / 2
    >>> float(router_z_loss(RouterStatistics(2 + no, no[None], no[None], jnp.array([1.0 + 9.0]), no), num_tokens=2))
    5.0
    """
    return jnp.sum(statistics.squared_logsumexp) / num_tokens


def _units(statistics: RouterStatistics, scope: Scope) -> tuple[Array, Array]:
    """Load and summed probabilities [U, E] of each unit that the loss is taken over; an empty group counts nothing."""
    load_GE, probs_GE = jax.lax.stop_gradient(statistics.load_E), statistics.probs_E
    if scope == "batch":
        return jnp.sum(load_GE, 0, keepdims=True), jnp.sum(probs_GE, 0, keepdims=True)
    return load_GE, probs_GE


def health_metrics(load_NE: Array, dropped_N: Array, entropy_N: Array, num_tokens: Array | float) -> dict:
    """What tells a healthy MoE layer from a collapsed one, per MoE layer, from sums over a batch.

    Args:
      load_NE: rows sent to each expert; dropped_N: rows dropped; entropy_N: summed router entropy in nats.
      num_tokens: tokens of the batch.

    Returns:
      ``load`` [N, E] (fractions of the layer's rows), ``max_load`` [N] (largest load over the balanced share),
      ``dead_experts`` [N] (experts without a row), ``dropped_fraction`` [N], ``router_entropy`` [N] (nats a token),
      ``expert_usage`` [] (percent of (layer, expert) pairs with at least a tenth of a balanced share) and
      ``sparsity`` [] (fraction of (token, expert) pairs that are not computed).
    """
    E = load_NE.shape[-1]
    rows_N = jnp.maximum(jnp.sum(load_NE, axis=-1), 1.0)
    fraction_NE = load_NE / rows_N[:, None]
    kept = jnp.mean(rows_N - dropped_N)
    return {
        "load": fraction_NE,
        "max_load": jnp.max(fraction_NE, axis=-1) * E,
        "dead_experts": jnp.sum(load_NE == 0, axis=-1),
        "dropped_fraction": dropped_N / rows_N,
        "router_entropy": entropy_N / num_tokens,
        "expert_usage": 100.0 * jnp.mean(fraction_NE * E >= 0.1),
        "sparsity": 1.0 - kept / (num_tokens * E),
    }
