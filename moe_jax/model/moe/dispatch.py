"""Dispatchers: carry the rows of all groups to their experts and bring the weighted results back.

``einsum`` and ``gather`` give every expert the same number of slots, its capacity: they make the same decisions
(``plan.place``), and experts see [E, G·C, D], one batched matrix product. ``einsum`` multiplies by one-hot masks,
T·E·C·D multiplications a group: the clearest, and what TPUs and GSPMD partition best. ``gather`` moves rows by index.

``sorted`` drops nothing: rows of all groups lie one expert after the other, and experts take as many as there are.
``by_row`` leaves a handful of rows where they are, and each brings its expert's weights to itself.

Results are summed over a token's rows in float32 and cast once.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.axes import Array
from moe_jax.model.moe.plan import RoutingPlan, chosen_experts, merge_groups, place

Experts = Callable[[Array], Array]
"""[E, R, D] -> [E, R, D]: every expert on its own rows."""
SortedExperts = Callable[[Array, Array], Array]
"""([S, D], [E] int32) -> [S, D]: the first size_E[0] rows are expert 0's, the next size_E[1] expert 1's, ..."""
RowExperts = Callable[[Array, Array], Array]
"""([R, D], [R] int32) -> [R, D]: each row through the expert named beside it."""


def einsum_dispatch(
    x_GTD: Array, plan: RoutingPlan, num_experts: int, capacity: int, experts: Experts
) -> tuple[Array, Array]:
    """Moves rows by one-hot products (GShard, arXiv 2006.16668, algorithm 2; priority here is token-major).

    Args:
      x_GTD: the tokens of G groups.
      plan: their plans, each leaf with a leading axis G.
      capacity: rows that one expert accepts from one group (C).
      experts: applied to [E, G·C, D].

    Returns:
      The combined outputs [G, T, D] in the type of ``x``, and kept_GTK: False where a row was dropped.
    """
    G, _, D = x_GTD.shape
    placement = jax.vmap(lambda expert_TK: place(expert_TK, num_experts, capacity))(plan.expert_TK)
    expert_GTKE = jax.nn.one_hot(plan.expert_TK, num_experts, dtype=jnp.float32)  # all zero where there is no row
    slot_GTKC = jax.nn.one_hot(jnp.where(placement.kept_TK, placement.position_TK, capacity), capacity)
    # Full precision: a row must reach its expert as it is, and accelerators would round float32 factors.
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    combine_GTEC = einsum("GTKE,GTKC,GTK->GTEC", expert_GTKE, slot_GTKC, plan.combine_weight_TK)
    dispatch_GTEC = einsum("GTKE,GTKC->GTEC", expert_GTKE, slot_GTKC).astype(x_GTD.dtype)
    x_EGCD = einsum("GTEC,GTD->EGCD", dispatch_GTEC, x_GTD)
    y_EGCD = experts(x_EGCD.reshape(num_experts, G * capacity, D)).reshape(x_EGCD.shape)
    y_GTD = einsum("GTEC,EGCD->GTD", combine_GTEC, y_EGCD.astype(jnp.float32))
    return y_GTD.astype(x_GTD.dtype), placement.kept_TK


def gather_dispatch(
    x_GTD: Array, plan: RoutingPlan, num_experts: int, capacity: int, experts: Experts
) -> tuple[Array, Array]:
    """Moves rows by index; arguments and results as in ``einsum_dispatch``."""
    G, T, D = x_GTD.shape
    placement = jax.vmap(lambda expert_TK: place(expert_TK, num_experts, capacity))(plan.expert_TK)
    # Slots of one expert lie together, group after group.
    first_slot_GTK = (plan.expert_TK * G + jnp.arange(G)[:, None, None]) * capacity
    merged, slot_GTK = merge_groups(plan), first_slot_GTK + placement.position_TK
    slot_TK, row_S = _index_tables(_merged(slot_GTK), _merged(placement.kept_TK), num_experts * G * capacity)
    x_ERD = _to_slots(x_GTD.reshape(G * T, D), slot_TK, row_S).reshape(num_experts, G * capacity, D)
    y_TD = _from_slots(experts(x_ERD).reshape(-1, D), merged.combine_weight_TK, slot_TK, row_S)
    return y_TD.reshape(G, T, D), placement.kept_TK


def sorted_dispatch(
    x_GTD: Array, plan: RoutingPlan, num_experts: int, multiple: int, experts: SortedExperts
) -> tuple[Array, Array]:
    """Sorts the rows of all groups by expert, in priority order within each, and drops none.

    The sort is a counting sort: ``place`` has counted each row's rank among its expert's, and experts follow each
    other. Groups are merged first, which changes nothing, as no capacity is given out.

    Args:
      x_GTD, plan: as in ``einsum_dispatch``.
      multiple: what the number of each expert's slots is rounded up to; the slots past its rows hold zeros.
      experts: applied to [S, D], S = ``num_slots``, and the slots of each expert.

    Returns:
      As ``einsum_dispatch``; a row is kept wherever there is one.
    """
    G, T, D = x_GTD.shape
    merged = merge_groups(plan)
    placement = place(merged.expert_TK, num_experts, G * T)
    load_E = jnp.sum(chosen_experts(merged.expert_TK, num_experts).astype(jnp.int32), axis=0)
    size_E = (load_E + multiple - 1) // multiple * multiple
    first_E = jnp.cumsum(size_E) - size_E
    slot_TK = jnp.take(first_E, merged.expert_TK, mode="clip") + placement.position_TK
    S = num_slots(merged.max_rows, num_experts, multiple)
    slot_TK, row_S = _index_tables(slot_TK, placement.kept_TK, S)
    y_SD = experts(_to_slots(x_GTD.reshape(G * T, D), slot_TK, row_S), size_E)
    y_TD = _from_slots(y_SD, merged.combine_weight_TK, slot_TK, row_S)
    return y_TD.reshape(G, T, D), placement.kept_TK.reshape(plan.expert_TK.shape)


def num_slots(num_rows: int, num_experts: int, multiple: int) -> int:
    """Slots that ``num_rows`` sorted rows can need when each expert's are rounded up to ``multiple``."""
    # An expert with a row wastes at most multiple - 1 slots, and one without wastes none.
    most = num_rows + min(num_rows, num_experts) * (multiple - 1)
    return most // multiple * multiple


