"""Kinds of devices by their data sheets, and meshes of such devices that are not there, for which XLA compiles."""

import contextlib
import importlib.util
import math
import os
from dataclasses import dataclass

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from moe_jax.errors import EnvironmentFault, UserError
from moe_jax.model.machine import Machine
from moe_jax.sharding.mesh import arrange


@dataclass(frozen=True)
class Kind:
    """One device; all per second, links in one direction."""

    platform: str
    memory: float
    bandwidth: float
    flops: float
    """Of bfloat16 products."""
    link: float
    """Bytes to a device of the same host, or on TPUs of the same slice."""
    network: float
    """Bytes to a device of another host: its share of the host's network cards."""
    host: int
    """Devices that are joined by ``link``."""
    name: str = ""
    """TPUs: the name of the topology's kind."""
    compute_capability: tuple[int, int] = (0, 0)
    cores: int = 0
    l2: float = 0
    shared_of_core: int = 0
    shared_of_block: int = 0


KINDS = {
    "h100": Kind("gpu", 80e9, 3.35e12, 989e12, 450e9, 50e9, 8, "", (9, 0), 132, 50e6, 228 * 1024, 227 * 1024),
    "h200": Kind("gpu", 141e9, 4.8e12, 989e12, 450e9, 50e9, 8, "", (9, 0), 132, 50e6, 228 * 1024, 227 * 1024),
    "a100": Kind("gpu", 80e9, 2.0e12, 312e12, 300e9, 25e9, 8, "", (8, 0), 108, 40e6, 164 * 1024, 163 * 1024),
    "v5e": Kind("tpu", 16e9, 0.819e12, 197e12, 100e9, 100e9, 256, "v5e"),
    "v5p": Kind("tpu", 95e9, 2.765e12, 459e12, 300e9, 300e9, 8192, "v5p"),
    "cpu": Kind("cpu", math.inf, math.inf, math.inf, math.inf, math.inf, 1),
}
"""Of dense bfloat16 products without sparsity; NVLink 4 and 3, 400 and 200 Gb/s a GPU, TPUs' links between chips."""

TOPOLOGIES = {
    "v5e": {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v5p": {
        4: "2x2x1",
        8: "2x2x2",
        16: "2x2x4",
        32: "2x4x4",
        64: "4x4x4",
        128: "4x4x8",
        256: "4x8x8",
        512: "8x8x8",
        1024: "8x8x16",
        2048: "8x16x16",
    },
}


def machine_of(kind: Kind) -> Machine:
    return Machine(kind.platform, is_nvidia=kind.platform == "gpu")


def absent_mesh(name: str, sizes: dict[str, int]) -> Mesh:
    """A mesh of so many devices of a kind, none of which has to be here; of a CPU, simulated ones.

    Raises EnvironmentFault where their compiler is not installed, UserError for a number that cannot be.
    """
    number = math.prod(sizes.values())
    if name == "cpu":
        with contextlib.suppress(RuntimeError):  # too late for a process that has computed before
            jax.config.update("jax_num_cpu_devices", number)
        return arrange(sizes, jax.devices("cpu")[:number])
    kind = KINDS[name]
    if kind.platform == "gpu":
        hosts = -(-number // kind.host)
        if number > kind.host and number % kind.host:
            raise UserError(f"the mesh must be whole hosts of {kind.host} {name}, got {number} devices; change a size")
        options = {"platform": "cuda", "target_config": description(name), "topology": f"1x{hosts}x{number // hosts}"}
    else:
        known = TOPOLOGIES[name]
        if number not in known:
            raise UserError(
                f"the mesh must have one of {', '.join(map(str, known))} devices, the slices of {name} that are "
                f"known here, got {number}; change a size"
            )
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        options = {"platform": "tpu", "topology_name": f"{kind.name}:{known[number]}"}
    plugins = ("libtpu",) if kind.platform == "tpu" else ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if not any(map(importlib.util.find_spec, plugins)):
        extra = "tpu" if kind.platform == "tpu" else "cuda12"
        raise EnvironmentFault(
            f"XLA's compiler for {name} is not installed; install it with pip install 'jax[{extra}]', or take "
            "--device cpu"
        )
    try:
        devices = topologies.get_topology_desc(**options).devices
    except Exception as error:  # noqa: BLE001 - of whatever type the plugin raises
        reason = str(error).splitlines()[0][:200]
        raise EnvironmentFault(f"XLA's compiler for {name} does not take {number} devices ({reason})") from None
    return arrange(sizes, devices)


def description(name: str) -> str:
    """A GPU as XLA's compiler has it described, a text proto."""
    kind = KINDS[name]
    major, minor = kind.compute_capability
    return f"""
      gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
        shared_memory_per_core: {kind.shared_of_core} threads_per_core_limit: 2048 core_count: {kind.cores}
        fpus_per_core: 64 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        memory_bandwidth: {kind.bandwidth:.0f} l2_cache_size: {kind.l2:.0f} clock_rate_ghz: 1.7
        device_memory_size: {kind.memory:.0f} shared_memory_per_block_optin: {kind.shared_of_block}
        cuda_compute_capability {{ major: {major} minor: {minor} }}
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
      }}
      platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{name}"
    """
