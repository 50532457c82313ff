"""Causal grouped-query attention with rotary positions, over a sequence or against a cache of keys and values."""

import itertools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.linen import initializers

from moe_jax.axes import Array
from moe_jax.config import ModelConfig
from moe_jax.model.attention_blocks import attend_in_blocks
from moe_jax.model.layers import dropout, matrix_init, rms_normalise
from moe_jax.model.rotary import Rotation, rotate
from moe_jax.sharding.mesh import constrain, is_divided, with_axes


class Context(flax.struct.PyTreeNode):
    """What every block of one forward pass shares."""

    position_BL: Array
    rotation: Rotation | None
    """None: positions are learned."""
    segment_BL: Array | None
    mask_BLM: Array | None
    """True where query l may see key m; None: the keys of its segment up to its own place."""
    token_mask_BL: Array | None
    keys_B: Array | None
    """One random key a sequence for dropout and router noise; None: no randomness."""
    train: bool = flax.struct.field(pytree_node=False)


class LayerCache(flax.struct.PyTreeNode):
    """The keys and values of one layer: a ring in which position p lies in slot p mod M, so the last M are kept.

    Heads stand in front, as the products of ``attend`` read them: nothing is transposed for each token.
    """

    key_BJMA: Array
    """Rotated already, each by its own position."""
    value_BJMA: Array


