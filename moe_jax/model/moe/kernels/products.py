"""``ragged``: one grouped product of each matrix. ``by_row``: each row brings its expert's weights.

``jax.lax.ragged_dot`` is for TPUs: elsewhere XLA expands it to a masked product over all experts. Gathering weights is
for a handful of rows, as in decoding.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.axes import Array
from moe_jax.model.mlp import Activation, ExpertWeights, expert_mlp, mlp
from moe_jax.model.moe.dispatch import PRODUCTS, through_sorted_rows
from moe_jax.model.moe.plan import RoutingPlan

Product = Callable[[Array, Array, Array], Array]
"""A grouped product ([S, in], [E, in, out], [E] int32) -> [S, out]."""


def ragged(
    x_GTD: Array, plan: RoutingPlan, weights: ExpertWeights, activation: Activation, capacity: int
) -> tuple[Array, Array]:
    """Sorted rows, by ``jax.lax.ragged_dot``; arguments and results as in ``dispatch.einsum``."""
    experts = functools.partial(mlp_by_products, jax.lax.ragged_dot, weights, activation)
    return through_sorted_rows(x_GTD, plan, weights.w_up_EDF.shape[0], 1, experts)


def mlp_by_products(
    product: Product, weights: ExpertWeights, activation: Activation, x_SD: Array, size_E: Array
) -> Array:
    """The MLP of rows sorted by expert, by one grouped product a matrix; zeros past the last expert's rows."""
    E, dtype = size_E.shape[0], x_SD.dtype
    # Kernels leave anything in rows past the last expert's, and in the gradient of an expert without rows: a choice
    # of zeros there, on the way in and out, keeps it from both passes, NaN included.
    is_row_S1 = (jnp.arange(x_SD.shape[0]) < jnp.sum(size_E))[:, None]
    has_rows_E11 = (size_E > 0)[:, None, None]

    def linear(x: Array, kernel: Array, bias: Array | None) -> Array:
        kernel = jnp.where(has_rows_E11, kernel, 0).astype(dtype)
        y = jnp.where(is_row_S1, product(jnp.where(is_row_S1, x, 0), kernel, size_E), 0)
        y = checkpoint_name(y, PRODUCTS)
        if bias is None:
            return y
        # As a product: the backward pass of a gather by expert would be a scatter-add.
        expert_S = jnp.repeat(jnp.arange(E), size_E, total_repeat_length=x.shape[0])
        return y + jax.nn.one_hot(expert_S, E, dtype=dtype) @ bias.astype(dtype)

    return mlp(linear, weights, x_SD, activation)[0]


def by_row(
    x_GTD: Array, plan: RoutingPlan, weights: ExpertWeights, activation: Activation, capacity: int
) -> tuple[Array, Array]:
    """Moves no rows: each, in token order, gathers the weights of its own expert. Drops none.

    Reads the weights of as many experts as there are rows, however many experts there are.
    """
    G, T, D = x_GTD.shape
    K = plan.expert_TK.shape[-1]
    is_row_GTK = plan.expert_TK < weights.w_up_EDF.shape[0]
    x_RD = jnp.broadcast_to(x_GTD[:, :, None], (G, T, K, D)).reshape(-1, D)
    # Where there is no row some expert computes one all the same; its weight is zero.
    expert_R = jnp.where(is_row_GTK, plan.expert_TK, 0).reshape(-1)
    weights_of_rows = jax.tree.map(lambda leaf: jnp.take(leaf, expert_R, axis=0, mode="clip"), weights)
    y_RD = expert_mlp(weights_of_rows, x_RD[:, None], activation)[:, 0]
    y_GTKD = y_RD.reshape(G, T, K, D).astype(jnp.float32)
    y_GTD = jnp.sum(y_GTKD * plan.combine_weight_TK[..., None], axis=2)
    return y_GTD.astype(x_GTD.dtype), is_row_GTK
