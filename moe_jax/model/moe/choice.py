"""Which dispatcher and which grouped product a layer uses: what the settings say, or what was measured fastest."""

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import Literal

import jax

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.errors import UserError

GroupedMatmul = Literal["blocked", "ragged", "tokamax", "by_row"]


@dataclass(frozen=True)
class DispatchChoice:
    dispatch: Literal["einsum", "gather", "sorted"]
    grouped_matmul: GroupedMatmul | None
    """Only with sorted."""
    reason: str
    """Why, for the log."""

    def __str__(self) -> str:
        backend = f" ({self.grouped_matmul})" if self.grouped_matmul else ""
        return f"{self.dispatch}{backend}, {self.reason}"


def on_this_machine(model: ModelConfig) -> ModelConfig:
    """``model`` with the ways of moving rows left to choice: those it was trained with may be another machine's."""
    moe = dataclasses.replace(model.moe, dispatch="auto", grouped_matmul="auto")
    return dataclasses.replace(model, moe=moe)


def choose_dispatch(moe: MoEConfig, num_tokens: int, *, train: bool) -> DispatchChoice:
    """The dispatcher for a batch of ``num_tokens`` on all devices together; docs/dispatch.md has the measurements.

    Raises UserError where the settings name a grouped product that this machine does not have.

    Experts of a fixed number of slots go by ``gather``; where nothing may be dropped, rows are ``sorted``, so that no
    choice of ``auto`` ever computes experts on tokens that were not sent to them.
    """
    has_slots = moe.router == "expert_choice" or (train and moe.capacity_factor is not None)
    if moe.dispatch == "einsum" or moe.dispatch == "gather":
        dense = "" if has_slots else ": every expert computes every token, E/K times the multiplications"
        return DispatchChoice(moe.dispatch, None, "as set" + dense)
    if moe.dispatch == "auto" and has_slots:
        return DispatchChoice("gather", None, "the fastest measured for experts of a fixed capacity")
    rows_per_token = moe.num_experts if moe.router == "expert_choice" else moe.top_k
    backend, reason = _choose_grouped_matmul(moe, num_tokens * rows_per_token)
    return DispatchChoice("sorted", backend, reason)


def _choose_grouped_matmul(moe: MoEConfig, num_rows: int) -> tuple[GroupedMatmul, str]:
    platform = jax.default_backend()
    if moe.grouped_matmul == "tokamax":
        _check_tokamax()
    if moe.grouped_matmul == "ragged" and platform != "tpu":
        return "ragged", f"as set: XLA multiplies every row with every expert on a {platform}, E/K times the work"
    if moe.grouped_matmul == "by_row":
        return "by_row", f"as set: each of {num_rows} rows gathers its own expert's weights"
    if moe.grouped_matmul != "auto":
        return moe.grouped_matmul, "as set"
    if num_rows <= max(BY_ROW_ROWS, moe.top_k):
        return "by_row", f"{num_rows} rows: each reads its own expert's weights"
    if platform == "tpu":
        return "ragged", "XLA's grouped product of TPUs"
    if _has_nvidia() and _has_tokamax():
        return "tokamax", "grouped kernels for NVIDIA GPUs"
    if platform == "gpu":
        return "blocked", "a loop, slow on a GPU: pip install tokamax for its kernels, or set a capacity_factor"
    return "blocked", "the fastest measured on a processor"


def _has_tokamax() -> bool:
    return importlib.util.find_spec("tokamax") is not None


def _has_nvidia() -> bool:
    return jax.default_backend() == "gpu" and "nvidia" in jax.devices()[0].device_kind.lower()


def _check_tokamax() -> None:
    if not _has_nvidia():
        device = jax.devices()[0].device_kind
        raise UserError(f"model.moe.grouped_matmul=tokamax needs an NVIDIA GPU, got a {device}; set it to auto")
    if not _has_tokamax():
        raise UserError(
            "model.moe.grouped_matmul=tokamax needs the package tokamax, which is not installed; "
            "pip install tokamax, or set it to auto"
        )


BY_ROW_ROWS = 8
"""Rows up to which gathering weights by row was faster than blocks of rows, as for the rows of a few tokens."""
