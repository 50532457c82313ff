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
from moe_jax.sampling.processors import (
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    scale_by_temperature,
)

CHUNK = 8
"""Tokens that one call of ``decode`` draws, at most: few enough to read along, many enough to hide the call's cost."""


class Settings(flax.struct.PyTreeNode):
    """What the draw depends on; arrays, so that another temperature needs no new compilation."""

    seed: Array
    """[] uint32."""
    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition_penalty: Array
    is_greedy: bool = flax.struct.field(pytree_node=False)
    has_penalty: bool = flax.struct.field(pytree_node=False)
    """Whether repetition_penalty is anything but 1, so that the tokens of the text are to be known."""


class Rows(flax.struct.PyTreeNode):
    """What is known of each text of a batch before its first token is drawn."""

    prompt_length_B: Array
    """int32: tokens of the prompt, at least 1."""
    sample_B: Array
    """int32: which sample of its prompt it is. With the seed and the position it decides each draw, alone or beside
    others."""
    num_tokens_B: Array
    """int32: tokens to draw after the prompt."""


class DecodeState(flax.struct.PyTreeNode):
    """Where the texts of a batch stand between two tokens."""

    index: Array
    """[] int32: tokens drawn so far."""
    logits_BV: Array
    """For the token that is drawn next."""
    caches: tuple[LayerCache, ...]
    ended_B: Array
    """bool: which texts have drawn their end, or all their tokens."""
    seen_BV: Array | None
    """bool: which tokens are in the text; None where no penalty asks for it."""


class Drawn(flax.struct.PyTreeNode):
    """The tokens of one call of ``decode``."""

    tokens_BS: Array
    """int32; a row is filled with the end token from its end, or the last draw, on."""
    logprobs_BS: Array
    """float32: log-probability of each under the model itself, before any processor; 0 where a row has ended."""


def prefill(
    decoder: Decoder, variables: Variables, prompt_BL: Array, rows: Rows, *, keep_seen: bool = False
) -> DecodeState:
    """Runs the prompts through the model; the state before the first token is drawn.

    Args:
      decoder: an ``unstacked`` decoder, with ``variables`` from ``unstack``.
      prompt_BL: token ids, padded on the right; L is at most the context.
      keep_seen: whether the tokens of the texts are to be known, for a repetition penalty.
    """
    B, L = prompt_BL.shape
    index_BL = jnp.broadcast_to(jnp.arange(L), (B, L))
    real_BL = index_BL < rows.prompt_length_B[:, None]
    output = forward(
        decoder,
        variables,
        prompt_BL,
        token_mask_BL=real_BL,
        position_BL=jnp.where(real_BL, index_BL, -1),
        caches=init_caches(decoder.config, B, decoder.config.context_length),
    )
    assert output.caches is not None
    V = output.logits_BLV.shape[-1]
    seen_BV = None
    if keep_seen:
        seen_BV = jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], prompt_BL].max(real_BL)
    return DecodeState(
        index=jnp.zeros((), jnp.int32),
        logits_BV=jnp.take_along_axis(output.logits_BLV, rows.prompt_length_B[:, None, None] - 1, axis=1)[:, 0],
        caches=output.caches,
        ended_B=rows.num_tokens_B <= 0,
        seen_BV=seen_BV,
    )


def draw(
    logits_BV: Array, settings: Settings, sample_B: Array, position_B: Array, seen_BV: Array | None = None
) -> Array:
    """One token a row, [B] int32: a function of the logits and of (seed, sample, position) only."""

    def draw_row(logits_V: Array, sample: Array, position: Array, seen_V: Array | None) -> Array:
        if seen_V is not None:
            logits_V = penalise_repetition(logits_V, seen_V, settings.repetition_penalty)
        if settings.is_greedy:
            return jnp.argmax(logits_V).astype(jnp.int32)
        logits_V = scale_by_temperature(logits_V, settings.temperature)
        logits_V = keep_top_p(keep_top_k(logits_V, settings.top_k), settings.top_p)
        logits_V = keep_min_p(logits_V, settings.min_p)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(settings.seed), sample), position)
        return jax.random.categorical(key, logits_V).astype(jnp.int32)

    return jax.vmap(draw_row)(logits_BV, sample_B, position_B, seen_BV)


def decode(
    decoder: Decoder,
    variables: Variables,
    state: DecodeState,
    rows: Rows,
    settings: Settings,
    stop: Array,
    *,
    end_token: int,
) -> tuple[Drawn, DecodeState]:
    """Draws ``CHUNK`` tokens one by one, or until ``stop`` [] have been drawn in all or every row has ended.

    With rotary positions the caches are rings: past the context the oldest key gives way, and the text may be of any
    length. Returns what was drawn and the state to go on from.
    """
    B, first = state.logits_BV.shape[0], state.index
    stop = jnp.minimum(stop, first + CHUNK)

    def is_running(carry: tuple[Drawn, DecodeState]) -> Array:
        _, state = carry
        return (state.index < stop) & ~jnp.all(state.ended_B)

    def turn(carry: tuple[Drawn, DecodeState]) -> tuple[Drawn, DecodeState]:
        drawn, state = carry
        position_B = rows.prompt_length_B + state.index
        drawn_B = draw(state.logits_BV, settings, rows.sample_B, position_B, state.seen_BV)
        token_B = jnp.where(state.ended_B, end_token, drawn_B)
        logprob_BV = jax.nn.log_softmax(state.logits_BV)
        logprob_B = jnp.where(state.ended_B, 0.0, jnp.take_along_axis(logprob_BV, drawn_B[:, None], axis=1)[:, 0])
        place = state.index - first
        drawn = Drawn(_put(drawn.tokens_BS, token_B, place), _put(drawn.logprobs_BS, logprob_B, place))
        output = forward(decoder, variables, token_B[:, None], position_BL=position_B[:, None], caches=state.caches)
        assert output.caches is not None
        ended_B = state.ended_B | (token_B == end_token) | (state.index + 1 >= rows.num_tokens_B)
        seen_BV = None if state.seen_BV is None else state.seen_BV.at[jnp.arange(B), token_B].set(True)
        return drawn, DecodeState(state.index + 1, output.logits_BLV[:, 0], output.caches, ended_B, seen_BV)

    empty = Drawn(jnp.full((B, CHUNK), end_token, jnp.int32), jnp.zeros((B, CHUNK), jnp.float32))
    return jax.lax.while_loop(is_running, turn, (empty, state))


def _put(into_BS: Array, value_B: Array, place: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(into_BS, value_B, place, axis=1)
