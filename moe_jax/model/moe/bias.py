"""How the bias that ``sigmoid_bias`` chooses by is moved after each optimizer step: by a rate, or to a quantile."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.axes import Array

SHIFT_Q = np.concatenate([-np.geomspace(2.0, 1e-4, 32), [0.0], np.geomspace(1e-4, 2.0, 32)]).astype(np.float32)
"""Shifts of a bias at which tokens are counted: fine around zero, where the bias of a balanced layer stays."""


def tokens_in_reach(biased_TE: Array, top_k: int, token_mask_T: Array | None = None) -> Array:
    """How many tokens would choose each expert were its bias higher by each of ``SHIFT_Q``, [E, Q] float32.

    A token chooses what is above its threshold, which stays as it is: halfway between its K-th and its K+1-th best
    s + bias. The counts are whole numbers that add up over any split of the tokens.
    """
    best_TK = jax.lax.top_k(biased_TE, min(top_k + 1, biased_TE.shape[1]))[0][:, top_k - 1 :]
    missing_TE = jnp.mean(best_TK, axis=1, keepdims=True) - biased_TE
    if token_mask_T is not None:
        missing_TE = jnp.where(token_mask_T[:, None], missing_TE, jnp.inf)
    return jnp.sum(missing_TE[:, :, None] <= SHIFT_Q[None, None, :], axis=0, dtype=jnp.float32)


def updated_bias(expert_bias_E: Array, load_E: Array, rate: float, reach_EQ: Array | None = None) -> Array:
    """The bias after one optimizer step, for each leading axis, by counts of the whole optimizer batch.

    Up by ``rate`` where the load was below its mean, down where above (arXiv 2412.19437, section 2.1.2); or, with
    ``tokens_in_reach``, by the shift at which the mean load of tokens would choose the expert, whatever the rate
    (quantile balancing, https://kexue.fm/archives/11619, with counts between which is interpolated where its author
    sorts the margins).

    Then, unlike there, the mean over experts is taken off. It chooses nothing, but it grows by every step in which
    more experts were below the mean than above, until scores in (0, 1) are rounded away beside it.
    """
    if reach_EQ is None:
        # E times both sides: a mean is rounded, and would move a balanced expert; sums of whole numbers are exact.
        shift_E = rate * jnp.sign(jnp.sum(load_E, axis=-1, keepdims=True) - load_E.shape[-1] * load_E)
    else:
        shift_E = _shift_to_share(jnp.mean(load_E, axis=-1, keepdims=True), reach_EQ)
    moved_E = expert_bias_E + shift_E
    return moved_E - jnp.mean(moved_E, axis=-1, keepdims=True)


def _shift_to_share(share: Array, reach_EQ: Array) -> Array:
    """[..., E]: the shift at which each expert would be chosen by ``share`` tokens, on a line between two counts."""
    above_E1 = jnp.clip(jnp.sum(reach_EQ < share[..., None], axis=-1, keepdims=True), 1, SHIFT_Q.size - 1)
    low_E, high_E = (jnp.take_along_axis(reach_EQ, at_E1, axis=-1)[..., 0] for at_E1 in (above_E1 - 1, above_E1))
    shift_low_E, shift_high_E = (jnp.asarray(SHIFT_Q)[at_E1[..., 0]] for at_E1 in (above_E1 - 1, above_E1))
    part_E = jnp.clip((share - low_E) / jnp.maximum(high_E - low_E, 1.0), 0.0, 1.0)
    return shift_low_E + part_E * (shift_high_E - shift_low_E)
