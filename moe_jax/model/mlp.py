"""The MLP: its parameters, of one or of many experts, and the dense one that every token passes."""

import flax.linen as nn
from flax.linen import initializers

from moe_jax.axes import Array
from moe_jax.config import ModelConfig
from moe_jax.model.layers import matrix_init, with_axes
from moe_jax.model.moe.experts import ExpertWeights, expert_mlp


class DenseMLP(nn.Module):
    """One MLP of the given hidden width, for every token."""

    config: ModelConfig
    width: int

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        D = x_BLD.shape[-1]
        weights = mlp_weights(self, self.config, D, self.width)
        return expert_mlp(weights, x_BLD.reshape(-1, D), self.config.activation).reshape(x_BLD.shape)


def mlp_weights(
    module: nn.Module, config: ModelConfig, D: int, F: int, num_experts: int | None = None
) -> ExpertWeights:
    """Creates the matrices of ``num_experts`` MLPs in ``module``, or of a single dense one without the expert axis."""
    experts = () if num_experts is None else (num_experts,)
    names = () if num_experts is None else ("expert",)

    def kernel(name: str, fan_in: int, fan_out: int, axes: tuple[str, str], is_block_output: bool = False) -> Array:
        init = matrix_init(config, num_batch_axes=len(experts), is_block_output=is_block_output)
        return module.param(name, with_axes(init, names + axes), (*experts, fan_in, fan_out))

    def bias(name: str, width: int, axis: str) -> Array | None:
        if not config.use_bias:
            return None
        init = with_axes(initializers.zeros, (*names, axis))
        return module.param(name, init, (*experts, width))

    gated = config.activation == "swiglu"
    return ExpertWeights(
        w_up_EDF=kernel("w_up", D, F, ("embed", "mlp")),
        w_down_EFD=kernel("w_down", F, D, ("mlp", "embed"), is_block_output=True),
        w_gate_EDF=kernel("w_gate", D, F, ("embed", "mlp")) if gated else None,
        b_up_EF=bias("b_up", F, "mlp"),
        b_gate_EF=bias("b_gate", F, "mlp") if gated else None,
        b_down_ED=bias("b_down", D, "embed"),
    )
