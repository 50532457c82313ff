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
from moe_jax.model.attention import Attention, LayerCache, cache_mask, causal_mask
from moe_jax.model.layers import Norm, dropout, fold_in, matrix_init, with_axes
from moe_jax.model.moe.experts import expert_mlp
from moe_jax.model.moe.layer import MoE, MoEStatistics, mlp_weights


class Context(flax.struct.PyTreeNode):
    """What every block of one forward pass shares."""

    position_BL: Array
    mask_BLM: Array
    token_mask_BL: Array | None
    """True for real tokens; None: all are."""
    keys_B: Array | None
    """One random key a sequence for dropout and router noise; None: no randomness."""
    train: bool = flax.struct.field(pytree_node=False)


class DecoderOutput(flax.struct.PyTreeNode):
    logits_BLV: Array
    """float32."""
    statistics: MoEStatistics | None
    """Leaves [MoE layers, B, ...]: each sequence is one routing group. None without MoE layers."""
    caches: tuple[LayerCache, ...] | None = None


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP or MoE(norm(x))."""

    config: ModelConfig
    is_moe: bool

    @nn.compact
    def __call__(
        self, x_BLD: Array, layer: Array | int, context: Context, cache: LayerCache | None = None
    ) -> tuple[Array, MoEStatistics | None, LayerCache | None]:
        config = self.config
        keys_B = fold_in(context.keys_B, layer)
        normed_BLD = Norm(config, name="attention_norm")(x_BLD)
        y_BLD, cache = Attention(config, name="attention")(
            normed_BLD, context.position_BL, context.mask_BLM, cache, keys_B
        )
        x_BLD = x_BLD + _dropout(config, y_BLD, keys_B, 1)
        normed_BLD = Norm(config, name="mlp_norm")(x_BLD)
        statistics = None
        if self.is_moe:
            noise_keys_B = fold_in(keys_B, 2) if context.train else None
            y_BLD, statistics = MoE(config, name="moe")(
                normed_BLD, train=context.train, token_mask_GT=context.token_mask_BL, noise_keys_G=noise_keys_B
            )
        else:
            y_BLD = DenseMLP(config, name="mlp")(normed_BLD)
        return x_BLD + _dropout(config, y_BLD, keys_B, 3), statistics, cache


class DenseMLP(nn.Module):
    """The MLP of a dense block."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        D = x_BLD.shape[-1]
        width = self.config.mlp_dim or self.config.moe.top_k * self.config.moe.expert_dim
        weights = mlp_weights(self, self.config, D, width)
        return expert_mlp(weights, x_BLD.reshape(-1, D), self.config.activation).reshape(x_BLD.shape)


class Period(nn.Module):
    """The repeated unit of depth: ``every`` blocks of which the last is MoE, or one dense block."""

    config: ModelConfig
    kinds: tuple[bool, ...]
    """Which of the period's blocks are MoE."""

    @nn.compact
    def __call__(self, x_BLD: Array, first_layer: Array, context: Context) -> tuple[Array, MoEStatistics | None]:
        statistics = None
        for index, is_moe in enumerate(self.kinds):
            block = Block(self.config, is_moe, name=f"block_{index}")
            x_BLD, block_statistics, _ = block(x_BLD, first_layer + index, context)
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
        tokens_BL: Array,
        *,
        train: bool = False,
        token_mask_BL: Array | None = None,
        keys_B: Array | None = None,
        position_BL: Array | None = None,
        caches: tuple[LayerCache, ...] | None = None,
    ) -> DecoderOutput:
        """Logits [B, L, V] for the token after each position.

        Args:
          tokens_BL: int32.
          train: capacity binds and router noise is on; otherwise nothing is dropped.
          token_mask_BL: True for real tokens; a masked token sends no rows, takes no capacity and counts nowhere.
          keys_B: one random key a sequence for dropout and noise; None: neither.
          position_BL: int32 positions; None: 0 to L-1. A negative one is padding.
          caches: one a layer, only with ``unstacked``; queries then see the last M positions in the cache.
        """
        config = self.config
        B, L = tokens_BL.shape
        if position_BL is None:
            position_BL = jnp.broadcast_to(jnp.arange(L), (B, L))
        if caches is None:
            mask_BLM = causal_mask(position_BL)
        else:
            mask_BLM = cache_mask(position_BL, jnp.max(position_BL, axis=1), caches[0].key_BMJA.shape[1])
        context = Context(position_BL, mask_BLM, token_mask_BL, keys_B, train)

        embedding_init = with_axes(initializers.normal(config.init_std), ("vocab", "embed"))
        embedding_VD = self.param("embedding", embedding_init, (self.vocab_size, config.embed_dim))
        x_BLD = jnp.take(embedding_VD, tokens_BL, axis=0, mode="clip")
        if config.positions == "learned":
            init = with_axes(initializers.normal(config.init_std), ("position", "embed"))
            positions_LD = self.param("positions", init, (config.context_length, config.embed_dim))
            x_BLD = x_BLD + jnp.take(positions_LD, position_BL, axis=0, mode="clip")
        x_BLD = x_BLD.astype(config.dtype)
        x_BLD = _dropout(config, x_BLD, fold_in(keys_B, config.num_layers), 0)
        x_BLD = nn.with_logical_constraint(x_BLD, ("batch", None, None))
        x_BLD, statistics, caches = (
            self._walk(x_BLD, context, caches) if self.unstacked else (*self._scan(x_BLD, context), None)
        )
        x_BLD = Norm(config, name="final_norm")(x_BLD)
        if config.tie_embeddings:
            output_DV = embedding_VD.T
        else:
            init = with_axes(matrix_init(config), ("embed", "vocab"))
            output_DV = self.param("output", init, (config.embed_dim, self.vocab_size))
        logits_BLV = jnp.matmul(x_BLD, output_DV.astype(x_BLD.dtype), preferred_element_type=jnp.float32)
        return DecoderOutput(logits_BLV, statistics, caches)

    def _scan(self, x_BLD: Array, context: Context) -> tuple[Array, MoEStatistics | None]:
        statistics = None
        for name, kinds, first, repeats in layout(self.config):
            period = Period
            if self.config.remat != "none":
                period = nn.remat(Period, prevent_cse=False, policy=_remat_policy(self.config.remat))
            scan = nn.scan(
                period,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=repeats,
                unroll=min(self.config.scan_unroll, repeats),
                metadata_params={nn.PARTITION_NAME: "layer"},
            )
            first_layers = first + len(kinds) * jnp.arange(repeats)
            x_BLD, statistics = scan(self.config, kinds, name=name)(x_BLD, first_layers, context)
        return x_BLD, statistics

    def _walk(
        self, x_BLD: Array, context: Context, caches: tuple[LayerCache, ...] | None
    ) -> tuple[Array, MoEStatistics | None, tuple[LayerCache, ...] | None]:
        all_statistics, new_caches = [], []
        is_moe = [kind for _, kinds, _, repeats in layout(self.config) for kind in kinds * repeats]
        for layer in range(self.config.num_layers):
            block = Block(self.config, is_moe[layer], name=f"layer_{layer}")
            x_BLD, statistics, cache = block(x_BLD, layer, context, None if caches is None else caches[layer])
            new_caches.append(cache)
            if statistics is not None:
                all_statistics.append(statistics)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *all_statistics) if all_statistics else None
        return x_BLD, stacked, None if caches is None else tuple(new_caches)


