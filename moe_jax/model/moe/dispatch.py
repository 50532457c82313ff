"""Rows to slots and back: ``einsum`` and ``gather``, whose experts have a fixed number of slots, and sorted rows.

``einsum`` and ``gather`` give every expert the same number of slots, its capacity: they make the same decisions
(``plan.place``), and experts see [E, G·C, D], one batched matrix product. ``einsum`` multiplies by one-hot masks,
T·E·C·D multiplications a group: the clearest, and what TPUs and GSPMD partition best. ``gather`` moves rows by index.

``through_sorted_rows`` drops nothing: rows of all groups lie one expert after the other, and experts take as many as
there are. The kernels compute them.

Results are summed over a token's rows in float32 and cast once.
"""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from moe_jax.axes import Array
from moe_jax.model.mlp import Activation, ExpertWeights, expert_mlp
from moe_jax.model.moe.plan import Placement, RoutingPlan, chosen_experts, place
from moe_jax.sharding.experts import expert_parts, from_experts, to_experts

PRODUCTS = "expert_products"
"""The name, for rematerialisation policies, of what the kernels of sorted rows keep for the backward pass."""


def einsum(
    x_GTD: Array, plan: RoutingPlan, weights: ExpertWeights, activation: Activation, capacity: int
) -> tuple[Array, Array]:
    """Moves rows by one-hot products (GShard, arXiv 2006.16668, algorithm 2; priority here is token-major).

    Args:
      x_GTD: the tokens of G groups.
      plan: their plans, each leaf with a leading axis G.
      capacity: slots that one expert has for a group (C): the rows it accepts, unless its plan says fewer.

    Returns:
      The combined outputs [G, T, D] in the type of ``x``, and kept_GTK: False where a row was dropped.
    """
    G, _, D = x_GTD.shape
    E = weights.w_up_EDF.shape[0] * expert_parts()
    placement = _place_in_groups(plan, E, capacity)
    expert_GTKE = jax.nn.one_hot(plan.expert_TK, E, dtype=jnp.float32)  # all zero where there is no row
    slot_GTKC = jax.nn.one_hot(jnp.where(placement.kept_TK, placement.position_TK, capacity), capacity)
    # Full precision: a row must reach its expert as it is, and accelerators would round float32 factors.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    combine_GTEC = product("GTKE,GTKC,GTK->GTEC", expert_GTKE, slot_GTKC, plan.combine_weight_TK)
    dispatch_GTEC = product("GTKE,GTKC->GTEC", expert_GTKE, slot_GTKC).astype(x_GTD.dtype)
    x_EGCD = product("GTEC,GTD->EGCD", dispatch_GTEC, x_GTD)
    # An expert's slots of all groups lie together, so that each expert is one matrix product, on its own device.
    y_ERD = expert_mlp(weights, to_experts(x_EGCD.reshape(E, G * capacity, D)), activation)
    y_EGCD = from_experts(y_ERD).reshape(x_EGCD.shape)
    y_GTD = product("GTEC,EGCD->GTD", combine_GTEC, y_EGCD.astype(jnp.float32))
    return y_GTD.astype(x_GTD.dtype), placement.kept_TK


def _place_in_groups(plan: RoutingPlan, num_experts: int, capacity: int) -> Placement:
    return jax.vmap(lambda p: place(p.expert_TK, num_experts, capacity if p.accepted is None else p.accepted))(plan)


def gather(
    x_GTD: Array, plan: RoutingPlan, weights: ExpertWeights, activation: Activation, capacity: int
) -> tuple[Array, Array]:
    """Moves rows by index; arguments and results as in ``einsum``."""
    G, T, D = x_GTD.shape
    E = weights.w_up_EDF.shape[0] * expert_parts()
    placement = _place_in_groups(plan, E, capacity)
    # Slot c of group g's share of expert e is (e · G + g) · C + c: one expert's lie together, group after group.
    first_slot_GTK = (plan.expert_TK * G + jnp.arange(G)[:, None, None]) * capacity
    weight_TK, slot_TK = _merged(plan.combine_weight_TK), _merged(first_slot_GTK + placement.position_TK)
    slot_TK, row_S = _index_tables(slot_TK, _merged(placement.kept_TK), E * G * capacity)
    x_ERD = to_slots(x_GTD.reshape(G * T, D), slot_TK, row_S).reshape(E, G * capacity, D)
    y_SD = from_experts(expert_mlp(weights, to_experts(x_ERD), activation)).reshape(-1, D)
    y_TD = from_slots(y_SD, weight_TK, slot_TK, row_S)
    return y_TD.reshape(G, T, D), placement.kept_TK


def through_sorted_rows(
    x_GTD: Array, plan: RoutingPlan, num_experts: int, multiple: int, experts: Callable[[Array, Array], Array]
) -> tuple[Array, Array]:
    """Sorts the rows of all groups by expert, in priority order within each, and drops none.

    The sort is a counting sort: ``place`` has counted each row's rank among its expert's, and experts follow each
    other. Groups are merged first, which changes nothing, as no capacity is given out.

    Args:
      x_GTD, plan: as in ``einsum``.
      multiple: what the number of each expert's slots is rounded up to; the slots past its rows hold zeros.
      experts: ([S, D], [E] int32) -> [S, D] for S = ``num_slots``: the first size_E[0] slots are expert 0's, the next
        size_E[1] expert 1's, and so on.

    Returns:
      As ``einsum``; a row is kept wherever there is one.
    """
    G, T, D = x_GTD.shape
    rows = sort_rows(plan, num_experts, multiple)
    y_SD = experts(to_slots(x_GTD.reshape(G * T, D), rows.slot_TK, rows.row_S), rows.size_E)
    y_TD = from_slots(y_SD, _merged(plan.combine_weight_TK), rows.slot_TK, rows.row_S)
    return y_TD.reshape(G, T, D), rows.kept_TK.reshape(plan.expert_TK.shape)