def by_row_dispatch(x_GTD: Array, plan: RoutingPlan, num_experts: int, experts: RowExperts) -> tuple[Array, Array]:
    """Moves no rows: ``experts`` takes them in token order, [G·T·K, D], with each one's expert. Drops none."""
    G, T, D = x_GTD.shape
    K = plan.expert_TK.shape[-1]
    is_row_GTK = plan.expert_TK < num_experts
    x_RD = jnp.broadcast_to(x_GTD[:, :, None], (G, T, K, D)).reshape(-1, D)
    # Where there is no row some expert computes one all the same; its weight is zero.
    y_RD = experts(x_RD, jnp.where(is_row_GTK, plan.expert_TK, 0).reshape(-1))
    y_GTKD = y_RD.reshape(G, T, K, D).astype(jnp.float32)
    y_GTD = jnp.sum(y_GTKD * plan.combine_weight_TK[..., None], axis=2)
    return y_GTD.astype(x_GTD.dtype), is_row_GTK


CAPACITY_DISPATCHERS = {"einsum": einsum_dispatch, "gather": gather_dispatch}


def _index_tables(slot_TK: Array, kept_TK: Array, num_slots: int) -> tuple[Array, Array]:
    """Each row's slot [T, K] and each slot's row [S], where row = token * K + choice.

    A dropped row has slot S and an empty slot has row T*K: one past the end, where a zero is read.
    """
    slot_TK = jnp.where(kept_TK, slot_TK, num_slots)
    rows = jnp.arange(slot_TK.size)
    row_S = jnp.full(num_slots, slot_TK.size, jnp.int32).at[slot_TK.reshape(-1)].set(rows, mode="drop")
    return slot_TK, row_S


def _take(rows: Array, index: Array) -> Array:
    """rows[index], and zeros where the index is one past the end."""
    return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


def _merged(leaf_GTK: Array) -> Array:
    """[G, T, K] -> [G·T, K]."""
    return leaf_GTK.reshape(-1, leaf_GTK.shape[-1])


# Moving rows to slots and back. Each backward pass reads through the other index table, so all four passes are gathers
# and none is a scatter-add, which is slow, and on a GPU adds in another order every time.


@jax.custom_vjp
def _to_slots(x_TD: Array, slot_TK: Array, row_S: Array) -> Array:
    """[T, D] -> [S, D]: each slot gets its row's token; an empty one zeros."""
    return _take(x_TD, row_S // slot_TK.shape[-1])


def _to_slots_forward(x_TD: Array, slot_TK: Array, row_S: Array) -> tuple[Array, Array]:
    return _to_slots(x_TD, slot_TK, row_S), slot_TK


def _to_slots_backward(slot_TK: Array, dx_SD: Array) -> tuple[Array, None, None]:
    dx_TKD = _take(dx_SD, slot_TK)
    return jnp.sum(dx_TKD, axis=1, dtype=jnp.float32).astype(dx_SD.dtype), None, None


_to_slots.defvjp(_to_slots_forward, _to_slots_backward)


@jax.custom_vjp
def _from_slots(y_SD: Array, weight_TK: Array, slot_TK: Array, row_S: Array) -> Array:
    """y_t = Σ_k weight_tk · y[slot_tk], [T, D] in the type of ``y``."""
    y_TKD = _take(y_SD, slot_TK).astype(jnp.float32)
    return jnp.sum(y_TKD * weight_TK[..., None], axis=1).astype(y_SD.dtype)


def _from_slots_forward(
    y_SD: Array, weight_TK: Array, slot_TK: Array, row_S: Array
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    return _from_slots(y_SD, weight_TK, slot_TK, row_S), (y_SD, weight_TK, slot_TK, row_S)


def _from_slots_backward(
    residuals: tuple[Array, Array, Array, Array], dy_TD: Array
) -> tuple[Array, Array, None, None]:
    y_SD, weight_TK, slot_TK, row_S = residuals
    weight_S = _take(weight_TK.reshape(-1), row_S)
    dy_SD = _take(dy_TD, row_S // slot_TK.shape[-1]).astype(jnp.float32) * weight_S[..., None]
    y_TKD = _take(y_SD, slot_TK).astype(jnp.float32)
    dweight_TK = jnp.sum(y_TKD * dy_TD.astype(jnp.float32)[:, None, :], axis=-1)
    return dy_SD.astype(y_SD.dtype), dweight_TK, None, None


_from_slots.defvjp(_from_slots_forward, _from_slots_backward)
