"""Dispatchers: carry the rows of all groups to their experts and bring the weighted results back.

Both make the same decisions (``plan.place``) and differ only in how rows move. ``einsum`` multiplies by one-hot masks,
T·E·C·D multiplications a group: the clearest, and what TPUs and GSPMD partition best. ``gather`` moves rows by index.
Experts see [E, G*C, D]: one batched matrix product, however many groups there are.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.axes import Array
from moe_jax.model.moe.plan import Placement, RoutingPlan, place

Experts = Callable[[Array], Array]
"""[E, R, D] -> [E, R, D]: every expert on its own rows."""


def einsum_dispatch(x_GTD: Array, plan: RoutingPlan, num_experts: int, capacity: int, experts: Experts):
    """Moves rows by one-hot products (GShard, arXiv 2006.16668, algorithm 2; priority here is token-major).

    Args:
      x_GTD: the tokens of G groups.
      plan: their plans, each leaf with a leading axis G.
      capacity: rows that one expert accepts from one group (C).
      experts: applied to [E, G*C, D].

    Returns:
      The combined outputs [G, T, D] in the type of ``x``, and kept_GTK: False where a row was dropped.
    """
    G, _, D = x_GTD.shape
    dtype = x_GTD.dtype
    placement = jax.vmap(lambda p: place(p, num_experts, capacity))(plan)
    # A dropped row's one-hot is all zero, and so is a masked token's, whose expert is E.
    expert_GTKE = jax.nn.one_hot(plan.expert_TK, num_experts, dtype=jnp.float32)
    slot_GTKC = jax.nn.one_hot(jnp.where(placement.kept_TK, placement.position_TK, capacity), capacity)
    # Full precision: a row must reach its expert as it is, and accelerators would round float32 factors.
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    combine_GTEC = einsum("GTKE,GTKC,GTK->GTEC", expert_GTKE, slot_GTKC, plan.combine_weight_TK)
    dispatch_GTEC = einsum("GTKE,GTKC->GTEC", expert_GTKE, slot_GTKC).astype(dtype)
    x_EGCD = einsum("GTEC,GTD->EGCD", dispatch_GTEC, x_GTD)
    y_EGCD = experts(x_EGCD.reshape(num_experts, G * capacity, D)).reshape(x_EGCD.shape)
    y_GTD = einsum("GTEC,EGCD->GTD", combine_GTEC, y_EGCD.astype(jnp.float32))
    return y_GTD.astype(dtype), placement.kept_TK


def gather_dispatch(x_GTD: Array, plan: RoutingPlan, num_experts: int, capacity: int, experts: Experts):
    """Moves rows by index; arguments and results as in ``einsum_dispatch``.

    The gather to the experts and the one back are each other's transposes, so both backward passes are gathers too.
    """
    G, _, D = x_GTD.shape
    placement = jax.vmap(lambda p: place(p, num_experts, capacity))(plan)
    slot_GTK, row_GEC = jax.vmap(lambda p, q: _index_tables(p, q, num_experts, capacity))(plan, placement)
    # Groups stay an axis of the gathers, so that a mesh can divide them without moving tokens between devices.
    x_EGCD = jax.vmap(_tokens_to_slots, out_axes=1)(x_GTD, slot_GTK, row_GEC)
    y_EGCD = experts(x_EGCD.reshape(num_experts, G * capacity, D)).reshape(x_EGCD.shape)
    y_GTKD = jax.vmap(_slots_to_rows, in_axes=(1, 0, 0))(y_EGCD, slot_GTK, row_GEC)
    weight_GTK = plan.combine_weight_TK * placement.kept_TK
    y_GTD = jnp.sum(y_GTKD.astype(jnp.float32) * weight_GTK[..., None], axis=2)
    return y_GTD.astype(x_GTD.dtype), placement.kept_TK


DISPATCHERS = {"einsum": einsum_dispatch, "gather": gather_dispatch}


def _index_tables(plan: RoutingPlan, placement: Placement, num_experts: int, capacity: int) -> tuple[Array, Array]:
    """Each row's slot [T, K] and each slot's row [E, C]: slot = expert * C + position, row = token * K + choice.

    A dropped row has slot E*C and an empty slot has row T*K: one past the end, where a zero is read.
    """
    T, K = plan.expert_TK.shape
    num_slots = num_experts * capacity
    slot_TK = jnp.where(placement.kept_TK, plan.expert_TK * capacity + placement.position_TK, num_slots)
    row_S = jnp.full(num_slots, T * K, jnp.int32).at[slot_TK.reshape(-1)].set(jnp.arange(T * K), mode="drop")
    return slot_TK, row_S.reshape(num_experts, capacity)


def _take(rows: Array, index: Array) -> Array:
    """rows[index], and zeros where the index is one past the end."""
    return jnp.take(rows, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def _tokens_to_slots(x_TD: Array, slot_TK: Array, row_EC: Array) -> Array:
    return _take(x_TD, row_EC // slot_TK.shape[-1])


def _tokens_to_slots_forward(x_TD, slot_TK, row_EC):
    return _tokens_to_slots(x_TD, slot_TK, row_EC), slot_TK


def _tokens_to_slots_backward(slot_TK, dx_ECD):
    dx_TKD = _take(dx_ECD.reshape(-1, dx_ECD.shape[-1]), slot_TK)
    return jnp.sum(dx_TKD, axis=1, dtype=jnp.float32).astype(dx_ECD.dtype), None, None


_tokens_to_slots.defvjp(_tokens_to_slots_forward, _tokens_to_slots_backward)


@jax.custom_vjp
def _slots_to_rows(y_ECD: Array, slot_TK: Array, row_EC: Array) -> Array:
    return _take(y_ECD.reshape(-1, y_ECD.shape[-1]), slot_TK)


def _slots_to_rows_forward(y_ECD, slot_TK, row_EC):
    return _slots_to_rows(y_ECD, slot_TK, row_EC), row_EC


def _slots_to_rows_backward(row_EC, dy_TKD):
    return _take(dy_TKD.reshape(-1, dy_TKD.shape[-1]), row_EC), None, None


_slots_to_rows.defvjp(_slots_to_rows_forward, _slots_to_rows_backward)
