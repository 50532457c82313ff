"""The MLP as pure functions, of one or of many experts, and the modules' part: its parameters, and the dense MLP."""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.linen import initializers

from moe_jax.axes import Array
from moe_jax.config import ModelConfig
from moe_jax.model.layers import matrix_init
from moe_jax.sharding.mesh import constrain, with_axes

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

    swiglu: w_down(silu(w_gate x) * w_up x) (arXiv 2002.05202, eq. 6); gelu, in its tanh form, and relu:
    w_down(act(w_up x)).
    The weights are cast to the type of ``x``; every leading axis of the weights is a batch axis.
    """
    return mlp(_linear, weights, x_ERD, activation)[0]


def mlp(
    linear: Callable[[Array, Array, Array | None], Array], weights: ExpertWeights, x: Array, activation: Activation
) -> tuple[Array, tuple[Array, ...]]:
    """The MLP, with ``linear`` multiplying rows by (kernel, bias), and its pre-activations: up, and gate if any."""
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


class DenseMLP(nn.Module):
    """One MLP of the given hidden width, for every token."""

    config: ModelConfig
    width: int

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        D = x_BLD.shape[-1]
        weights = mlp_weights(self, self.config, D, self.width)
        cast = jax.tree.map(lambda leaf: leaf.astype(x_BLD.dtype), weights)
        weights = jax.tree.map(constrain, cast, mlp_axes(weights))
        return expert_mlp(weights, x_BLD.reshape(-1, D), self.config.activation).reshape(x_BLD.shape)


def dense_width(config: ModelConfig) -> int:
    """Hidden width of a dense block's MLP: as set, or the width that a token passes in a MoE layer."""
    return config.mlp_dim or (config.moe.top_k + config.moe.num_shared_experts) * config.moe.expert_dim


def mlp_weights(
    module: nn.Module, config: ModelConfig, D: int, F: int, num_experts: int | None = None
) -> ExpertWeights:
    """Creates the matrices of ``num_experts`` MLPs in ``module``, or of a single dense one without the expert axis."""
    experts = () if num_experts is None else (num_experts,)
    names = () if num_experts is None else ("expert",)

    def kernel(name: str, fan_in: int, fan_out: int, is_block_output: bool = False) -> Array:
        init = matrix_init(config, num_batch_axes=len(experts), is_block_output=is_block_output)
        return parameter(name, init, (fan_in, fan_out))

    def bias(name: str, width: int) -> Array | None:
        return parameter(name, initializers.zeros, (width,)) if config.use_bias else None

    def parameter(name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]) -> Array:
        return module.param(name, with_axes(init, names + _AXES[name]), (*experts, *shape))

    # The order in which parameters are created decides their random initial values: keep it.
    gated = config.activation == "swiglu"
    return ExpertWeights(
        w_up_EDF=kernel("w_up", D, F),
        w_down_EFD=kernel("w_down", F, D, is_block_output=True),
        w_gate_EDF=kernel("w_gate", D, F) if gated else None,
        b_up_EF=bias("b_up", F),
        b_gate_EF=bias("b_gate", F) if gated else None,
        b_down_ED=bias("b_down", D),
    )


_AXES = {
    "w_up": ("embed", "mlp"),
    "w_down": ("mlp", "embed"),
    "w_gate": ("embed", "mlp"),
    "b_up": ("mlp",),
    "b_gate": ("mlp",),
    "b_down": ("channel",),
}
"""The logical axes of an MLP's parameters; those of experts have the expert axis in front."""


def mlp_axes(weights: ExpertWeights, *leading: str) -> ExpertWeights:
    """The logical axes of each leaf of ``weights``, behind the ``leading`` ones."""

    def axes(path: tuple, _: Array) -> tuple[str, ...]:
        return *leading, *_AXES[path[-1].name.rpartition("_")[0]]

    return jax.tree_util.tree_map_with_path(axes, weights)