def init_caches(config: ModelConfig, batch_size: int, cache_length: int) -> tuple[LayerCache, ...]:
    """Empty caches for every layer: [B, J, M, A] in the activations' type."""
    J = config.num_kv_heads or config.num_heads
    shape = (batch_size, J, cache_length, config.embed_dim // config.num_heads)
    zeros = jnp.zeros(shape, config.dtype)
    return tuple(LayerCache(key_BJMA=zeros, value_BJMA=zeros) for _ in range(config.num_layers))


def attend(
    query_BLHA: Array,
    key_BJMA: Array,
    value_BJMA: Array,
    mask_BLM: Array,
    dropout_rate: float = 0.0,
    dropout_keys_B: Array | None = None,
) -> Array:
    """Softmax attention; query head h reads key/value head h // (H/J) (grouped queries, arXiv 2305.13245).

    Args:
      mask_BLM: True where query l may see key m.
      dropout_rate, dropout_keys_B: dropout of the softmax's weights, with one key a sequence; None: no dropout.

    Returns:
      [B, L, H, A] in the type of the query; scores and softmax are in float32.
    """
    B, L, H, A = query_BLHA.shape
    J = key_BJMA.shape[1]
    # Heads in front of positions, so that both products are plain batched matrix products: the H/J query heads that
    # read one key/value head become rows of one matrix, [B, L, H, A] -> [B, J, H/J · L, A], head after head.
    query_BJQA = query_BLHA.reshape(B, L, J, H // J, A).transpose(0, 2, 3, 1, 4).reshape(B, J, (H // J) * L, A)
    scores_BJQM = jnp.matmul(query_BJQA, key_BJMA.transpose(0, 1, 3, 2), preferred_element_type=jnp.float32)
    scores_BJGLM = scores_BJQM.reshape(B, J, H // J, L, -1) * A**-0.5
    scores_BJGLM = jnp.where(mask_BLM[:, None, None], scores_BJGLM, -1e30)
    weights_BJGLM = dropout(jax.nn.softmax(scores_BJGLM, axis=-1), dropout_rate, dropout_keys_B)
    weights_BJQM = weights_BJGLM.reshape(scores_BJQM.shape).astype(query_BLHA.dtype)
    out_BJQA = jnp.matmul(weights_BJQM, value_BJMA)
    # And back: [B, J, H/J · L, A] -> [B, L, J · H/J, A].
    return out_BJQA.reshape(B, J, H // J, L, A).transpose(0, 3, 1, 2, 4).reshape(B, L, H, A)


def causal_mask(position_BL: Array, segment_BL: Array | None = None) -> Array:
    """[B, L, L], True where key m is not after query l and, where there are segments, of the same one.

    >>> causal_mask(jnp.array([[0, 1, 0]]), segment_BL=jnp.array([[1, 1, 2]])).astype(int).tolist()
    [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]
    """
    mask_BLM = position_BL[:, :, None] >= position_BL[:, None, :]
    if segment_BL is None:
        return mask_BLM
    return mask_BLM & (segment_BL[:, :, None] == segment_BL[:, None, :])


def write_cache(cache: LayerCache, key_BLJA: Array, value_BLJA: Array, position_BL: Array) -> LayerCache:
    """Puts keys and values into their positions' slots. A negative position (padding), never alone, is not written."""
    M = cache.key_BJMA.shape[2]
    slot_BL = jnp.where(position_BL >= 0, position_BL % M, M)

    pairs = ((cache.key_BJMA, _heads_first(key_BLJA)), (cache.value_BJMA, _heads_first(value_BLJA)))
    if slot_BL.size == 1:  # under vmap it would be a scatter, which is two kernels on a GPU
        return LayerCache(*(jax.lax.dynamic_update_slice(*pair, (0, 0, slot_BL[0, 0], 0)) for pair in pairs))

    def put(ring_JMA: Array, new_JLA: Array, slot_L: Array) -> Array:
        if slot_L.size == 1:  # needs no index that may be out of bounds, which costs a copy of the ring
            return jax.lax.dynamic_update_slice(ring_JMA, new_JLA, (0, slot_L[0], 0))
        return ring_JMA.at[:, slot_L].set(new_JLA, mode="drop")

    return LayerCache(*(jax.vmap(put)(*pair, slot_BL) for pair in pairs))


def _heads_first(x_LJA: Array) -> Array:
    """[..., L, J, A] -> [..., J, L, A]."""
    return jnp.swapaxes(x_LJA, -3, -2)


def cache_mask(position_BL: Array, last_position_B: Array, cache_length: int) -> Array:
    """[B, L, M]: True where the ring's slot holds a position p with query - M < p <= query.

    ``last_position_B`` is the newest position in the ring, so slot m holds the newest p <= last with p mod M = m.
    """
    slot_M = jnp.arange(cache_length)
    held_BM = last_position_B[:, None] - (last_position_B[:, None] - slot_M[None, :]) % cache_length
    query_BL1 = position_BL[:, :, None]
    held_B1M = held_BM[:, None, :]
    return (held_B1M >= 0) & (held_B1M <= query_BL1) & (held_B1M > query_BL1 - cache_length)


class Attention(nn.Module):
    """Creates the projections and calls ``attend``; with a cache it also returns the cache that holds the new keys."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BLD: Array, context: Context, cache: LayerCache | None, keys_B: Array | None
    ) -> tuple[Array, LayerCache | None]:
        config = self.config
        H, D = config.num_heads, config.embed_dim
        J, A = config.num_kv_heads or H, D // config.num_heads
        B, L, _ = x_BLD.shape
        query_BLHA, key_BLJA, value_BLJA = (
            y_BLD.reshape(B, L, -1, A)
            for y_BLD in self._linears(x_BLD, {"query": H * A, "key": J * A, "value": J * A}, ("embed", "heads"))
        )
        if config.qk_norm:
            init = with_axes(initializers.ones, ("head_dim",))
            query_BLHA = rms_normalise(query_BLHA, self.param("query_norm", init, (A,))).astype(x_BLD.dtype)
            key_BLJA = rms_normalise(key_BLJA, self.param("key_norm", init, (A,))).astype(x_BLD.dtype)
        if context.rotation is not None:
            query_BLHA = rotate(query_BLHA, context.rotation)
            key_BLJA = rotate(key_BLJA, context.rotation)
        mask_BLM, segment_BL = context.mask_BLM, context.segment_BL
        if mask_BLM is None and config.attention == "cudnn":
            assert segment_BL is None, "cudnn takes no segments: let for_machine choose with packed=True"
            out_BLHA = jax.nn.dot_product_attention(
                query_BLHA, key_BLJA, value_BLJA, is_causal=True, implementation="cudnn"
            )
        elif mask_BLM is None:
            out_BLHA = attend_in_blocks(query_BLHA, key_BLJA, value_BLJA, segment_BL)
        else:
            key_BJMA, value_BJMA = _heads_first(key_BLJA), _heads_first(value_BLJA)
            if cache is not None:
                cache = write_cache(cache, key_BLJA, value_BLJA, context.position_BL)
                key_BJMA, value_BJMA = cache.key_BJMA, cache.value_BJMA
            out_BLHA = attend(query_BLHA, key_BJMA, value_BJMA, mask_BLM, config.dropout_rate, keys_B)
        (y_BLD,) = self._linears(out_BLHA.reshape(B, L, D), {"out": D}, ("heads", "embed"), is_block_output=True)
        return y_BLD, cache

    def _linears(
        self, x_BLD: Array, widths: dict[str, int], axes: tuple[str, str], is_block_output: bool = False
    ) -> list[Array]:
        """The products with the matrices of these names and widths, whose axes are called ``axes``, with biases."""
        matrix = with_axes(matrix_init(self.config, is_block_output=is_block_output), axes)
        zeros = with_axes(initializers.zeros, (axes[1] if axes[1] != "embed" else "channel",))
        D, dtype, kernels, biases = x_BLD.shape[-1], x_BLD.dtype, [], []
        for name, width in widths.items():
            kernels.append(constrain(self.param(name, matrix, (D, width)).astype(dtype), axes))
            if self.config.use_bias:
                biases.append(self.param(f"{name}_bias", zeros, (width,)).astype(dtype)[None, None, :])
        # Narrow products are slow, so they are joined: 3 x 128 gained by it, 3 x 1,280 and single tokens lost.
        if x_BLD.shape[1] == 1 or sum(widths.values()) > 1024 or is_divided("heads"):
            products = [x_BLD @ kernel for kernel in kernels]
        else:
            ends = itertools.accumulate(widths.values())
            products = jnp.split(x_BLD @ jnp.concatenate(kernels, axis=1), list(ends)[:-1], axis=-1)
        return [y + bias for y, bias in zip(products, biases, strict=True)] if biases else products
