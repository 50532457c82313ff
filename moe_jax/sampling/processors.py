"""Logits processors: pure functions of one row of logits, applied in the order in which they stand here.

A token that is ruled out gets -inf. Among equal logits the lower token id is kept first.

Sorting a vocabulary takes a CPU longer than a small model's whole step, so ``keep_top_k`` and ``keep_top_p`` sort
nothing: thresholds are found bit by bit. On an accelerator each turn of such a loop is some launches, so
``keep_top_k_and_p`` does the work of both by one sort.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.axes import Array


def penalise_repetition(logits_V: Array, seen_V: Array, penalty: Array) -> Array:
    """Divides the logits of tokens that are in the text, prompt included, by ``penalty`` (arXiv 1909.05858, sec. 4.1).

    Negative logits are multiplied instead, as is usual since: dividing them would make repetition more likely.

    >>> penalise_repetition(jnp.array([2.0, -2.0, 1.0]), jnp.array([True, True, False]), 2.0).tolist()
    [1.0, -4.0, 1.0]
    """
    penalised_V = jnp.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
    return jnp.where(seen_V, penalised_V, logits_V)


def scale_by_temperature(logits_V: Array, temperature: Array) -> Array:
    """logits / temperature, for a temperature above 0."""
    return logits_V / temperature


def keep_top_k(logits_V: Array, top_k: Array) -> Array:
    """Keeps the ``top_k`` most likely tokens; ``top_k`` is at least 1, and V or more keeps all.

    >>> keep_top_k(jnp.array([1.0, 3.0, 2.0, 2.0]), 2).tolist()
    [-inf, 3.0, 2.0, -inf]
    """
    key_V = _ordered(logits_V)
    limit = _largest(lambda limit: jnp.sum(key_V >= limit) >= top_k)
    above_V = key_V > limit
    kept_V = above_V | _first(key_V == limit, top_k - jnp.sum(above_V))
    return jnp.where(kept_V | (top_k >= logits_V.shape[0]), logits_V, -jnp.inf)


def keep_top_p(logits_V: Array, top_p: Array) -> Array:
    """Keeps the smallest set of most likely tokens whose probabilities sum to ``top_p`` or more (arXiv 1904.09751).

    The most likely token is always kept; 1 keeps all.

    >>> jax.nn.softmax(keep_top_p(jnp.log(jnp.array([0.1, 0.5, 0.1, 0.3])), 0.75)).tolist()
    [0.0, 0.625, 0.0, 0.375]
    """
    key_V, probs_V = _ordered(logits_V), jax.nn.softmax(logits_V)
    # The smaller of the two sums is the more exact one: of what is kept, or of what is not.
    counts_kept = top_p < 0.5

    def reaches(limit: Array) -> Array:
        total = jnp.sum(jnp.where((key_V >= limit) == counts_kept, probs_V, 0.0))
        return jnp.where(counts_kept, total >= top_p, total <= 1 - top_p)

    limit = _largest(reaches)
    above_V, tied_V = key_V > limit, key_V == limit
    kept_V = above_V | _first(tied_V, _num_tied(above_V, tied_V, probs_V, top_p))
    # Rounding of a sum must not rule anything out where top_p is 1.
    return jnp.where(kept_V | (top_p >= 1.0), logits_V, -jnp.inf)


def keep_top_k_and_p(logits_V: Array, top_k: Array, top_p: Array) -> Array:
    """``keep_top_p`` of what ``keep_top_k`` leaves, by one sort and a running sum: no loop and no branch.

    The same tokens are kept, unless some probabilities sum to ``top_p`` up to the rounding of the sum.

    >>> jnp.isfinite(keep_top_k_and_p(jnp.log(jnp.array([0.1, 0.5, 0.1, 0.3])), 3, 0.95)).tolist()
    [True, True, False, True]
    """
    V = logits_V.shape[0]
    key_V, token_V = _ordered(logits_V), jnp.arange(V)
    # The most likely first; the sort is stable, so of equal ones the lower token id.
    inverted_V, sorted_token_V = lax.sort((~key_V, token_V), num_keys=1)

    def likeliest(count: Array) -> Array:
        last = jnp.clip(count, 1, V) - 1
        limit = ~inverted_V[last]
        return (key_V > limit) | ((key_V == limit) & (token_V <= sorted_token_V[last]))

    left_V = jnp.where(likeliest(top_k), logits_V, -jnp.inf)
    probs_V = jax.nn.softmax(left_V)
    # As in keep_top_p: sums of what is kept, from the most likely on, or of what is not, from the least likely on.
    counts_kept = top_p < 0.5
    sorted_probs_V = probs_V[sorted_token_V]
    total_V = jnp.cumsum(jnp.where(counts_kept, sorted_probs_V, sorted_probs_V[::-1]))
    num_within = jnp.sum(jnp.where(counts_kept, total_V < top_p, total_V <= 1 - top_p))
    limit = ~inverted_V[jnp.where(counts_kept, num_within, V - 1 - num_within).clip(0, V - 1)]
    above_V, tied_V = key_V > limit, key_V == limit
    num_tied = jnp.minimum(_num_tied(above_V, tied_V, probs_V, top_p), jnp.sum(tied_V))
    return jnp.where(likeliest(jnp.sum(above_V) + num_tied) | (top_p >= 1.0), left_V, -jnp.inf)


def keep_min_p(logits_V: Array, min_p: Array) -> Array:
    """Keeps the tokens at least ``min_p`` times as likely as the most likely one (arXiv 2407.01082); 0 keeps all."""
    # A logarithm of 0 is -inf, below which there is nothing.
    return jnp.where(logits_V >= jnp.max(logits_V) + jnp.log(min_p), logits_V, -jnp.inf)


def gumbel(key: Array, size: int) -> Array:
    """Standard Gumbel noise, [size] float32: added to logits, it makes the largest a draw by their probabilities.

    It is that of ``jax.random.gumbel``, which takes 23 of 32 random bits and never exceeds 15.9, so that tokens less
    likely than 1e-7 come too seldom; by all 32 it reaches 22.9, from as many random bits and logarithms.
    """
    # The distance of a uniform number to 1 is exact where it is small, and so is log1p, which as such is slow on CPUs.
    d_V = (~jax.random.bits(key, (size,), jnp.uint32)).astype(jnp.float32) * 2.0**-32 + 2.0**-33
    series_V = d_V * (1 + d_V * (1 / 2 + d_V * (1 / 3 + d_V / 4)))
    return -jnp.log(jnp.where(d_V < 2.0**-6, series_V, -jnp.log(jnp.maximum(1 - d_V, 2.0**-24))))


def _num_tied(above_V: Array, tied_V: Array, probs_V: Array, top_p: Array) -> Array:
    """How many of the equally likely ``tied_V`` it takes, with those above them, to reach ``top_p``; at least 1."""
    missing = top_p - jnp.sum(jnp.where(above_V, probs_V, 0.0))
    prob = jnp.max(jnp.where(tied_V, probs_V, 0.0))
    return jnp.ceil(missing / jnp.maximum(prob, 1e-38)).clip(1, probs_V.shape[0]).astype(jnp.int32)


def _ordered(x_V: Array) -> Array:
    """uint32 numbers in the order of the floats ``x_V``; -0 and 0 are one."""
    bits_V = lax.bitcast_convert_type(jnp.where(x_V == 0, 0.0, x_V).astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits_V & sign, ~bits_V, bits_V | sign)


def _largest(holds: Callable[[Array], Array], num_bits: int = 32) -> Array:
    """The largest number of so many bits for which ``holds``, which is true up to some number and then false."""

    def set_bit(index: Array, found: Array) -> Array:
        candidate = found | (jnp.uint32(1 << (num_bits - 1)) >> index.astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, found)

    return lax.fori_loop(0, num_bits, set_bit, jnp.uint32(0))


def _first(mask_V: Array, count: Array) -> Array:
    """``mask_V`` with only its first ``count`` places left."""
    V = mask_V.shape[0]
    place_V = jnp.arange(V, dtype=jnp.uint32)
    # The largest number of places that hold at most so many; any above V are as V.
    end = _largest(lambda end: jnp.sum(mask_V & (place_V < end)) <= count, V.bit_length())
    return mask_V & (place_V < end)
