"""The MoE layer: creates the parameters and joins router, dispatcher and experts."""

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.linen import initializers

from moe_jax.axes import Array
from moe_jax.config import ModelConfig
from moe_jax.model.layers import matrix_init, on_each_device, with_axes
from moe_jax.model.mlp import DenseMLP, mlp_weights
from moe_jax.model.moe.choice import DispatchChoice, choose_dispatch
from moe_jax.model.moe.dispatch import CAPACITY_DISPATCHERS, by_row_dispatch, sorted_dispatch
from moe_jax.model.moe.experts import Activation, ExpertWeights, expert_mlp
from moe_jax.model.moe.grouped import block_sizes, blocked_mlp, by_row_mlp, ragged_mlp, tokamax_mlp
from moe_jax.model.moe.plan import RouterStatistics, RoutingPlan, expert_capacity
from moe_jax.model.moe.routing import ROUTERS, jittered, noisy_logits


class MoEStatistics(flax.struct.PyTreeNode):
    """What one layer's routing did to each of G groups; every leaf has a leading axis G."""

    router: RouterStatistics
    num_dropped: Array
    """[G] rows over capacity."""


class MoE(nn.Module):
    """Sends each token through a few experts: y = scale · Σ_i weight_i · expert_i(x) + shared(x).

    arXiv 1701.06538, eq. 1; the shared experts, which every token passes, as in DeepSeekMoE (arXiv 2401.06066, eq. 9).
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_GTD: Array,
        *,
        train: bool,
        token_mask_GT: Array | None = None,
        noise_keys_G: Array | None = None,
        expert_bias_E: Array | None = None,
    ) -> tuple[Array, MoEStatistics]:
        """[G, T, D] -> the same shape and type.

        Args:
          noise_keys_G: one random key a group for noisy routing; None: no noise.
          expert_bias_E: the router state of ``sigmoid_bias``, which needs it.
        """
        config, moe = self.config, self.config.moe
        G, T, D = x_GTD.shape
        if token_mask_GT is not None:
            x_GTD = jnp.where(token_mask_GT[..., None], x_GTD, 0)
        logits_GTE = self._score(x_GTD.astype(jnp.float32), noise_keys_G)
        plan = jax.vmap(lambda logits, mask: ROUTERS[moe.router](logits, moe, mask, expert_bias_E))(
            logits_GTE, token_mask_GT
        )
        plan = plan.replace(combine_weight_TK=plan.combine_weight_TK * moe.routed_scaling_factor)

        weights = mlp_weights(self, config, D, moe.expert_dim, num_experts=moe.num_experts)
        choice = choose_dispatch(moe, G * T, train=train)
        capacity = expert_capacity(moe, T, train=train)
        y_GTD, kept_GTK = carry_out(choice, x_GTD, plan, weights, config.activation, capacity)
        if moe.num_shared_experts:
            y_GTD += DenseMLP(config, moe.num_shared_experts * moe.expert_dim, name="shared")(x_GTD)
        num_rows_G = jnp.sum(plan.statistics.load_E, axis=-1)
        return y_GTD, MoEStatistics(plan.statistics, num_rows_G - jnp.sum(kept_GTK, axis=(1, 2)))

    def _score(self, x_GTD: Array, noise_keys_G: Array | None) -> Array:
        """The router's scores [G, T, E] of float32 tokens, with the router's noise where keys are given."""
        moe = self.config.moe
        # Accelerators round float32 factors by default, to 10 bits or fewer: enough to choose another expert.
        score = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        router_DE = self._router_matrix("router", x_GTD.shape[-1])
        if moe.router == "noisy_top_k":
            noise_scale_GTE = score(x_GTD, self._router_matrix("router_noise", x_GTD.shape[-1]))
            if noise_keys_G is not None:
                return jax.vmap(noisy_logits)(score(x_GTD, router_DE), noise_scale_GTE, noise_keys_G)
        if moe.router == "switch" and noise_keys_G is not None:
            x_GTD = jax.vmap(lambda x, key: jittered(x, moe.router_jitter, key))(x_GTD, noise_keys_G)
        return score(x_GTD, router_DE)

    def _router_matrix(self, name: str, D: int) -> Array:
        # Shazeer (arXiv 1701.06538, appendix A) starts both matrices at zero: equal load, constant noise. A small
        # normal keeps the load near balance and breaks the ties that zeros would leave to the order of experts.
        init = initializers.zeros if name == "router_noise" else matrix_init(self.config)
        return self.param(name, with_axes(init, ("embed", "expert")), (D, self.config.moe.num_experts))


def carry_out(
    choice: DispatchChoice,
    x_GTD: Array,
    plan: RoutingPlan,
    weights: ExpertWeights,
    activation: Activation,
    capacity: int,
) -> tuple[Array, Array]:
    """Sends the rows of ``plan`` through the experts, the way that ``choice`` says.

    Returns:
      The outputs [G, T, D], and kept_GTK: False where a row was dropped.
    """
    E = weights.w_up_EDF.shape[0]
    sorted_mlps = {"ragged": ragged_mlp, "tokamax": tokamax_mlp}

    def on_one_device(tokens: tuple[Array, RoutingPlan], weights: ExpertWeights) -> tuple[Array, Array]:
        x_GTD, plan = tokens
        if choice.grouped_matmul is None:
            experts = functools.partial(expert_mlp, weights, activation=activation)
            return CAPACITY_DISPATCHERS[choice.dispatch](x_GTD, plan, E, capacity, experts)
        if choice.grouped_matmul == "by_row":
            return by_row_dispatch(x_GTD, plan, E, functools.partial(by_row_mlp, weights, activation=activation))
        if choice.grouped_matmul == "blocked":
            sizes = block_sizes(x_GTD.shape[0] * plan.max_rows, E)
            # A custom_vjp function takes its static arguments by place.
            return sorted_dispatch(
                x_GTD, plan, E, sizes[-1], lambda x_SD, size_E: blocked_mlp(weights, x_SD, size_E, activation, sizes)
            )
        mlp = sorted_mlps[choice.grouped_matmul]
        return sorted_dispatch(x_GTD, plan, E, 1, functools.partial(mlp, weights, activation=activation))

    if choice.dispatch == "einsum":  # products, which the compiler divides over devices by itself
        return on_one_device((x_GTD, plan), weights)
    # Each device moves the rows of its own groups: indices that ran across devices would bring all tokens to each.
    return on_each_device(on_one_device, (x_GTD, plan), weights)
