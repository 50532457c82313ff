"""A routing plan: which rows a group of tokens sends to which experts, as a value."""

import flax.struct
import jax.numpy as jnp

from moe_jax.axes import Array


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
    (placing all first choices before all second choices would leak the future when capacity binds).
    """

    expert_TK: Array
    """[T, K] int32: the expert of each row; E, one past the last, in masked tokens, which have no rows."""
    combine_weight_TK: Array
    """[T, K] float32: what multiplies the expert's output."""
    statistics: RouterStatistics


class Placement(flax.struct.PyTreeNode):
    """Where a plan's rows go when each expert accepts C of them."""

    position_TK: Array
    """[T, K] int32: the row's slot in its expert."""
    kept_TK: Array
    """[T, K] bool: False for a dropped row and for the rows of masked tokens."""


def place(plan: RoutingPlan, num_experts: int, capacity: int) -> Placement:
    """Gives each row the next slot of its expert, in priority order, and drops those past ``capacity``."""
    T, K = plan.expert_TK.shape
    chosen_RE = plan.expert_TK.reshape(T * K, 1) == jnp.arange(num_experts)[None, :]
    rank_RE = jnp.cumsum(chosen_RE.astype(jnp.int32), axis=0) - 1
    position_TK = jnp.sum(jnp.where(chosen_RE, rank_RE, 0), axis=1).reshape(T, K)
    kept_TK = (plan.expert_TK < num_experts) & (position_TK < capacity)
    return Placement(position_TK=position_TK, kept_TK=kept_TK)
