"""Prefill and the cached decode loop: pure functions with static shapes, run under ``jax.jit``."""

import flax.struct
import jax
import jax.numpy as jnp

from moe_jax.axes import Array
from moe_jax.model.attention import LayerCache
from moe_jax.model.decoder import Decoder, Variables, forward, init_caches
from moe_jax.sampling.processors import keep_top_k, keep_top_p, scale_by_temperature


class Settings(flax.struct.PyTreeNode):
    """What the draw depends on; arrays, so that another temperature needs no new compilation."""

    seed: Array
    """[] uint32."""
    temperature: Array
    top_k: Array
    top_p: Array
    is_greedy: bool = flax.struct.field(pytree_node=False)


def prefill(
    decoder: Decoder, variables: Variables, prompt_BL: Array, prompt_length: Array
) -> tuple[Array, tuple[LayerCache, ...]]:
    """Runs the prompt through the model.

    Args:
      decoder: an ``unstacked`` decoder, with ``variables`` from ``unstack``.
      prompt_BL: token ids, padded on the right; L is at most the context.
      prompt_length: [] real tokens of every row, at least 1.

    Returns:
      The logits [B, V] after the last real token, and the caches.
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
    return jnp.take(output.logits_BLV, prompt_length - 1, axis=1), output.caches


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
    logits_BV: Array,
    caches: tuple[LayerCache, ...],
    prompt_length: Array,
    settings: Settings,
    num_tokens: Array,
    *,
    buffer_length: int,
    end_token: int,
) -> Array:
    """Draws tokens one by one until every row has drawn ``end_token`` or ``num_tokens`` are drawn.

    With rotary positions the caches are rings: past the context the oldest key gives way, and the text may be as long
    as the buffer.

    Returns:
      [B, buffer_length] int32; a row is filled with ``end_token`` from where it ended.
    """
    B = logits_BV.shape[0]

    def is_running(carry: tuple) -> Array:
        index, _, _, _, ended_B = carry
        return (index < num_tokens) & ~jnp.all(ended_B)

    def turn(carry: tuple) -> tuple:
        index, drawn_BS, logits_BV, caches, ended_B = carry
        position = prompt_length + index
        token_B = jnp.where(ended_B, end_token, draw(logits_BV, settings, position))
        ended_B = ended_B | (token_B == end_token)
        drawn_BS = jax.lax.dynamic_update_index_in_dim(drawn_BS, token_B, index, axis=1)
        output = forward(decoder, variables, token_B[:, None], position_BL=jnp.full((B, 1), position), caches=caches)
        return index + 1, drawn_BS, output.logits_BLV[:, 0], output.caches, ended_B

    drawn_BS = jnp.full((B, buffer_length), end_token, jnp.int32)
    start = (jnp.zeros((), jnp.int32), drawn_BS, logits_BV, caches, jnp.zeros(B, bool))
    return jax.lax.while_loop(is_running, turn, start)[1]
