"""Prefill and the cached decode loop: pure functions with static shapes, run under ``jax.jit``.

A text is made in chunks: ``prefill`` gives a ``DecodeState``, and each call of ``decode`` draws some tokens more and
gives the state to go on from. Where the chunks end changes nothing in the text.
"""

import flax.struct
import jax
import jax.numpy as jnp

from moe_jax.axes import Array
from moe_jax.model.attention import LayerCache
from moe_jax.model.decoder import Decoder, Variables, forward, init_caches
from moe_jax.sampling.processors import keep_top_k, keep_top_p, scale_by_temperature

CHUNK = 8
"""Tokens that one call of ``decode`` draws, at most: few enough to read along, many enough to hide the call's cost."""


class Settings(flax.struct.PyTreeNode):
    """What the draw depends on; arrays, so that another temperature needs no new compilation."""

    seed: Array
    """[] uint32."""
    temperature: Array
    top_k: Array
    top_p: Array
    is_greedy: bool = flax.struct.field(pytree_node=False)


class DecodeState(flax.struct.PyTreeNode):
    """Where the texts of a batch stand between two tokens."""

    index: Array
    """[] int32: tokens drawn so far."""
    logits_BV: Array
    """For the token that is drawn next."""
    caches: tuple[LayerCache, ...]
    ended_B: Array
    """bool: which texts have drawn their end."""


def prefill(decoder: Decoder, variables: Variables, prompt_BL: Array, prompt_length: Array) -> DecodeState:
    """Runs the prompt through the model; the state before the first token is drawn.

    Args:
      decoder: an ``unstacked`` decoder, with ``variables`` from ``unstack``.
      prompt_BL: token ids, padded on the right; L is at most the context.
      prompt_length: [] real tokens of every row, at least 1.
    """
    B, L = prompt_BL.shape
    index_BL = jnp.broadcast_to(jnp.arange(L), (B, L))
    real_BL = index_BL < prompt_length
    output = forward(
        decoder,
        variables,
        prompt_BL,
        token_mask_BL=real_BL,
        position_BL=jnp.where(real_BL, index_BL, -1),
        caches=init_caches(decoder.config, B, decoder.config.context_length),
    )
    assert output.caches is not None
    return DecodeState(
        index=jnp.zeros((), jnp.int32),
        logits_BV=jnp.take(output.logits_BLV, prompt_length - 1, axis=1),
        caches=output.caches,
        ended_B=jnp.zeros(B, bool),
    )


def draw(logits_BV: Array, settings: Settings, position: Array) -> Array:
    """One token a row, [B] int32: a function of the logits and of (seed, row, position) only."""
    if settings.is_greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw_row(logits_V: Array, row: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(settings.seed), row), position)
        logits_V = scale_by_temperature(logits_V, settings.temperature)
        logits_V = keep_top_p(keep_top_k(logits_V, settings.top_k), settings.top_p)
        return jax.random.categorical(key, logits_V).astype(jnp.int32)

    return jax.vmap(draw_row)(logits_BV, jnp.arange(logits_BV.shape[0]))


def decode(
    decoder: Decoder,
    variables: Variables,
    state: DecodeState,
    prompt_length: Array,
    settings: Settings,
    num_tokens: Array,
    *,
    end_token: int,
) -> tuple[Array, DecodeState]:
    """Draws ``CHUNK`` tokens one by one, or until there are ``num_tokens`` [] after the prompt or every row has ended.

    With rotary positions the caches are rings: past the context the oldest key gives way, and the text may be of any
    length.

    Returns:
      The new tokens [B, CHUNK] int32, where a row is filled with ``end_token`` from its end or the last draw on, and
      the state to go on from.
    """
    B, first = state.logits_BV.shape[0], state.index
    stop = jnp.minimum(num_tokens, first + CHUNK)

    def is_running(carry: tuple[Array, DecodeState]) -> Array:
        _, state = carry
        return (state.index < stop) & ~jnp.all(state.ended_B)

    def turn(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        drawn_BS, state = carry
        position = prompt_length + state.index
        token_B = jnp.where(state.ended_B, end_token, draw(state.logits_BV, settings, position))
        drawn_BS = jax.lax.dynamic_update_index_in_dim(drawn_BS, token_B, state.index - first, axis=1)
        position_BL = jnp.full((B, 1), position)
        output = forward(decoder, variables, token_B[:, None], position_BL=position_BL, caches=state.caches)
        assert output.caches is not None
        ended_B = state.ended_B | (token_B == end_token)
        return drawn_BS, DecodeState(state.index + 1, output.logits_BLV[:, 0], output.caches, ended_B)

    return jax.lax.while_loop(is_running, turn, (jnp.full((B, CHUNK), end_token, jnp.int32), state))
