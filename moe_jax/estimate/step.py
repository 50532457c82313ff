"""An optimizer step, compiled and not run: what each device holds, computes and exchanges, and bounds of its time."""

import collections
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moe_jax.axes import PyTree
from moe_jax.config import Config, ModelConfig
from moe_jax.errors import naming_what_helps
from moe_jax.estimate.collectives import KINDS as EXCHANGES
from moe_jax.estimate.collectives import Collective, collectives
from moe_jax.estimate.devices import KINDS, Kind, absent_mesh, machine_of
from moe_jax.estimate.program import Operation, operations, size_of
from moe_jax.model.decoder import Decoder
from moe_jax.model.moe.backends import for_machine
from moe_jax.sharding.mesh import check_mesh, spec, use_mesh
from moe_jax.training.flops import count_params, flops_per_token
from moe_jax.training.optimizer import make_optimizer, make_schedule
from moe_jax.training.state import TrainState, abstract_state
from moe_jax.training.step import train_step

SLOW = 0.5
"""The share of their peak that products reach in the slower of the two estimates."""


@dataclass(frozen=True)
class Estimate:
    """Bytes and operations are those of one device and one optimizer step."""

    device: str
    mesh: dict[str, int]
    dispatch: str
    parameters: int
    """Of the model, on all devices together; so too ``active``, those that one token meets."""
    active: int
    parameter_bytes: int
    moment_bytes: int
    """Of the optimizer's state."""
    peak_bytes: int
    """Arguments, results and temporaries of the compiled step."""
    memory: float | None
    """None for a CPU."""
    model_flops: float
    """By ``training.flops``, which counts nothing twice."""
    product_flops: float
    """Of the products that the compiler shows; not of kernels of our own, nor of cuDNN's."""
    memory_traffic: float
    """Bytes that operations read and write, where nothing stays in a cache."""
    exchanged: list[dict[str, Any]]
    """Of each kind and set of mesh axes: how many times, bytes received, bytes sent over links, seconds."""
    largest: list[dict[str, Any]]
    """The largest arrays of the program."""
    fastest: float
    """Seconds, where products reach their peak and exchanges hide behind computation."""
    slowest: float
    """Seconds, where products reach half of it and nothing hides."""

    @property
    def fits(self) -> bool | None:
        return None if self.memory is None else self.peak_bytes <= 0.95 * self.memory


def estimate(config: Config, sizes: dict[str, int], device: str, vocab_size: int) -> Estimate:
    """Compiles a step of ``config`` on a mesh of such devices, which need not be here, and reads what it is.

    Raises UserError for a mesh that cannot be, EnvironmentFault without the device's compiler.
    """
    kind = KINDS[device]
    check_mesh(sizes, config.model, config.data.batch_size // config.optimizer.accumulation_steps)
    mesh = absent_mesh(device, sizes)
    compiled, state, model = compile_step(config, mesh, kind, vocab_size)
    params = state.params
    total, active = count_params(params, model.moe)
    model_flops = flops_per_token(params, model) * config.data.batch_size * model.context_length / mesh.size
    text = compiled.as_text() or ""
    found, steps = collectives(text, mesh), list(operations(text))
    on_device = [each for each in steps if each.kind.removesuffix("-start") not in EXCHANGES]
    product_flops = sum(each.flops * each.times for each in on_device)
    exchanged = _exchanged(found, mesh, kind)
    exchanging = sum(each["seconds"] for each in exchanged)
    # Kernels of our own and cuDNN's are opaque; a forward pass that is computed again counts in the program's alone.
    hidden_flops = max(0.0, model_flops * (4 / 3 if model.remat == "full" else 1.0) - product_flops)
    peak = kind.flops if model.dtype == "bfloat16" or kind.platform != "gpu" else kind.flops / 2  # TF32

    def computing(share: float) -> float:
        times = [each.times * max(each.flops / (share * peak), each.num_bytes / kind.bandwidth) for each in on_device]
        return sum(times) + hidden_flops / (share * peak)

    memory = compiled.memory_analysis()
    return Estimate(
        device=device,
        mesh=sizes,
        dispatch=model.moe.dispatch if model.moe.num_experts else "none",
        parameters=total,
        active=active,
        parameter_bytes=_bytes_on_a_device(state.params),
        moment_bytes=_bytes_on_a_device(state.optimizer_state),
        peak_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        memory=None if kind.platform == "cpu" else kind.memory,
        model_flops=model_flops,
        product_flops=product_flops,
        memory_traffic=sum(each.num_bytes * each.times for each in on_device),
        exchanged=exchanged,
        largest=_largest(steps),
        fastest=max(computing(1.0), exchanging),
        slowest=computing(SLOW) + exchanging,
    )


def compile_step(config: Config, mesh: Mesh, kind: Kind, vocab_size: int) -> tuple[Any, TrainState, ModelConfig]:
    """The step as compiled, the shapes of its state, and the model with its backend on such a machine."""
    num_tokens = config.data.batch_size // config.optimizer.accumulation_steps * config.model.context_length
    packed = config.data.mode == "packed"
    model = for_machine(config.model, num_tokens, train=True, machine=machine_of(kind), packed=packed)
    decoder = Decoder(model, vocab_size)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, config.train.num_steps))
    # Triton's products are chosen by timing them, for which a device would have to be here.
    options: dict[str, bool | str] = {"xla_gpu_enable_triton_gemm": False} if kind.platform == "gpu" else {}
    with use_mesh(mesh):
        state = abstract_state(decoder, optimizer, mesh)
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = functools.partial(train_step, config, decoder, optimizer)
        lowered = jax.jit(step, donate_argnums=0, out_shardings=(placed, None)).lower(state, _batch(config, mesh))
        with naming_what_helps("divide parameters by mesh.fsdp or mesh.expert, or set model.remat to full"):
            return lowered.compile(compiler_options=options), state, model


