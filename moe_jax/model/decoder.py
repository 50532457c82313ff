"""The decoder: token embedding, blocks of attention and MLP or MoE, output projection.

In training the blocks run under one ``nn.scan`` over periods, so compile time does not grow with depth. For sampling
the same blocks run one by one on unstacked parameters (``unstack``): a scan would copy each layer's weights before
every token.
"""

from typing import Any, Literal, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.linen import initializers

from moe_jax.axes import Array, PyTree
from moe_jax.config import ModelConfig
from moe_jax.model import attention_blocks
from moe_jax.model.attention import Attention, Context, LayerCache, cache_mask, causal_mask
from moe_jax.model.layers import Norm, dropout, float32_product, fold_in, matrix_init
from moe_jax.model.mlp import DenseMLP, dense_width
from moe_jax.model.moe.dispatch import PRODUCTS
from moe_jax.model.moe.layer import MoE
from moe_jax.model.moe.routing import ROUTERS
from moe_jax.model.moe.statistics import MoEStatistics
from moe_jax.model.rotary import rotation_of
from moe_jax.sharding.mesh import constrain, with_axes


class Variables(flax.struct.PyTreeNode):
    """What a forward pass computes with."""

    params: PyTree
    """What the gradient trains."""
    expert_bias_NE: Array | None = None
    """[MoE layers, E] float32, the router state of ``sigmoid_bias``: moved by each step, but by no gradient."""

    def to_items(self) -> dict[str, PyTree]:
        """Parameters and, where there is one, router state, as the items of a checkpoint."""
        state = {} if self.expert_bias_NE is None else {"router_state": {"expert_bias": self.expert_bias_NE}}
        return {"params": self.params} | state

    @staticmethod
    def from_items(items: dict[str, PyTree]) -> "Variables":
        return Variables(items["params"], items["router_state"]["expert_bias"] if "router_state" in items else None)


class Tokens(flax.struct.PyTreeNode):
    """What a forward pass reads: B rows of L tokens, and what is known of each token."""

    id_BL: Array
    """int32."""
    mask_BL: Array | None = None
    """True for real tokens; None: all are. A masked token sends no rows, takes no capacity and counts nowhere."""
    position_BL: Array | None = None
    """int32, rising within a segment; None: 0 to L-1. Without caches below the context's length, or that of the row;
    with them a negative one is padding."""
    segment_BL: Array | None = None
    """The number of a token's document, within which attention stays; None: a row is one document. Not with caches."""


class DecoderOutput(flax.struct.PyTreeNode):
    hidden_BLD: Array
    """After the last norm."""
    output_DV: Array
    """float32; what ``hidden_BLD`` is projected by."""
    statistics: MoEStatistics | None
    """Leaves [MoE layers, B, ...]: each sequence is one routing group. None without MoE layers."""
    caches: tuple[LayerCache, ...] | None = None

    @property
    def logits_BLV(self) -> Array:
        """float32."""
        return float32_product(self.hidden_BLD, self.output_DV.astype(self.hidden_BLD.dtype))


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP or MoE(norm(x))."""

    config: ModelConfig
    is_moe: bool

    @nn.compact
    def __call__(
        self,
        x_BLD: Array,
        layer: Array | int,
        context: Context,
        expert_bias_E: Array | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Array, MoEStatistics | None, LayerCache | None]:
        config, rate = self.config, self.config.dropout_rate
        x_BLD = constrain(x_BLD, ("batch", None, None))
        keys_B = fold_in(context.keys_B, layer)
        normed_BLD = Norm(config, name="attention_norm")(x_BLD)
        y_BLD, cache = Attention(config, name="attention")(normed_BLD, context, cache, fold_in(keys_B, 0))
        x_BLD = x_BLD + dropout(y_BLD, rate, fold_in(keys_B, 1))
        normed_BLD = Norm(config, name="mlp_norm")(x_BLD)
        y_BLD, statistics = self._feed_forward(normed_BLD, context, expert_bias_E, fold_in(keys_B, 2))
        return x_BLD + dropout(y_BLD, rate, fold_in(keys_B, 3)), statistics, cache

    def _feed_forward(
        self, x_BLD: Array, context: Context, expert_bias_E: Array | None, noise_keys_B: Array | None
    ) -> tuple[Array, MoEStatistics | None]:
        if not self.is_moe:
            return DenseMLP(self.config, dense_width(self.config), name="mlp")(x_BLD), None
        return MoE(self.config, name="moe")(  # a sequence is one group of tokens
            x_BLD,
            train=context.train,
            token_mask_GT=context.token_mask_BL,
            noise_keys_G=noise_keys_B if context.train else None,
            expert_bias_E=expert_bias_E,
        )


class Period(nn.Module):
    """The repeated unit of depth: ``every`` blocks of which the last is MoE, or one dense block."""

    config: ModelConfig
    kinds: tuple[bool, ...]
    """Which of the period's blocks are MoE."""

    @nn.compact
    def __call__(
        self, x_BLD: Array, first_layer: Array, context: Context, expert_bias_E: Array | None
    ) -> tuple[Array, MoEStatistics | None]:
        statistics = None
        for index, is_moe in enumerate(self.kinds):
            block = Block(self.config, is_moe, name=f"block_{index}")
            x_BLD, block_statistics, _ = block(x_BLD, first_layer + index, context, expert_bias_E)
            statistics = block_statistics if is_moe else statistics
        return x_BLD, statistics


