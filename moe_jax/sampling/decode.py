"""Prefill and the cached decode loop: pure functions with static shapes, and the compiled ones of a model.

A ``DecodeState`` has a row for each text of a batch. ``prefill`` runs texts through the model and puts them into rows;
``decode`` draws some tokens in all rows at once and returns the state to continue from. Where calls end, and which
other texts share a batch, changes nothing in a text but rounding.
"""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from moe_jax.axes import Array
from moe_jax.config import ModelConfig
from moe_jax.model.attention import LayerCache, init_caches
from moe_jax.model.decoder import Decoder, Tokens, Variables, forward
from moe_jax.model.machine import Machine
from moe_jax.model.moe.backends import for_machine
from moe_jax.sampling.processors import (
    gumbel,
    keep_min_p,
    keep_top_k,
    keep_top_k_and_p,
    keep_top_p,
    penalise_repetition,
    scale_by_temperature,
)
from moe_jax.sampling.score import DecoderFor, score

MAX_STEPS = 32
"""Tokens a row that one call of ``decode`` draws, at most."""
_LOOP_AS_GRAPH = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,WHILE"}
"""Makes the loop over tokens a CUDA graph of its own: the host does not start each turn, nor ask whether it ends."""


class Rows(flax.struct.PyTreeNode):
    """What the draws in each row depend on, beside the logits; arrays, so that no setting needs a new compilation."""

    seed_B: Array
    """uint32."""
    sample_B: Array
    """uint32: which text of its call it is, by prompt and sample. With the seed and the position it decides each draw,
    alone or beside others."""
    temperature_B: Array
    """0 takes the most likely token."""
    top_k_B: Array
    top_p_B: Array
    min_p_B: Array
    repetition_penalty_B: Array


class DecodeState(flax.struct.PyTreeNode):
    """Where the texts of a batch stand between two tokens; every leaf has a leading axis B."""

    logits_BV: Array
    """For the token that is drawn next."""
    caches: tuple[LayerCache, ...]
    position_B: Array
    """int32: the model's position of the token that is drawn next."""
    seen_BV: Array
    """bool: which tokens are in the text, for the repetition penalty; what the model reads before it is not."""


class Drawn(flax.struct.PyTreeNode):
    """The tokens of one call of ``decode``, S = MAX_STEPS; a row is filled with end tokens once it has ended."""

    tokens_BS: Array
    """int32."""
    logprobs_BS: Array
    """float32: log-probability of each under the model itself, before any processor; 0 where a row has ended."""
    top_tokens_BSK: Array
    """int32: the most likely tokens in each one's place, K of them as asked for."""
    top_logprobs_BSK: Array
    chosen_BSNE: Array | None
    """bool: the experts of each token in each MoE layer; None where not asked for, or without experts."""


def empty_state(config: ModelConfig, B: int, V: int) -> DecodeState:
    """A state whose rows hold no text yet."""
    return DecodeState(
        logits_BV=jnp.zeros((B, V), jnp.float32),
        caches=init_caches(config, B, config.context_length),
        position_B=jnp.zeros(B, jnp.int32),
        seen_BV=jnp.zeros((B, V), bool),
    )