def _batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what ``data.batches`` yields."""
    shape = (config.data.batch_size, config.model.context_length)
    sharding = NamedSharding(mesh, spec(("batch", None), shape, mesh))
    dtypes = {"inputs": jnp.int32, "targets": jnp.int32}
    if config.data.mode != "windows":
        dtypes |= {"mask": jnp.bool_}
    if config.data.mode == "packed":
        dtypes |= {"positions": jnp.int32, "segments": jnp.int32}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}


def _bytes_on_a_device(tree: PyTree) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _exchanged(found: list[Collective], mesh: Mesh, kind: Kind) -> list[dict[str, Any]]:
    rows: dict[tuple, Any] = collections.defaultdict(collections.Counter)
    for each in found:
        row = rows[each.kind, each.axes]
        row["times"] += each.times
        row["received"] += each.num_bytes
        row["sent"] += each.wire_bytes
        row["seconds"] += each.wire_bytes / speed_of(each, mesh, kind)
    named: list[dict[str, Any]] = [{"kind": name, "axes": list(axes), **row} for (name, axes), row in rows.items()]
    return sorted(named, key=lambda row: -row["seconds"])


def speed_of(each: Collective, mesh: Mesh, kind: Kind) -> float:
    """Bytes a second that a device sends. A ring enters a host once, so that its devices' cards carry a part each."""
    ids = np.arange(mesh.size).reshape(tuple(mesh.shape.values()))
    own = [index for index, name in enumerate(mesh.axis_names) if name in each.axes]
    hosts = np.moveaxis(ids, own, range(len(own))).reshape(math.prod(ids.shape[i] for i in own), -1) // kind.host
    n, near = len(hosts), int((hosts[:, None] == hosts).sum(axis=0).min())  # of a group: all, and those of one host
    crossing = {"all-to-all": (n - near) / (n - 1), "collective-permute": 1.0}.get(each.kind, 1 / near)
    return kind.link if near == n else min(kind.link, kind.network / crossing)


def _largest(steps: list[Operation], most: int = 5) -> list[dict[str, Any]]:
    shapes = {shape for each in steps for shape in each.results}
    ranked = sorted(shapes, key=lambda shape: -size_of((shape,)))[:most]
    return [{"array": f"{shape[0]}[{','.join(map(str, shape[1]))}]", "bytes": size_of((shape,))} for shape in ranked]
