"""What a decoder's ways of computing depend on: the machine, as a value that a test can make up."""

from dataclasses import dataclass

import jax


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
