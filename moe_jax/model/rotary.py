"""Rotary position embedding (arXiv 2104.09864): how far each position turns, and turning queries and keys by it."""

import flax.struct
import jax.numpy as jnp
import numpy as np

from moe_jax.axes import Array
from moe_jax.config import ModelConfig


class Rotation(flax.struct.PyTreeNode):
    """The angle of each place and pair of channels, [B or 1, L, A/2] float32."""

    cos_BLA: Array
    sin_BLA: Array


def rotate(x_BLHA: Array, rotation: Rotation) -> Array:
    """Turns each pair of channels (i, i + A/2) by its angle (eq. 34).

    The paper pairs neighbours; pairing halves is the same map under a permutation of the weights.

    >>> x_BLHA = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)  # one pair, (1, 0): two radians on it is (cos 2, sin 2)
    >>> y_BLHA = rotate(x_BLHA, rotation_at(jnp.array([[2]]), num_pairs=1, theta=100.0))
    >>> [round(float(each), 4) for each in y_BLHA.reshape(-1)]
    [-0.4161, 0.9093]
    """
    cos, sin = rotation.cos_BLA[:, :, None], rotation.sin_BLA[:, :, None]
    first, second = jnp.split(x_BLHA.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLHA.dtype)


def rotation_of(config: ModelConfig, length: int, position_BL: Array | None, *, at_any: bool) -> Rotation | None:
    """That of a row's places, or of ``position_BL``: below the context's length or ``length``, or with ``at_any`` of
    any size. None where positions are learned."""
    if config.positions != "rotary":
        return None
    num_pairs, theta = config.embed_dim // config.num_heads // 2, config.rope_theta
    if position_BL is None:
        return rotation_in_row(length, num_pairs, theta)
    if at_any:
        return rotation_at(position_BL, num_pairs, theta)
    return rotation_in_row(max(length, config.context_length), num_pairs, theta, position_BL)


def rotation_in_row(length: int, num_pairs: int, theta: float, position_BL: Array | None = None) -> Rotation:
    """That of the positions 0 to ``length`` - 1, or of ``position_BL`` among them; NaN past the last.

    By a table in the program: XLA would compute sines anew for every head, layer and pass, a tenth of a CPU's step.
    """
    angle_LA = np.arange(length)[:, None] * theta ** (-np.arange(num_pairs) / num_pairs)  # in float64
    tables = np.cos(angle_LA).astype(np.float32), np.sin(angle_LA).astype(np.float32)
    if position_BL is None:
        return Rotation(*(jnp.asarray(table)[None] for table in tables))
    take = [jnp.take(table, position_BL, axis=0, mode="fill", fill_value=jnp.nan) for table in tables]
    return Rotation(*take)


def rotation_at(position_BL: Array, num_pairs: int, theta: float) -> Rotation:
    """That of any int32 positions: position · theta^(-i / num_pairs) radians, to 4e-7.

    A float32 product would be off by 2e-5 at position 1,000, and by 2e-3 at 100,000.
    """
    turns_A = theta ** (-np.arange(num_pairs) / num_pairs) / (2 * np.pi)  # of one position, in float64
    # In units of 2^-32 turns an int32 product overflows by whole turns, so the angle is what is left.
    units_A = np.round(turns_A * 2.0**32)
    fraction_BLA = position_BL[:, :, None] * units_A.astype(np.uint32).view(np.int32)[None, None, :]
    rest_A = ((turns_A * 2.0**32 - units_A) * (2 * np.pi / 2.0**32)).astype(np.float32)
    rest_BLA = position_BL[:, :, None].astype(jnp.float32) * rest_A[None, None, :]
    angle_BLA = fraction_BLA.astype(jnp.float32) * np.float32(2 * np.pi / 2.0**32) + rest_BLA
    return Rotation(jnp.cos(angle_BLA), jnp.sin(angle_BLA))
