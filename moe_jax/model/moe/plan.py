"""A routing plan: which rows a group of tokens sends to which experts, as a value."""

import flax.struct
import jax.numpy as jnp

from moe_jax.axes import Array
from moe_jax.model.moe.statistics import RouterStatistics


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
    accepted: Array | None = None
    """[] int32: rows that an expert accepts where masked tokens make them fewer than its slots; None: one a slot."""

    def of_experts(self, first: Array, count: int) -> "RoutingPlan":
        """The rows of the ``count`` experts from ``first`` on alone, which are then 0 to ``count`` - 1."""
        T, K = self.expert_TK.shape[-2:]
        is_row_TK = (self.expert_TK >= first) & (self.expert_TK < first + count)
        return self.replace(
            expert_TK=jnp.where(is_row_TK, self.expert_TK - first, count),
            combine_weight_TK=jnp.where(is_row_TK, self.combine_weight_TK, 0),
            max_rows=min(self.max_rows, T * min(K, count)),
        )


class Placement(flax.struct.PyTreeNode):
    """Where a plan's rows go when each expert accepts C of them."""

    position_TK: Array
    """[T, K] int32: the row's slot in its expert."""
    kept_TK: Array
    """[T, K] bool: False for a dropped row, and where there is no row."""


def chosen_experts(expert_TK: Array, num_experts: int) -> Array:
    """[T, E] bool: which experts each token has a row for."""
    return jnp.any(expert_TK[:, :, None] == jnp.arange(num_experts)[None, None, :], axis=1)


def place(expert_TK: Array, num_experts: int, capacity: int | Array) -> Placement:
    """Gives each row the next slot of its expert, in priority order, and drops those past ``capacity``.

    >>> placement = place(jnp.array([[2, 0], [2, 1], [0, 2]]), num_experts=3, capacity=2)
    >>> placement.position_TK.tolist()  # the third token is the second to name expert 0, and the third to name 2
    [[0, 0], [1, 0], [1, 2]]
    >>> placement.kept_TK.tolist()
    [[True, True], [True, True], [True, False]]
    """
    chosen_TE = chosen_experts(expert_TK, num_experts).astype(jnp.int32)
    # A token names an expert once, so a row's slot is the number of earlier tokens that named the same expert.
    earlier_TE = jnp.cumsum(chosen_TE, axis=0) - chosen_TE
    is_row_TK = expert_TK < num_experts
    position_TK = jnp.take_along_axis(earlier_TE, jnp.where(is_row_TK, expert_TK, 0), axis=1)
    return Placement(position_TK=position_TK, kept_TK=is_row_TK & (position_TK < capacity))
