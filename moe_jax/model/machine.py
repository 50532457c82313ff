"""The machine, as a value that a test can make up, and the way of attention that is fastest on it."""

from dataclasses import dataclass
from typing import Literal

import jax

from moe_jax.config import ModelConfig
from moe_jax.errors import UserError
from moe_jax.model.attention_blocks import BLOCK


@dataclass(frozen=True)
class Machine:
    platform: str
    """cpu, gpu or tpu."""
    is_nvidia: bool = False


def this_machine() -> Machine:
    """The machine that this process computes on."""
    platform = jax.default_backend()
    is_nvidia = platform == "gpu" and "nvidia" in jax.devices()[0].device_kind.lower()
    return Machine(platform, is_nvidia)


def choose_attention(
    config: ModelConfig, *, train: bool, machine: Machine, packed: bool
) -> Literal["full", "blocks", "cudnn"]:
    """The way of attention over whole rows, which ``packed`` hold several documents: as set, or the fastest measured.

    Raises UserError where the setting names one that cannot be.
    """
    rate = config.dropout_rate
    dropout = f"has no dropout, got model.dropout_rate={rate}" if train and rate else None
    obstacles = {"full": None, "blocks": dropout, "cudnn": _obstacle_to_cudnn(config, machine, packed) or dropout}
    if config.attention != "auto":
        if (obstacle := obstacles[config.attention]) is not None:
            raise UserError(f"model.attention={config.attention} {obstacle}; set it to auto")
        return config.attention
    if obstacles["cudnn"] is None:
        return "cudnn"
    # Elsewhere blocks were not measured, and are for their memory.
    longest_whole = BLOCK if machine.platform == "cpu" else 1024
    return "blocks" if dropout is None and config.context_length > longest_whole else "full"


def _obstacle_to_cudnn(config: ModelConfig, machine: Machine, packed: bool) -> str | None:
    A = config.embed_dim // config.num_heads
    if not machine.is_nvidia:
        return f"needs an NVIDIA GPU, which this {machine.platform} is not"
    if config.dtype != "bfloat16":
        return f"computes in bfloat16, got model.dtype={config.dtype}"
    if A % 8 or A > 128:
        return f"takes heads of up to 128 channels in multiples of 8, got embed_dim / num_heads = {A}"
    return "cannot keep documents of one row apart, got data.mode=packed" if packed else None
