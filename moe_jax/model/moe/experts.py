"""The expert MLP as a pure function: one call computes all experts on rows already grouped by expert."""

from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from moe_jax.axes import Array


class ExpertWeights(flax.struct.PyTreeNode):
    """The matrices of E experts (or of one dense MLP, without the expert axis)."""

    w_up_EDF: Array
    w_down_EFD: Array
    w_gate_EDF: Array | None = None
    """Only with swiglu."""
    b_up_EF: Array | None = None
    b_gate_EF: Array | None = None
    b_down_ED: Array | None = None


def expert_mlp(weights: ExpertWeights, x_ERD: Array, activation: Literal["swiglu", "gelu", "relu"]) -> Array:
    """Applies expert e to the rows x_ERD[e]: [..., E, R, D] -> [..., E, R, D] in the type of ``x``.

    swiglu: w_down(silu(w_gate x) * w_up x) (arXiv 2002.05202, eq. 6); gelu and relu: w_down(act(w_up x)).
    The weights are cast to the type of ``x``; every leading axis of the weights is a batch axis.
    """
    hidden_ERF = _linear(x_ERD, weights.w_up_EDF, weights.b_up_EF)
    if activation == "swiglu":
        assert weights.w_gate_EDF is not None
        hidden_ERF = jax.nn.silu(_linear(x_ERD, weights.w_gate_EDF, weights.b_gate_EF)) * hidden_ERF
    else:
        hidden_ERF = {"gelu": jax.nn.gelu, "relu": jax.nn.relu}[activation](hidden_ERF)
    return _linear(hidden_ERF, weights.w_down_EFD, weights.b_down_ED)


def _linear(x: Array, kernel: Array, bias: Array | None) -> Array:
    y = jnp.matmul(x, kernel.astype(x.dtype))
    return y if bias is None else y + bias.astype(x.dtype)[..., None, :]
