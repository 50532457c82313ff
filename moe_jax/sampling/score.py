"""Log-probabilities of the tokens of a prompt, which is read in parts of one size: one program for all lengths."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.axes import Array
from moe_jax.model.attention import LayerCache
from moe_jax.model.decoder import Decoder, Tokens, Variables, forward

DecoderFor = Callable[[int], Decoder]
"""The decoder for so many tokens at a time: few are dispatched to their experts in another way than many."""

SCORED = 64
"""Tokens of a prompt that one call of ``score`` reads, at most."""


def score(
    decoder_for: DecoderFor,
    variables: Variables,
    caches: tuple[LayerCache, ...],
    ids_L: Array,
    start: Array,
    size: Array,
    *,
    num_top: int,
) -> tuple[tuple[Array, Array, Array], tuple[LayerCache, ...]]:
    """Reads ``size`` tokens of one prompt from its place ``start`` on, after those that the ``caches`` hold.

    The first of ``ids_L`` [SCORED + 1] are read, and those from the second on scored: by their log-probabilities
    [SCORED] under the model itself, the most likely tokens [SCORED, num_top] in their places, and those' own.
    """
    index_L = jnp.arange(SCORED)
    real_L = index_L < size
    tokens = Tokens(ids_L[None, :-1], real_L[None], position_BL=jnp.where(real_L, start + index_L, -1)[None])
    output = forward(decoder_for(SCORED), variables, tokens, caches=caches)
    assert output.caches is not None
    logprob_LV = jax.nn.log_softmax(output.logits_BLV[0])
    top_logprobs_LK, top_tokens_LK = jax.lax.top_k(logprob_LV, num_top)
    logprobs_L = jnp.take_along_axis(logprob_LV, ids_L[1:, None], axis=1)[:, 0]
    return (logprobs_L, top_tokens_LK, top_logprobs_LK), output.caches