def forward(
    decoder: Decoder,
    params: PyTree,
    tokens_BL: Array,
    *,
    train: bool = False,
    token_mask_BL: Array | None = None,
    keys_B: Array | None = None,
    position_BL: Array | None = None,
    caches: tuple[LayerCache, ...] | None = None,
) -> DecoderOutput:
    """``decoder`` as a pure function of its parameters; arguments as in ``Decoder.__call__``."""
    return cast(
        DecoderOutput,
        decoder.apply(
            {"params": params},
            tokens_BL,
            train=train,
            token_mask_BL=token_mask_BL,
            keys_B=keys_B,
            position_BL=position_BL,
            caches=caches,
        ),
    )


def layout(config: ModelConfig) -> list[tuple[str, tuple[bool, ...], int, int]]:
    """The scans of the decoder in order: (name, which blocks of its period are MoE, first layer, periods)."""
    moe = config.moe
    if not moe.num_experts:
        return [("periods", (False,), 0, config.num_layers)]
    dense = [("first_dense", (False,), 0, moe.first_dense)] if moe.first_dense else []
    kinds = (False,) * (moe.every - 1) + (True,)
    return [*dense, ("periods", kinds, moe.first_dense, (config.num_layers - moe.first_dense) // moe.every)]


def unstack(params: PyTree, config: ModelConfig) -> PyTree:
    """The parameters of a scanned ``Decoder`` as those of an ``unstacked`` one: ``layer_0`` to ``layer_{N-1}``."""
    names = {name for name, _, _, _ in layout(config)}
    unstacked = {name: value for name, value in params.items() if name not in names}
    for name, kinds, first, repeats in layout(config):
        for turn in range(repeats):
            for index in range(len(kinds)):
                block = jax.tree.map(lambda leaf, turn=turn: leaf[turn], params[name][f"block_{index}"])
                unstacked[f"layer_{first + turn * len(kinds) + index}"] = block
    return unstacked


def init_caches(config: ModelConfig, batch_size: int, cache_length: int) -> tuple[LayerCache, ...]:
    """Empty caches for every layer: [B, M, J, A] in the activations' type."""
    J = config.num_kv_heads or config.num_heads
    shape = (batch_size, cache_length, J, config.embed_dim // config.num_heads)
    zeros = jnp.zeros(shape, config.dtype)
    return tuple(LayerCache(key_BMJA=zeros, value_BMJA=zeros) for _ in range(config.num_layers))


def _dropout(config: ModelConfig, x_BLD: Array, keys_B: Array | None, site: int) -> Array:
    site_keys_B = fold_in(keys_B, site)
    if site_keys_B is None or not config.dropout_rate:
        return x_BLD
    return dropout(x_BLD, config.dropout_rate, site_keys_B)


def _remat_policy(remat: Literal["dots", "full"]) -> Any:
    """What the forward pass keeps for the backward pass: the matrix products' results, or only each period's input."""
    return jax.checkpoint_policies.dots_saveable if remat == "dots" else None
