"""The MoE layer: creates the parameters and joins router, backend and experts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers

from moe_jax.axes import Array
from moe_jax.config import ModelConfig
from moe_jax.model.layers import matrix_init
from moe_jax.model.mlp import Activation, DenseMLP, ExpertWeights, mlp_axes, mlp_weights
from moe_jax.model.moe.backends import BACKENDS, Backend
from moe_jax.model.moe.plan import RoutingPlan
from moe_jax.model.moe.routing import ROUTERS, accepted_rows, expert_capacity, limits_capacity
from moe_jax.model.moe.statistics import MoEStatistics
from moe_jax.sharding.experts import expert_parts, of_own_experts, on_devices_of_experts
from moe_jax.sharding.mesh import on_each_device, with_axes


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
          train: capacity binds; otherwise nothing is dropped.
          token_mask_GT: True for real tokens; None: all are.
          noise_keys_G: one random key a group for noisy routing; None: no noise.
          expert_bias_E: the router state, where the router has one.
        """
        config, moe, router = self.config, self.config.moe, ROUTERS[self.config.moe.router]
        if token_mask_GT is not None:
            x_GTD = jnp.where(token_mask_GT[..., None], x_GTD, 0)
        router_DE = self._router_matrix("router", matrix_init(config), x_GTD)
        # Shazeer (arXiv 1701.06538, appendix A) starts both matrices at zero: equal load, constant noise. A small
        # normal keeps the load near balance and breaks the ties that zeros would leave to the order of experts.
        noise_DE = self._router_matrix("router_noise", initializers.zeros, x_GTD) if router.has_noise_matrix else None

        def route(groups: tuple[Array, Array | None, Array | None], shared: tuple) -> RoutingPlan:
            (x_GTD, mask_GT, noise_keys_G), (router_DE, noise_DE, bias_E) = groups, shared
            logits_GTE = router.score(x_GTD.astype(jnp.float32), router_DE, noise_DE, noise_keys_G, moe)
            return jax.vmap(lambda logits_TE, mask_T: router.plan(logits_TE, mask_T, bias_E, moe))(logits_GTE, mask_GT)

        # On each device for its own groups: to choose the highest, the compiler would bring the scores of all to each.
        plan = on_each_device(route, (x_GTD, token_mask_GT, noise_keys_G), (router_DE, noise_DE, expert_bias_E))
        if token_mask_GT is not None and limits_capacity(moe, train=train):
            plan = plan.replace(accepted=jax.vmap(lambda mask_T: accepted_rows(moe, mask_T))(token_mask_GT))
        plan = plan.replace(combine_weight_TK=plan.combine_weight_TK * moe.routed_scaling_factor)

        weights = mlp_weights(self, config, x_GTD.shape[-1], moe.expert_dim, num_experts=moe.num_experts)
        y_GTD, kept_GTK = self._compute(x_GTD, plan, weights, expert_capacity(moe, x_GTD.shape[1], train=train))
        if moe.num_shared_experts:
            y_GTD += DenseMLP(config, moe.num_shared_experts * moe.expert_dim, name="shared")(x_GTD)
        num_rows_G = jnp.sum(plan.statistics.load_E, axis=-1)
        return y_GTD, MoEStatistics(plan.statistics, num_rows_G - jnp.sum(kept_GTK, axis=(1, 2)))

    def _router_matrix(self, name: str, init: nn.initializers.Initializer, x_GTD: Array) -> Array:
        return self.param(name, with_axes(init, ("embed", "router")), (x_GTD.shape[-1], self.config.moe.num_experts))

    def _compute(self, x_GTD: Array, plan: RoutingPlan, weights: ExpertWeights, capacity: int) -> tuple[Array, Array]:
        """The rows of ``plan`` through their experts by the configured backend: outputs and kept_GTK."""
        if self.config.moe.dispatch == "auto":
            raise ValueError("a decoder needs the name of a backend, got model.moe.dispatch=auto; see for_machine")
        backend, activation = BACKENDS[self.config.moe.dispatch], self.config.activation

        def run(tokens: tuple[Array, RoutingPlan], weights: ExpertWeights) -> tuple[Array, Array]:
            if backend.has_slots or expert_parts() == 1:
                return backend.run(*tokens, weights, activation, capacity)
            return _on_own_experts(backend, *tokens, weights, activation)

        return on_devices_of_experts(run, (x_GTD, plan), weights, mlp_axes(weights, "expert"))


def _on_own_experts(
    backend: Backend, x_GTD: Array, plan: RoutingPlan, weights: ExpertWeights, activation: Activation
) -> tuple[Array, Array]:
    """A backend that drops nothing where experts are divided over devices; groups are merged, as none has capacity."""
    G, T, D = x_GTD.shape
    count, most = weights.w_up_EDF.shape[0], G * plan.max_rows * expert_parts()

    def compute(rows: tuple[Array, Array, Array], part: Array) -> Array:
        x_1TD, expert_1TK, weight_1TK = (leaf[None] for leaf in rows)
        merged = plan.replace(expert_TK=expert_1TK, combine_weight_TK=weight_1TK, max_rows=most)
        return backend.run(x_1TD, merged.of_experts(part * count, count), weights, activation, T)[0][0]

    leaves = (x_GTD, plan.expert_TK, plan.combine_weight_TK)
    y_TD = of_own_experts(compute, tuple(leaf.reshape(G * T, -1) for leaf in leaves))
    return y_TD.reshape(G, T, D).astype(x_GTD.dtype), plan.expert_TK < count * expert_parts()
