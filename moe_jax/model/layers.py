"""Small building blocks: normalisation, dropout and initialisation."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers

from moe_jax.axes import Array
from moe_jax.config import ModelConfig
from moe_jax.sharding.mesh import with_axes


def rms_normalise(x: Array, scale_D: Array, epsilon: float = 1e-6) -> Array:
    """x / sqrt(mean(x²) + ε) · scale over the last axis (arXiv 1910.07467, eq. 4), computed in float32.

    >>> y = rms_normalise(jnp.array([1.0, 7.0]), jnp.array([1.0, 2.0]))  # sqrt((1 + 49) / 2) = 5
    >>> [round(float(each), 4) for each in y]
    [0.2, 2.8]
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return _match(scale_D, x32) * x32


def layer_normalise(x: Array, scale_D: Array, bias_D: Array | None, epsilon: float = 1e-5) -> Array:
    """(x - mean) / sqrt(variance + ε) · scale + bias over the last axis (arXiv 1607.06450), computed in float32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon) * _match(scale_D, x32)
    return y if bias_D is None else y + _match(bias_D, x32)


def _match(vector_D: Array, x: Array) -> Array:
    return vector_D.reshape((1,) * (x.ndim - 1) + vector_D.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def float32_product(x: Array, kernel: Array, precision: jax.lax.Precision | None = None) -> Array:
    """x @ kernel with a float32 result, logits and router scores, of factors in the type of ``x``.

    The gradient comes back in float32 and is rounded to the type of ``x`` before it is multiplied on, and its products
    have no ``precision`` but the default, as those of every other gradient: accelerators multiply float32 at an eighth
    of the speed.
    """
    return jnp.matmul(x, kernel, precision=precision, preferred_element_type=jnp.float32)


def _float32_product_forward(
    x: Array, kernel: Array, precision: jax.lax.Precision | None
) -> tuple[Array, tuple[Array, Array]]:
    return float32_product(x, kernel, precision), (x, kernel)


def _float32_product_backward(
    precision: jax.lax.Precision | None, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    dy = dy.astype(x.dtype)
    # With x transposed rather than dy, which is as large as the logits.
    dkernel = jnp.matmul(x.reshape(-1, x.shape[-1]).T, dy.reshape(-1, dy.shape[-1]))
    return jnp.matmul(dy, kernel.T), dkernel


float32_product.defvjp(_float32_product_forward, _float32_product_backward)


def dropout(x: Array, rate: float, sequence_keys_B: Array | None) -> Array:
    """Zeroes elements with probability ``rate`` and scales the rest by 1/(1 - rate); one random key a sequence, or
    None for no dropout."""
    if sequence_keys_B is None or not rate:
        return x
    keep = jax.vmap(lambda key, row: jax.random.bernoulli(key, 1.0 - rate, row.shape))(sequence_keys_B, x)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def fold_in(sequence_keys_B: Array | None, data: int | Array) -> Array | None:
    """Folds ``data`` into every sequence's key; None, for no randomness, stays None."""
    if sequence_keys_B is None:
        return None
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(sequence_keys_B)


class Norm(nn.Module):
    """RMSNorm or LayerNorm, by configuration; returns the type of its input."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        D = x.shape[-1]
        scale_D = self.param("scale", with_axes(initializers.ones, ("channel",)), (D,))
        if self.config.norm == "rmsnorm":
            return rms_normalise(x, scale_D).astype(x.dtype)
        bias_D = None
        if self.config.use_bias:
            bias_D = self.param("bias", with_axes(initializers.zeros, ("channel",)), (D,))
        return layer_normalise(x, scale_D, bias_D).astype(x.dtype)


def matrix_init(
    config: ModelConfig, *, num_batch_axes: int = 0, is_block_output: bool = False
) -> Callable[..., Array]:
    """The initialiser of a matrix [..., in, out], by ``config.init``.

    scaled_normal: standard deviation init_std, over sqrt(2N) for the two matrices of a block that write into the
    residual stream (GPT-2's rule); kaiming: sqrt(2 / fan_in) (arXiv 1502.01852, eq. 10); xavier: sqrt(2 / (fan_in +
    fan_out)). ``num_batch_axes`` leading axes (experts) count in no fan.
    """
    if config.init == "scaled_normal":
        std = config.init_std / (2 * config.num_layers) ** 0.5 if is_block_output else config.init_std
        return initializers.normal(std)
    experts = tuple(range(num_batch_axes))
    if config.init == "kaiming":
        return initializers.variance_scaling(2.0, "fan_in", "normal", batch_axis=experts)
    return initializers.variance_scaling(1.0, "fan_avg", "normal", batch_axis=experts)
