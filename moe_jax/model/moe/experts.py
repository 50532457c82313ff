"""The expert MLP as a pure function: one call computes all experts on rows already grouped by expert."""

from collections.abc import Callable
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from moe_jax.axes import Array

Activation = Literal["swiglu", "gelu", "relu"]


class ExpertWeights(flax.struct.PyTreeNode):
    """The matrices of E experts (or of one dense MLP, without the expert axis)."""

    w_up_EDF: Array
    w_down_EFD: Array
    w_gate_EDF: Array | None = None
    """Only with swiglu."""
    b_up_EF: Array | None = None
    b_gate_EF: Array | None = None
    b_down_ED: Array | None = None


def expert_mlp(weights: ExpertWeights, x_ERD: Array, activation: Activation) -> Array:
    """Applies expert e to the rows x_ERD[e]: [..., E, R, D] -> [..., E, R, D] in the type of ``x``.

    swiglu: w_down(silu(w_gate x) * w_up x) (arXiv 2002.05202, eq. 6); gelu and relu: w_down(act(w_up x)).
    The weights are cast to the type of ``x``; every leading axis of the weights is a batch axis.
    """
    return mlp(_linear, weights, x_ERD, activation)[0]


def mlp(
    linear: Callable[[Array, Array, Array | None], Array], weights: ExpertWeights, x: Array, activation: Activation
) -> tuple[Array, tuple[Array, ...]]:
    """The MLP, of the given product of rows with (kernel, bias), and its pre-activations: up, and gate if there is."""
    pre_activations = (linear(x, weights.w_up_EDF, weights.b_up_EF),)
    if weights.w_gate_EDF is not None:
        pre_activations += (linear(x, weights.w_gate_EDF, weights.b_gate_EF),)
    return linear(activate(pre_activations, activation), weights.w_down_EFD, weights.b_down_ED), pre_activations


def activate(pre_activations: tuple[Array, ...], activation: Activation) -> Array:
    """The hidden layer: of (up, gate) with swiglu, otherwise of (up,)."""
    if activation == "swiglu":
        up, gate = pre_activations
        return jax.nn.silu(gate) * up
    return {"gelu": jax.nn.gelu, "relu": jax.nn.relu}[activation](pre_activations[0])


def _linear(x: Array, kernel: Array, bias: Array | None) -> Array:
    y = jnp.matmul(x, kernel.astype(x.dtype))
    return y if bias is None else y + bias.astype(x.dtype)[..., None, :]
