"""Causal grouped-query attention with rotary positions, over a sequence or against a cache of keys and values."""

from typing import Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import initializers

from moe_jax.axes import Array
from moe_jax.config import ModelConfig
from moe_jax.errors import UserError
from moe_jax.model.layers import dropout, matrix_init, rms_normalise
from moe_jax.model.machine import Machine
from moe_jax.sharding.mesh import with_axes


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


def rotate(x_BLHA: Array, position_BL: Array, theta: float) -> Array:
    """Rotary position embedding (arXiv 2104.09864, eq. 34): pairs (i, i + A/2) turn by position · theta^(-2i/A).

    The paper pairs neighbours; pairing halves is the same map under a permutation of the weights.

    >>> x_BLHA = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)  # one pair, (1, 0): two radians on it is (cos 2, sin 2)
    >>> y_BLHA = rotate(x_BLHA, jnp.array([[2]]), theta=100.0)
    >>> [round(float(each), 4) for each in y_BLHA.reshape(-1)]
    [-0.4161, 0.9093]
    """
    angle_BLA = rotary_angles(position_BL, x_BLHA.shape[-1] // 2, theta)
    cos, sin = jnp.cos(angle_BLA)[:, :, None], jnp.sin(angle_BLA)[:, :, None]
    first, second = jnp.split(x_BLHA.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLHA.dtype)


def rotary_angles(position_BL: Array, num_pairs: int, theta: float) -> Array:
    """position · theta^(-i / num_pairs) less whole turns, in radians, [B, L, pairs], to 4e-7 at every int32 position.

    A float32 product would be off by 2e-5 at position 1,000, and by 2e-3 at 100,000.
    """
    turns_A = theta ** (-np.arange(num_pairs) / num_pairs) / (2 * np.pi)  # of one position, in float64
    # In units of 2^-32 turns an int32 product overflows by whole turns, so the angle is what is left.
    units_A = np.round(turns_A * 2.0**32)
    fraction_BLA = position_BL[:, :, None] * units_A.astype(np.uint32).view(np.int32)[None, None, :]
    rest_A = ((turns_A * 2.0**32 - units_A) * (2 * np.pi / 2.0**32)).astype(np.float32)
    rest_BLA = position_BL[:, :, None].astype(jnp.float32) * rest_A[None, None, :]
    return fraction_BLA.astype(jnp.float32) * np.float32(2 * np.pi / 2.0**32) + rest_BLA


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


def choose_attention(config: ModelConfig, *, train: bool, machine: Machine) -> Literal["full", "cudnn"]:
    """The way of computing attention, as set or, for ``auto``, cuDNN's kernel where it takes the model.

    Raises UserError where the setting names cuDNN and it cannot be.
    """
    obstacle = None
    A = config.embed_dim // config.num_heads
    if not machine.is_nvidia:
        obstacle = f"needs an NVIDIA GPU, which this {machine.platform} is not"
    elif config.dtype != "bfloat16":
        obstacle = f"computes in bfloat16, got model.dtype={config.dtype}"
    elif A % 8 or A > 128:
        obstacle = f"takes heads of up to 128 channels in multiples of 8, got embed_dim / num_heads = {A}"
    elif train and config.dropout_rate:
        obstacle = f"has no dropout, got model.dropout_rate={config.dropout_rate}"
    if config.attention == "cudnn" and obstacle is not None:
        raise UserError(f"model.attention=cudnn {obstacle}; set it to auto")
    return "full" if config.attention == "full" or obstacle is not None else "cudnn"


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
    """Puts keys and values into the slots of their positions; a negative position (padding) is not written.

    A single position must be a real one.
    """
    M = cache.key_BJMA.shape[2]
    slot_BL = jnp.where(position_BL >= 0, position_BL % M, M)

    def put(ring_JMA: Array, new_LJA: Array, slot_L: Array) -> Array:
        if slot_L.size == 1:  # needs no index that may be out of bounds, which costs a copy of the ring
            return jax.lax.dynamic_update_slice(ring_JMA, _heads_first(new_LJA), (0, slot_L[0], 0))
        return ring_JMA.at[:, slot_L].set(_heads_first(new_LJA), mode="drop")

    return LayerCache(
        key_BJMA=jax.vmap(put)(cache.key_BJMA, key_BLJA, slot_BL),
        value_BJMA=jax.vmap(put)(cache.value_BJMA, value_BLJA, slot_BL),
    )


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
        self, x_BLD: Array, position_BL: Array, mask_BLM: Array | None, cache: LayerCache | None, keys_B: Array | None
    ) -> tuple[Array, LayerCache | None]:
        config = self.config
        H, D = config.num_heads, config.embed_dim
        J, A = config.num_kv_heads or H, D // config.num_heads
        B, L, _ = x_BLD.shape
        query_BLHA = self._linear("query", x_BLD, H * A, ("embed", "heads")).reshape(B, L, H, A)
        key_BLJA = self._linear("key", x_BLD, J * A, ("embed", "heads")).reshape(B, L, J, A)
        value_BLJA = self._linear("value", x_BLD, J * A, ("embed", "heads")).reshape(B, L, J, A)
        if config.qk_norm:
            init = with_axes(initializers.ones, ("head_dim",))
            query_BLHA = rms_normalise(query_BLHA, self.param("query_norm", init, (A,))).astype(x_BLD.dtype)
            key_BLJA = rms_normalise(key_BLJA, self.param("key_norm", init, (A,))).astype(x_BLD.dtype)
        if config.positions == "rotary":
            query_BLHA = rotate(query_BLHA, position_BL, config.rope_theta)
            key_BLJA = rotate(key_BLJA, position_BL, config.rope_theta)
        if mask_BLM is None:
            out_BLHA = jax.nn.dot_product_attention(
                query_BLHA, key_BLJA, value_BLJA, is_causal=True, implementation="cudnn"
            )
        else:
            key_BJMA, value_BJMA = _heads_first(key_BLJA), _heads_first(value_BLJA)
            if cache is not None:
                cache = write_cache(cache, key_BLJA, value_BLJA, position_BL)
                key_BJMA, value_BJMA = cache.key_BJMA, cache.value_BJMA
            out_BLHA = attend(query_BLHA, key_BJMA, value_BJMA, mask_BLM, config.dropout_rate, keys_B)
        y_BLD = self._linear("out", out_BLHA.reshape(B, L, D), D, ("heads", "embed"), is_block_output=True)
        return y_BLD, cache

    def _linear(
        self, name: str, x_BLD: Array, width: int, axes: tuple[str, str], is_block_output: bool = False
    ) -> Array:
        """The product with the matrix ``name``, whose axes are called ``axes``, and the bias if there is one."""
        init = with_axes(matrix_init(self.config, is_block_output=is_block_output), axes)
        y = x_BLD @ self.param(name, init, (x_BLD.shape[-1], width)).astype(x_BLD.dtype)
        if not self.config.use_bias:
            return y
        bias_init = with_axes(initializers.zeros, axes[1:])
        return y + self.param(f"{name}_bias", bias_init, (width,)).astype(x_BLD.dtype)[None, None, :]
