"""A routing plan: which rows a group of tokens sends to which experts, as a value."""

import math

import flax.struct
import jax.numpy as jnp

from moe_jax.axes import Array
from moe_jax.config import MoEConfig


class RouterStatistics(flax.struct.PyTreeNode):
    """What one group's router did, as float32 sums over its real tokens, which add up over any split."""

    num_tokens: Array
    """[] real (not masked) tokens."""
    load_E: Array
    """[E] rows sent to each expert, before any is dropped."""
    probs_E: Array
    """[E] summed normalised scores."""
    squared_logsumexp: Array
    """[] summed logsumexp(router_logits)², the router z-loss before its mean."""
    entropy: Array
    """[] summed entropy of the normalised scores, in nats."""


class RoutingPlan(flax.struct.PyTreeNode):
    """The rows of one group in priority order: an expert that is full refuses the later ones.

    Rows are token-major: row r belongs to token r // K, so whether a row is kept depends on earlier tokens only
    (placing all first choices before all second choices would leak the future when capacity binds). A token names
    each expert at most once. Where experts choose tokens, K is E and most entries are no row at all.
    """

    expert_TK: Array
    """[T, K] int32: the expert of each row; E, one past the last, where there is no row, as in masked tokens."""
    combine_weight_TK: Array
    """[T, K] float32: what multiplies the expert's output; 0 where there is no row."""
    statistics: RouterStatistics
    max_rows: int = flax.struct.field(pytree_node=False)
    """Rows of the group, at most: T·K, or fewer where experts choose."""


class Placement(flax.struct.PyTreeNode):
    """Where a plan's rows go when each expert accepts C of them."""

    position_TK: Array
    """[T, K] int32: the row's slot in its expert."""
    kept_TK: Array
    """[T, K] bool: False for a dropped row, and where there is no row."""


def chosen_experts(expert_TK: Array, num_experts: int) -> Array:
    """[T, E] bool: which experts each token has a row for."""
    return jnp.any(expert_TK[:, :, None] == jnp.arange(num_experts)[None, None, :], axis=1)


def place(expert_TK: Array, num_experts: int, capacity: int) -> Placement:
    """Gives each row the next slot of its expert, in priority order, and drops those past ``capacity``."""
    chosen_TE = chosen_experts(expert_TK, num_experts).astype(jnp.int32)
    # A token names an expert once, so a row's slot is the number of earlier tokens that named the same expert.
    earlier_TE = jnp.cumsum(chosen_TE, axis=0) - chosen_TE
    is_row_TK = expert_TK < num_experts
    position_TK = jnp.take_along_axis(earlier_TE, jnp.where(is_row_TK, expert_TK, 0), axis=1)
    return Placement(position_TK=position_TK, kept_TK=is_row_TK & (position_TK < capacity))


def expert_capacity(moe: MoEConfig, num_tokens: int, *, train: bool) -> int:
    """Rows that one expert accepts from a group of ``num_tokens``: ceil(T·K/E · capacity_factor).

    All T without a capacity factor, and outside training: then nothing is dropped, and a token's output does not
    depend on its neighbours' choices. Where experts choose, the capacity is what they choose, in evaluation too.
    """
    if moe.capacity_factor is None or (not train and moe.router != "expert_choice"):
        return num_tokens
    # Rounded first: 10 rows at a factor of 1.1 are 11, not ceil(11.000000000000002).
    rows = round(num_tokens * moe.top_k / moe.num_experts * moe.capacity_factor, 6)
    return min(num_tokens, max(1, math.ceil(rows)))


def merge_groups(plan: RoutingPlan) -> RoutingPlan:
    """One plan of G·T tokens from the plans of G groups (each leaf with a leading axis G); statistics stay apart."""
    G, T, K = plan.expert_TK.shape
    return plan.replace(
        expert_TK=plan.expert_TK.reshape(G * T, K),
        combine_weight_TK=plan.combine_weight_TK.reshape(G * T, K),
        max_rows=G * plan.max_rows,
    )