class SortedRows(flax.struct.PyTreeNode):
    """Where the rows of all groups lie once they are sorted by expert, in S = ``num_slots`` slots."""

    slot_TK: Array
    """Each row's slot; S where there is no row."""
    row_S: Array
    """Each slot's row, token * K + choice; T*K in an empty slot."""
    size_E: Array
    """Slots of each expert; they follow each other from slot 0 on."""
    kept_TK: Array
    """Where there is a row."""


def sort_rows(plan: RoutingPlan, num_experts: int, multiple: int) -> SortedRows:
    """The places of the plan's rows, all groups together; arguments as in ``through_sorted_rows``."""
    G, T, _ = plan.expert_TK.shape
    expert_TK = _merged(plan.expert_TK)
    placement = place(expert_TK, num_experts, G * T)
    load_E = jnp.sum(chosen_experts(expert_TK, num_experts).astype(jnp.int32), axis=0)
    size_E = (load_E + multiple - 1) // multiple * multiple
    first_E = jnp.cumsum(size_E) - size_E
    slot_TK = jnp.take(first_E, expert_TK, mode="clip") + placement.position_TK
    S = num_slots(G * plan.max_rows, num_experts, multiple)
    slot_TK, row_S = _index_tables(slot_TK, placement.kept_TK, S)
    return SortedRows(slot_TK, row_S, size_E, placement.kept_TK)


def num_slots(num_rows: int, num_experts: int, multiple: int) -> int:
    """Slots that ``num_rows`` sorted rows can need when each expert's are rounded up to ``multiple``.

    >>> num_slots(10, num_experts=3, multiple=4)  # at the worst 1 + 1 + 8 or 1 + 4 + 5: 4 + 4 + 8
    16
    """
    # An expert with a row wastes at most multiple - 1 slots, and one without wastes none.
    most = num_rows + min(num_rows, num_experts) * (multiple - 1)
    return most // multiple * multiple


def _index_tables(slot_TK: Array, kept_TK: Array, num_slots: int) -> tuple[Array, Array]:
    """Each row's slot [T, K] and each slot's row [S], where row = token * K + choice.

    A dropped row has slot S and an empty slot has row T*K: one past the end, where a zero is read.
    """
    slot_TK = jnp.where(kept_TK, slot_TK, num_slots)
    rows = jnp.arange(slot_TK.size)
    row_S = jnp.full(num_slots, slot_TK.size, jnp.int32).at[slot_TK.reshape(-1)].set(rows, mode="drop")
    return slot_TK, row_S


def take_rows(rows: Array, index: Array) -> Array:
    """rows[index], and zeros where the index is one past the end."""
    return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


def _merged(leaf_GTK: Array) -> Array:
    """[G, T, K] -> [G·T, K]: the groups' tokens after each other, as one group."""
    return leaf_GTK.reshape(-1, leaf_GTK.shape[-1])


# Moving rows to slots and back. Each backward pass reads through the other index table, so all four passes are gathers
# and none is a scatter-add, which is slow, and on a GPU adds in another order every time.


@jax.custom_vjp
def to_slots(x_TD: Array, slot_TK: Array, row_S: Array) -> Array:
    """[T, D] -> [S, D]: each slot gets its row's token; an empty one zeros."""
    return take_rows(x_TD, row_S // slot_TK.shape[-1])


def _to_slots_forward(x_TD: Array, slot_TK: Array, row_S: Array) -> tuple[Array, Array]:
    return to_slots(x_TD, slot_TK, row_S), slot_TK


def _to_slots_backward(slot_TK: Array, dx_SD: Array) -> tuple[Array, None, None]:
    return sum_of_rows(dx_SD, slot_TK), None, None


def sum_of_rows(dx_SD: Array, slot_TK: Array) -> Array:
    """[T, D]: the sum over each token's rows, in the type of ``dx``."""
    return jnp.sum(take_rows(dx_SD, slot_TK), axis=1, dtype=jnp.float32).astype(dx_SD.dtype)


to_slots.defvjp(_to_slots_forward, _to_slots_backward)


@jax.custom_vjp
def from_slots(y_SD: Array, weight_TK: Array, slot_TK: Array, row_S: Array) -> Array:
    """y_t = Σ_k weight_tk · y[slot_tk], [T, D] in the type of ``y``."""
    y_TKD = take_rows(y_SD, slot_TK).astype(jnp.float32)
    return jnp.sum(y_TKD * weight_TK[..., None], axis=1).astype(y_SD.dtype)


def _from_slots_forward(
    y_SD: Array, weight_TK: Array, slot_TK: Array, row_S: Array
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    return from_slots(y_SD, weight_TK, slot_TK, row_S), (y_SD, weight_TK, slot_TK, row_S)


def _from_slots_backward(
    residuals: tuple[Array, Array, Array, Array], dy_TD: Array
) -> tuple[Array, Array, None, None]:
    y_SD, weight_TK, slot_TK, row_S = residuals
    weight_S = take_rows(weight_TK.reshape(-1), row_S)
    dy_SD = take_rows(dy_TD, row_S // slot_TK.shape[-1]).astype(jnp.float32) * weight_S[..., None]
    y_TKD = take_rows(y_SD, slot_TK).astype(jnp.float32)
    dweight_TK = jnp.sum(y_TKD * dy_TD.astype(jnp.float32)[:, None, :], axis=-1)
    return dy_SD.astype(y_SD.dtype), dweight_TK, None, None


from_slots.defvjp(_from_slots_forward, _from_slots_backward)
