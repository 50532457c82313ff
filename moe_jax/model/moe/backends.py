"""The backends, which bring rows to their experts and back, and the choice among them: as set, or as measured fastest.

A backend is one function (x_GTD, plan, weights, activation, capacity) -> (y_GTD, kept_GTK); ``dispatch.einsum``
documents its arguments.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_jax.axes import Array
from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.errors import UserError
from moe_jax.model.machine import Machine, choose_attention
from moe_jax.model.mlp import Activation, ExpertWeights
from moe_jax.model.moe.dispatch import einsum, gather
from moe_jax.model.moe.kernels.blocked import blocked
from moe_jax.model.moe.kernels.pallas import pallas
from moe_jax.model.moe.kernels.products import by_row, ragged
from moe_jax.model.moe.plan import RoutingPlan
from moe_jax.model.moe.routing import limits_capacity


@dataclass(frozen=True)
class Backend:
    """A way of computing a plan, and what the rest of the package has to know of it."""

    run: Callable[[Array, RoutingPlan, ExpertWeights, Activation, int], tuple[Array, Array]]
    has_slots: bool = False
    """Experts have ``capacity`` slots a group and compute all of them; otherwise nothing is dropped or padded so."""


BACKENDS = {
    "einsum": Backend(einsum, has_slots=True),
    "gather": Backend(gather, has_slots=True),
    "blocked": Backend(blocked),
    "ragged": Backend(ragged),
    "pallas": Backend(pallas),
    "by_row": Backend(by_row),
}
"""By the names of ``model.moe.dispatch``."""

BY_ROW_ROWS = 8
"""Rows up to which gathering weights by row was faster than blocks of rows, as for the rows of a few tokens."""


@dataclass(frozen=True)
class Choice:
    name: str
    """In ``BACKENDS``."""
    reason: str
    """Why, for the log."""

    def __str__(self) -> str:
        return f"{self.name}, {self.reason}"


def choose(moe: MoEConfig, num_tokens: int, *, train: bool, machine: Machine) -> Choice:
    """The backend for a batch of ``num_tokens`` on all devices together; docs/dispatch.md has the measurements.

    Experts of a fixed number of slots go by ``gather``; where nothing may be dropped, rows are sorted, so that no
    choice of ``auto`` ever computes experts on tokens that were not sent to them.

    Raises UserError where the setting names a backend that this machine does not have.
    """
    is_limited = limits_capacity(moe, train=train)
    if moe.dispatch != "auto":
        return Choice(moe.dispatch, _why_as_set(moe.dispatch, is_limited, machine))
    if is_limited:
        return Choice("gather", "the fastest measured for experts of a fixed capacity")
    num_rows = num_tokens * moe.top_k
    if num_rows <= max(BY_ROW_ROWS, moe.top_k):
        return Choice("by_row", f"{num_rows} rows: each reads its own expert's weights")
    if machine.platform == "tpu":
        return Choice("ragged", "XLA's grouped product for TPUs")
    if machine.platform == "gpu":
        return Choice("pallas", "grouped kernels for GPUs")
    return Choice("blocked", "the fastest measured on a CPU")


def _why_as_set(name: str, is_limited: bool, machine: Machine) -> str:
    if name == "pallas" and machine.platform != "gpu":
        raise UserError(f"model.moe.dispatch=pallas needs a GPU, which this {machine.platform} is not; set it to auto")
    if BACKENDS[name].has_slots and not is_limited:
        return "as set: every expert computes every token, E/K times the multiplications"
    if name == "ragged" and machine.platform != "tpu":
        return f"as set: XLA multiplies every row with every expert on a {machine.platform}, E/K times the work"
    if name == "by_row":
        return "as set: each row gathers its own expert's weights"
    return "as set"


def for_machine(
    model: ModelConfig, num_tokens: int, *, train: bool, machine: Machine, as_set: bool = True, packed: bool = False
) -> ModelConfig:
    """``model`` as a decoder needs it: with the backend for such batches in ``moe.dispatch`` and the way of attention.

    ``as_set=False`` chooses as ``auto`` does, whatever is set: for a run that may be of another kind of machine.
    ``packed`` rows hold several documents.

    Raises UserError as ``choose`` does.
    """
    if not as_set:
        model = dataclasses.replace(model, attention="auto", moe=dataclasses.replace(model.moe, dispatch="auto"))
    way = choose_attention(model, train=train, machine=machine, packed=packed)
    name: Any = model.moe.dispatch  # one of the setting's literals
    if model.moe.num_experts:
        name = choose(model.moe, num_tokens, train=train, machine=machine).name
    return dataclasses.replace(model, attention=way, moe=dataclasses.replace(model.moe, dispatch=name))
