"""The MoE layer: creates the parameters and joins router, dispatcher and experts."""

import functools
import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.linen import initializers

from moe_jax.axes import Array
from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.model.layers import matrix_init, with_axes
from moe_jax.model.moe.dispatch import DISPATCHERS
from moe_jax.model.moe.experts import ExpertWeights, expert_mlp
from moe_jax.model.moe.plan import RouterStatistics
from moe_jax.model.moe.routing import noisy_logits, top_k_plan


class MoEStatistics(flax.struct.PyTreeNode):
    """What one layer's routing did to each of G groups; every leaf has a leading axis G."""

    router: RouterStatistics
    num_dropped: Array
    """[G] rows over capacity."""


def expert_capacity(moe: MoEConfig, num_tokens: int, *, train: bool) -> int:
    """Rows that one expert accepts from a group of ``num_tokens``: ceil(T·K/E · capacity_factor).

    All T without a capacity factor, and always outside training: then nothing is dropped, and a token's output does
    not depend on its neighbours' choices, at E/K times the multiplications.
    """
    if not train or moe.capacity_factor is None:
        return num_tokens
    # Rounded first: 10 rows at a factor of 1.1 are 11, not ceil(11.000000000000002).
    rows = round(num_tokens * moe.top_k / moe.num_experts * moe.capacity_factor, 6)
    return min(num_tokens, max(1, math.ceil(rows)))


class MoE(nn.Module):
    """Sends each token through its ``top_k`` experts (arXiv 1701.06538, eq. 1): y = Σ_i weight_i · expert_i(x)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_GTD: Array, *, train: bool, token_mask_GT: Array | None = None, noise_keys_G: Array | None = None
    ) -> tuple[Array, MoEStatistics]:
        """[G, T, D] -> the same shape and type. ``noise_keys_G``: one random key a group, for noisy routing."""
        moe = self.config.moe
        E, D = moe.num_experts, x_GTD.shape[-1]
        if token_mask_GT is not None:
            x_GTD = jnp.where(token_mask_GT[..., None], x_GTD, 0)
        x32_GTD = x_GTD.astype(jnp.float32)
        # Accelerators round float32 factors by default, to 10 bits or fewer: enough to choose another expert.
        score = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        logits_GTE = score(x32_GTD, self._router_matrix("router", D, E))
        if moe.router == "noisy_top_k":
            noise_scale_GTE = score(x32_GTD, self._router_matrix("router_noise", D, E))
            if noise_keys_G is not None:
                logits_GTE = jax.vmap(noisy_logits)(logits_GTE, noise_scale_GTE, noise_keys_G)
        plan = jax.vmap(lambda logits, mask: top_k_plan(logits, moe.top_k, mask))(logits_GTE, token_mask_GT)

        weights = mlp_weights(self, self.config, D, moe.expert_dim, num_experts=E)
        capacity = expert_capacity(moe, x_GTD.shape[1], train=train)
        y_GTD, kept_GTK = DISPATCHERS[moe.dispatch](
            x_GTD, plan, E, capacity, lambda x_ERD: expert_mlp(weights, x_ERD, self.config.activation)
        )
        num_rows_G = jnp.sum(plan.statistics.load_E, axis=-1)
        num_dropped_G = num_rows_G - jnp.sum(kept_GTK, axis=(1, 2))
        return y_GTD, MoEStatistics(router=plan.statistics, num_dropped=num_dropped_G)

    def _router_matrix(self, name: str, D: int, E: int) -> Array:
        # Shazeer (arXiv 1701.06538, appendix A) starts both matrices at zero: equal load, constant noise. A small
        # normal keeps the load near balance and breaks the ties that zeros would leave to the order of experts.
        init = initializers.zeros if name == "router_noise" else initializers.normal(self.config.init_std)
        return self.param(name, with_axes(init, ("embed", "expert")), (D, E))


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