def take_rows(state: DecodeState, row_B: Array) -> DecodeState:
    """The state of a batch of other size or order, whose row b is row row_B[b] of ``state``."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, row_B, axis=0, mode="clip"), state)


def prefill(
    decoder_for: DecoderFor,
    variables: Variables,
    state: DecodeState,
    text_PL: Array,
    length_P: Array,
    row_P: Array,
    num_prefix_P: Array,
    is_new_P: Array,
) -> DecodeState:
    """Runs P texts through the model and puts each into its row, before its next token is drawn.

    Args:
      decoder_for: makes an ``unstacked`` decoder, whose ``variables`` are from ``unstack``.
      text_PL: token ids, padded on the right; L is at most the context.
      length_P: the tokens of each text, at least 1.
      row_P: B or more for a text that is none, but fills the shape.
      num_prefix_P: the first tokens of each that are not part of the text, such as the start of a document.
      is_new_P: False for the end of the text that is in its row already, whose earlier tokens stay seen.
    """
    P, L = text_PL.shape
    decoder = decoder_for(P * L)
    V = state.logits_BV.shape[1]
    index_PL = jnp.broadcast_to(jnp.arange(L), (P, L))
    real_PL = index_PL < length_P[:, None]
    output = forward(
        decoder,
        variables,
        Tokens(text_PL, mask_BL=real_PL, position_BL=jnp.where(real_PL, index_PL, -1)),
        caches=init_caches(decoder.config, P, decoder.config.context_length),
        logits_at_B=length_P - 1,
    )
    own_PL = real_PL & (index_PL >= num_prefix_P[:, None])
    text_seen_PV = jnp.zeros((P, V), bool).at[jnp.arange(P)[:, None], text_PL].max(own_PL)
    earlier_PV = jnp.take(state.seen_BV, row_P, axis=0, mode="clip") & ~is_new_P[:, None]

    def put(leaf_B: Array, leaf_P: Array) -> Array:
        return leaf_B.at[row_P].set(leaf_P, mode="drop")

    return DecodeState(
        logits_BV=put(state.logits_BV, output.logits_BLV[:, 0]),
        caches=jax.tree.map(put, state.caches, output.caches),
        position_B=put(state.position_B, length_P),
        seen_BV=put(state.seen_BV, text_seen_PV | earlier_PV),
    )


def draw(logits_BV: Array, rows: Rows, position_B: Array, seen_BV: Array, *, by_sort: bool = False) -> Array:
    """One token a row, [B] int32: a function of the row's logits and of (seed, sample, position) only.

    A processor that no row of the batch asks for is passed over. Not so with ``by_sort``, which draws the same without
    a branch or a loop: on an accelerator those are launches of their own, and waits for the host.
    """
    if_any = functools.partial(_if_any, branches=not by_sort)
    logits_BV = if_any(rows.repetition_penalty_B != 1, penalise_repetition)(
        logits_BV, seen_BV, rows.repetition_penalty_B
    )
    greedy_B = jnp.argmax(logits_BV, axis=1).astype(jnp.int32)
    is_greedy_B = rows.temperature_B == 0

    def draw_each() -> Array:
        scaled_BV = jax.vmap(scale_by_temperature)(logits_BV, jnp.where(is_greedy_B, 1.0, rows.temperature_B))
        if by_sort:
            left_BV = jax.vmap(keep_top_k_and_p)(scaled_BV, rows.top_k_B, rows.top_p_B)
        else:
            left_BV = if_any(rows.top_k_B < logits_BV.shape[1], keep_top_k)(scaled_BV, rows.top_k_B)
            left_BV = if_any(rows.top_p_B < 1, keep_top_p)(left_BV, rows.top_p_B)
        left_BV = if_any(rows.min_p_B > 0, keep_min_p)(left_BV, rows.min_p_B)
        drawn_B = jax.vmap(_draw_row)(left_BV, rows.seed_B, rows.sample_B, position_B)
        return jnp.where(is_greedy_B, greedy_B, drawn_B)

    return draw_each() if by_sort else jax.lax.cond(jnp.all(is_greedy_B), lambda: greedy_B, draw_each)


def _draw_row(logits_V: Array, seed: Array, sample: Array, position: Array) -> Array:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position)
    return jnp.argmax(logits_V + gumbel(key, logits_V.shape[0])).astype(jnp.int32)


def _if_any(asked_B: Array, process: Callable[..., Array], *, branches: bool) -> Callable[..., Array]:
    """``process`` for each row, which leaves one that has not asked as it is; ``branches`` past it where none has."""
    if not branches:
        return jax.vmap(process)

    def maybe(logits_BV: Array, *settings: Array) -> Array:
        return jax.lax.cond(jnp.any(asked_B), jax.vmap(process), lambda logits_BV, *_: logits_BV, logits_BV, *settings)

    return maybe


def decode(
    decoder_for: DecoderFor,
    variables: Variables,
    state: DecodeState,
    rows: Rows,
    index_B: Array,
    left_B: Array,
    steps: Array,
    *,
    end_token: int,
    num_top: int = 0,
    keep_experts: bool = False,
    by_sort: bool = False,
) -> tuple[Drawn, DecodeState]:
    """Draws ``steps`` [] tokens in each row one by one, at most ``MAX_STEPS``, or until every row has ended.

    With rotary positions the caches are rings: past the context the oldest key gives way, and the text may be of any
    length. With learned ones the caller begins a new window (``prefill``) before a second token has no position.

    Args:
      index_B: int32: tokens of each text so far, prompt included; the place of the next in the text, for its draw.
      left_B: int32: tokens still to draw in each row; 0 for a row without a text.
      num_top: how many of the most likely tokens to report beside each drawn one.
      keep_experts: whether to report the experts of each token.
      by_sort: as in ``draw``.
    """
    B = state.logits_BV.shape[0]
    decoder = decoder_for(B)

    def is_running(carry: tuple[Array, Array, Drawn, DecodeState]) -> Array:
        step, ended_B, _, _ = carry
        return (step < jnp.minimum(steps, MAX_STEPS)) & ~jnp.all(ended_B)

    def turn(carry: tuple[Array, Array, Drawn, DecodeState]) -> tuple[Array, Array, Drawn, DecodeState]:
        step, ended_B, drawn, state = carry
        drawn_B = draw(state.logits_BV, rows, index_B + step, state.seen_BV, by_sort=by_sort)
        token_B = jnp.where(ended_B, end_token, drawn_B)
        logprob_BV = jax.nn.log_softmax(state.logits_BV)
        logprob_B = jnp.where(ended_B, 0.0, jnp.take_along_axis(logprob_BV, drawn_B[:, None], axis=1)[:, 0])
        token = Tokens(token_B[:, None], position_BL=state.position_B[:, None])
        output = forward(decoder, variables, token, caches=state.caches)
        assert output.caches is not None
        top_logprobs_BK, top_tokens_BK = jax.lax.top_k(logprob_BV, num_top)
        new = Drawn(token_B, logprob_B, top_tokens_BK, top_logprobs_BK, None)
        if drawn.chosen_BSNE is not None and output.statistics is not None:
            # The group of a row is this one token, so its experts are those that have a row.
            new = new.replace(chosen_BSNE=output.statistics.router.load_E.transpose(1, 0, 2) > 0)
        drawn = jax.tree.map(
            lambda into, leaf: jax.lax.dynamic_update_index_in_dim(into, leaf, step, axis=1), drawn, new
        )
        ended_B = ended_B | (token_B == end_token) | (step + 1 >= left_B)
        seen_BV = state.seen_BV.at[jnp.arange(B), token_B].set(True, mode="drop")
        state = DecodeState(output.logits_BLV[:, 0], output.caches, state.position_B + 1, seen_BV)
        return step + 1, ended_B, drawn, state

    nothing = _nothing_drawn(decoder.config, B, end_token, num_top, keep_experts)
    start = (jnp.zeros((), jnp.int32), left_B <= 0, nothing, state)
    _, _, drawn, state = jax.lax.while_loop(is_running, turn, start)
    return drawn, state


def _nothing_drawn(config: ModelConfig, B: int, end_token: int, num_top: int, keep_experts: bool) -> Drawn:
    moe = config.moe
    chosen_BSNE = None
    if keep_experts and moe.num_experts:
        num_layers = (config.num_layers - moe.first_dense) // moe.every
        chosen_BSNE = jnp.zeros((B, MAX_STEPS, num_layers, moe.num_experts), bool)
    return Drawn(
        tokens_BS=jnp.full((B, MAX_STEPS), end_token, jnp.int32),
        logprobs_BS=jnp.zeros((B, MAX_STEPS), jnp.float32),
        top_tokens_BSK=jnp.zeros((B, MAX_STEPS, num_top), jnp.int32),
        top_logprobs_BSK=jnp.zeros((B, MAX_STEPS, num_top), jnp.float32),
        chosen_BSNE=chosen_BSNE,
    )


class Programs:
    """The functions above for one model, each compiled once for a shape."""

    def __init__(self, config: ModelConfig, vocab_size: int, machine: Machine, end_token: int):
        """``end_token`` ends a text."""
        self.config, self.vocab_size, self._machine = config, vocab_size, machine
        # It takes the variables to be where they are, or the first call of each function would be compiled twice.
        self.empty_state = jax.jit(
            lambda B, variables: empty_state(config, B, vocab_size), static_argnums=0, keep_unused=True
        )
        # The state is donated, so that its caches are changed in place.
        self.prefill = jax.jit(functools.partial(prefill, self.decoder_for), donate_argnums=1)
        self.decode = jax.jit(
            functools.partial(decode, self.decoder_for, end_token=end_token, by_sort=machine.platform != "cpu"),
            donate_argnums=1,
            static_argnames=("num_top", "keep_experts"),
            compiler_options=_LOOP_AS_GRAPH if machine.is_nvidia else None,
        )
        self.score = jax.jit(functools.partial(score, self.decoder_for), donate_argnums=1, static_argnames="num_top")
        self.empty_caches = jax.jit(lambda variables: init_caches(config, 1, config.context_length), keep_unused=True)
        self.take_rows = jax.jit(take_rows)

    def decoder_for(self, num_tokens: int) -> Decoder:
        """The ``unstacked`` decoder for so many tokens at a time, whatever backend the run was trained with."""
        model = for_machine(self.config, num_tokens, train=False, machine=self._machine, as_set=False)
        return Decoder(model, self.vocab_size, unstacked=True)