class Decoder(nn.Module):
    """Token ids to next-token logits."""

    config: ModelConfig
    vocab_size: int
    unstacked: bool = False
    """Walk the blocks one by one, on parameters from ``unstack``."""

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        *,
        train: bool = False,
        expert_bias_NE: Array | None = None,
        keys_B: Array | None = None,
        caches: tuple[LayerCache, ...] | None = None,
        logits_at_B: Array | None = None,
    ) -> DecoderOutput:
        """Logits [B, L, V] for the token after each position.

        Args:
          train: capacity binds and router noise is on; otherwise nothing is dropped.
          expert_bias_NE: the router state, where the router has one; zeros while parameters are created.
          keys_B: one random key a sequence for dropout and noise; None: neither.
          caches: one a layer, only with ``unstacked``; queries then see the last M positions in the cache.
          logits_at_B: the place in each row whose logits alone are computed, [B, 1, V]; None: all.
        """
        config = self.config
        position_BL, mask_BLM = tokens.position_BL, None
        if position_BL is None:
            position_BL = jnp.broadcast_to(jnp.arange(tokens.id_BL.shape[1]), tokens.id_BL.shape)
        if caches is not None:
            mask_BLM = cache_mask(position_BL, jnp.max(position_BL, axis=1), caches[0].key_BJMA.shape[2])
        elif config.attention not in ("blocks", "cudnn"):
            mask_BLM = causal_mask(position_BL, tokens.segment_BL)
        # With caches a text may go on past the context.
        rotation = rotation_of(config, tokens.id_BL.shape[1], tokens.position_BL, at_any=caches is not None)
        context = Context(position_BL, rotation, tokens.segment_BL, mask_BLM, tokens.mask_BL, keys_B, train)

        embedding_init = with_axes(initializers.normal(config.init_std), ("vocab", "embed"))
        embedding_VD = self.param("embedding", embedding_init, (self.vocab_size, config.embed_dim))
        x_BLD = self._embed(embedding_VD, tokens.id_BL, context)
        if expert_bias_NE is None and self.is_initializing():
            expert_bias_NE = initial_expert_bias(config)
        if self.unstacked:
            x_BLD, statistics, caches = self._walk(x_BLD, context, expert_bias_NE, caches)
        else:
            x_BLD, statistics = self._scan(x_BLD, context, expert_bias_NE)
        if logits_at_B is not None:
            x_BLD = jnp.take_along_axis(x_BLD, logits_at_B[:, None, None], axis=1)
        hidden_BLD = Norm(config, name="final_norm")(x_BLD)
        return DecoderOutput(hidden_BLD, self._output(embedding_VD), statistics, caches)

    def _embed(self, embedding_VD: Array, id_BL: Array, context: Context) -> Array:
        config = self.config
        x_BLD = jnp.take(constrain(embedding_VD, ("vocab", None)), id_BL, axis=0, mode="clip")
        if config.positions == "learned":
            init = with_axes(initializers.normal(config.init_std), ("position", "embed"))
            positions_LD = self.param("positions", init, (config.context_length, config.embed_dim))
            x_BLD += jnp.take(constrain(positions_LD, ("position", None)), context.position_BL, axis=0, mode="clip")
        x_BLD = x_BLD.astype(config.dtype)
        if config.embedding_dropout:
            # Blocks fold in their layer, 0 to N-1, so N is free.
            keys_B = fold_in(fold_in(context.keys_B, config.num_layers), 0)
            x_BLD = dropout(x_BLD, config.dropout_rate, keys_B)
        return constrain(x_BLD, ("batch", None, None))

    def _output(self, embedding_VD: Array) -> Array:
        if self.config.tie_embeddings:
            return embedding_VD.T
        init = with_axes(matrix_init(self.config), ("embed", "vocab"))
        return self.param("output", init, (self.config.embed_dim, self.vocab_size))

    def _scan(
        self, x_BLD: Array, context: Context, expert_bias_NE: Array | None
    ) -> tuple[Array, MoEStatistics | None]:
        statistics = None
        for name, kinds, first, repeats in layout(self.config):
            remat = self.config.remat
            period = Period if remat == "none" else nn.remat(Period, prevent_cse=False, policy=_remat_policy(remat))
            scan = nn.scan(
                period,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, 0),
                length=repeats,
                unroll=min(self.config.scan_unroll, repeats),
                metadata_params={nn.PARTITION_NAME: "layer"},
            )
            first_layers = first + len(kinds) * jnp.arange(repeats)
            bias_NE = expert_bias_NE if any(kinds) else None
            x_BLD, statistics = scan(self.config, kinds, name=name)(x_BLD, first_layers, context, bias_NE)
        return x_BLD, statistics

    def _walk(
        self, x_BLD: Array, context: Context, expert_bias_NE: Array | None, caches: tuple[LayerCache, ...] | None
    ) -> tuple[Array, MoEStatistics | None, tuple[LayerCache, ...] | None]:
        all_statistics, new_caches = [], []
        is_moe = [kind for _, kinds, _, repeats in layout(self.config) for kind in kinds * repeats]
        for layer in range(self.config.num_layers):
            block = Block(self.config, is_moe[layer], name=f"layer_{layer}")
            bias_E = expert_bias_NE[len(all_statistics)] if is_moe[layer] and expert_bias_NE is not None else None
            cache = None if caches is None else caches[layer]
            x_BLD, statistics, cache = block(x_BLD, layer, context, bias_E, cache)
            new_caches.append(cache)
            if statistics is not None:
                all_statistics.append(statistics)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *all_statistics) if all_statistics else None
        return x_BLD, stacked, None if caches is None else tuple(new_caches)


