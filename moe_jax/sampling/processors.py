"""Logits processors, pure functions of one row of logits, applied in this order: temperature, top-k, top-p.

A token that is ruled out gets -inf. Among equal logits the lower token id is kept first.
"""

import jax
import jax.numpy as jnp

from moe_jax.axes import Array


def scale_by_temperature(logits_V: Array, temperature: Array) -> Array:
    """logits / temperature, for a temperature above 0."""
    return logits_V / temperature


def keep_top_k(logits_V: Array, top_k: Array) -> Array:
    """Keeps the ``top_k`` most likely tokens; ``top_k`` is at least 1, and V or more keeps all."""
    return jnp.where(_rank(logits_V) < top_k, logits_V, -jnp.inf)


def keep_top_p(logits_V: Array, top_p: Array) -> Array:
    """Keeps the smallest set of most likely tokens whose probabilities sum to ``top_p`` or more (arXiv 1904.09751).

    The most likely token is always kept; 1 keeps all.
    """
    order_V = jnp.argsort(-logits_V, stable=True)
    probs_V = jax.nn.softmax(logits_V)[order_V]
    # The mass before a token: rounding of a cumulative sum must not rule anything out where top_p is 1.
    before_V = jnp.cumsum(probs_V) - probs_V
    kept_V = jnp.zeros(logits_V.shape, bool).at[order_V].set((before_V < top_p) | (top_p >= 1.0))
    return jnp.where(kept_V.at[order_V[0]].set(True), logits_V, -jnp.inf)


def _rank(logits_V: Array) -> Array:
    """Each token's place in the order of falling logits."""
    order_V = jnp.argsort(-logits_V, stable=True)
    return jnp.zeros(logits_V.shape, jnp.int32).at[order_V].set(jnp.arange(logits_V.shape[0]))