def forward(
    decoder: Decoder,
    variables: Variables,
    tokens: Tokens,
    *,
    train: bool = False,
    keys_B: Array | None = None,
    caches: tuple[LayerCache, ...] | None = None,
    logits_at_B: Array | None = None,
) -> DecoderOutput:
    """``decoder`` as a pure function of its variables; arguments as in ``Decoder.__call__``."""
    params, bias_NE = {"params": variables.params}, variables.expert_bias_NE
    options = {"expert_bias_NE": bias_NE, "keys_B": keys_B, "caches": caches, "logits_at_B": logits_at_B}
    return cast(DecoderOutput, decoder.apply(params, tokens, train=train, **options))


def layout(config: ModelConfig) -> list[tuple[str, tuple[bool, ...], int, int]]:
    """The scans of the decoder in order: (name, which blocks of its period are MoE, first layer, periods)."""
    moe = config.moe
    if not moe.num_experts:
        return [("periods", (False,), 0, config.num_layers)]
    dense = [("first_dense", (False,), 0, moe.first_dense)] if moe.first_dense else []
    kinds = (False,) * (moe.every - 1) + (True,)
    return [*dense, ("periods", kinds, moe.first_dense, (config.num_layers - moe.first_dense) // moe.every)]


def initial_expert_bias(config: ModelConfig) -> Array | None:
    """The router state before the first step: [MoE layers, E] zeros where the router has one."""
    moe = config.moe
    if not moe.num_experts or not ROUTERS[moe.router].has_state:
        return None
    return jnp.zeros(((config.num_layers - moe.first_dense) // moe.every, moe.num_experts), jnp.float32)


_MATRICES = frozenset({"query", "key", "value", "out", "w_up", "w_gate", "w_down", "output"})
"""Parameters that are only ever multiplied in the type of the activations."""


def unstack(variables: Variables, config: ModelConfig) -> Variables:
    """The variables of a scanned ``Decoder`` for an ``unstacked`` one: parameters ``layer_0`` to ``layer_{N-1}``."""
    params = variables.params
    names = {name for name, _, _, _ in layout(config)}
    unstacked = {name: value for name, value in params.items() if name not in names}
    for name, kinds, first, repeats in layout(config):
        for turn in range(repeats):
            for index in range(len(kinds)):
                block = jax.tree.map(lambda leaf, turn=turn: leaf[turn], params[name][f"block_{index}"])
                unstacked[f"layer_{first + turn * len(kinds) + index}"] = block
    return variables.replace(params=unstacked)


def cast_matrices(variables: Variables, config: ModelConfig) -> Variables:
    """``variables`` with the matrices in the type of the activations, in which they would be multiplied anyway.

    What is computed with in float32 stays so: the router, norms and embeddings.
    """

    def cast(path: tuple, leaf: PyTree) -> PyTree:
        return leaf.astype(config.dtype) if path[-1].key in _MATRICES else leaf

    return variables.replace(params=jax.tree_util.tree_map_with_path(cast, variables.params))


def _remat_policy(remat: Literal["dots", "full"]) -> Any:
    """What the forward pass keeps for the backward pass: the matrix products' results, or only each period's input."""
    policies = jax.checkpoint_policies
    # The first policy does not see into custom_vjp functions.
    named = policies.save_only_these_names(PRODUCTS, attention_blocks.NAME)
    saved = policies.save_from_both_policies(policies.dots_saveable, named)
    return saved if remat == "dots" else None
