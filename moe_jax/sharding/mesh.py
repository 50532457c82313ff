"""The device mesh, and which of its axes each logical axis is divided over."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.axes import Array, PyTree
from moe_jax.config import MeshConfig, ModelConfig
from moe_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "expert", "tensor")
"""From the outermost, whose devices may be furthest from each other, to the innermost."""

# Every logical axis in the package; a name without a rule is an error.
LOGICAL_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),  # outside of the experts, "expert" is one more axis of the batch
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    # Whole on each device: what is too small for a collective to pay, and what a loop indexes.
    "channel": (),
    "head_dim": (),
    "router": (),
    "position": (),
    "layer": (),
}


def make_mesh(config: MeshConfig, model: ModelConfig, microbatch_size: int) -> Mesh:
    """The mesh of ``config``'s sizes. UserError where there are not as many devices, or a size does not divide what
    it has to."""
    available = jax.device_count()
    sizes = mesh_sizes(config, available)
    num_devices = math.prod(sizes.values())
    if num_devices > available:
        raise UserError(
            f"the mesh must have at most the {available} devices here, got {_product(sizes)}; lower one of them, or "
            "use -1 for what is left"
        )
    if jax.process_count() > 1 and num_devices < available:
        raise UserError(
            f"the mesh of a run of several processes must have all of their {available} devices, got "
            f"{_product(sizes) or 1}; raise one of the sizes, or use -1 for what is left"
        )
    check_mesh(sizes, model, microbatch_size)
    return arrange(sizes, jax.devices()[:num_devices])


def mesh_sizes(config: MeshConfig, available: int) -> dict[str, int]:
    """The size of each mesh axis on so many devices: where one is -1, it takes what the others leave."""
    sizes = {"data": config.data, "fsdp": config.fsdp, "expert": config.expert, "tensor": config.tensor}
    free = [name for name, size in sizes.items() if size == -1]
    if not free:
        return sizes
    others = math.prod(size for size in sizes.values() if size != -1)
    if available % others:
        fixed = {name: size for name, size in sizes.items() if size != -1}
        raise UserError(
            f"with mesh.{free[0]} = -1 the other sizes must divide the {available} devices here, got "
            f"{_product(fixed)}; change one of them"
        )
    return sizes | {free[0]: available // others}


def check_mesh(sizes: dict[str, int], model: ModelConfig, microbatch_size: int) -> None:
    """UserError unless each size divides the axes that are divided by it."""
    moe = model.moe
    parts = {name: sizes[name] for name in LOGICAL_RULES["batch"]}
    if microbatch_size % math.prod(parts.values()):
        raise UserError(
            "data.batch_size / optimizer.accumulation_steps must be a multiple of the "
            f"{math.prod(parts.values())} devices that the batch is divided over ({_product(parts)}), got "
            f"{microbatch_size}; change the batch size or lower one of them"
        )
    if sizes["expert"] > 1 and not moe.num_experts:
        raise UserError(f"mesh.expert must be 1 for a model without experts, got {sizes['expert']}; set it to 1")
    divided = {
        "fsdp": {"model.embed_dim": model.embed_dim},
        "expert": {"model.moe.num_experts": moe.num_experts},
        "tensor": {
            "model.num_kv_heads": model.num_kv_heads or model.num_heads,
            "model.mlp_dim": model.mlp_dim or 0,
            "model.moe.expert_dim": moe.expert_dim if moe.num_experts or model.mlp_dim is None else 0,
        },
    }
    for name, axes in divided.items():
        for what, length in axes.items():
            if length % sizes[name]:
                raise UserError(f"mesh.{name} must divide {what}={length}, got {sizes[name]}; change one of them")


def _product(sizes: dict[str, int]) -> str:
    divided = [f"mesh.{name}={size}" for name, size in sizes.items() if size != 1]
    return " * ".join(divided) + (f" = {math.prod(sizes.values())}" if len(divided) > 1 else "")


def arrange(sizes: dict[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of these sizes: neighbours in it are near each other in the machine.

    Where there are several slices of TPUs, which a slower network joins, they divide the outermost axis. UserError
    where its size does not allow that.
    """
    shape = tuple(sizes[name] for name in MESH_AXES)
    # Of GPUs each host is a slice of its own to jax, and their network is made for more than gradients.
    # A description of TPUs that are not there is of one slice, and does not number it.
    slices = len({getattr(device, "slice_index", 0) if device.platform == "tpu" else 0 for device in devices})
    if sizes["data"] % slices:
        raise UserError(
            f"mesh.data must be a multiple of the {slices} slices here, got {sizes['data']}: only gradients should "
            "cross the network between slices; change it"
        )
    if slices == 1:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        within = (shape[0] // slices, *shape[1:])
        array = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    # Auto axes: linen's modules do not work under Explicit ones.
    return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Within it, logical axis names mean this mesh's axes."""
    with jax.set_mesh(mesh):
        yield


def with_axes(init: Callable[..., Array], axes: tuple[str, ...]) -> Any:
    """``init``, with the logical axis names of the parameter that it makes."""
    _check_rules(axes)
    return nn.with_logical_partitioning(init, axes)


def constrain(x: Array, axes: tuple[str | None, ...]) -> Array:
    """``x``, divided over the mesh by the logical names of its axes; None: not divided."""
    _check_rules(axes)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def spec(axes: Iterable[str | None], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """How an array of these logical axes is divided: over the first mesh axes of each rule that divide its length."""
    parts = []
    for name, length in zip(axes, shape, strict=True):
        names = LOGICAL_RULES[name] if name is not None else ()
        while length % math.prod(mesh.shape[mesh_axis] for mesh_axis in names):
            names = names[:-1]
        parts.append(names or None)
    return PartitionSpec(*parts)


def is_divided(axis: str) -> bool:
    """Whether the mesh in use has several devices for a logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and math.prod(mesh.shape[name] for name in LOGICAL_RULES[axis]) > 1


def on_each_device(
    function: Callable[[PyTree, PyTree], PyTree],
    batch: PyTree,
    shared: PyTree,
    specs: PyTree = PartitionSpec(),  # noqa: B008
) -> PyTree:
    """``function(batch, shared)``, on each device for its own part of the batch, where a mesh divides the batch.

    Every leaf of ``batch`` and of the result has the batch as its leading axis; ``shared`` is divided by ``specs``, or
    the same everywhere, and its gradients are summed over the devices. A batch that the devices do not divide evenly,
    as the short text that creates parameters, is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = LOGICAL_RULES["batch"]
    if mesh.empty or mesh.size == 1:
        return function(batch, shared)
    if jax.tree.leaves(batch)[0].shape[0] % math.prod(mesh.shape[name] for name in parts):
        return function(batch, shared)
    divided = PartitionSpec(parts)
    # check_vma=False: the sums over devices are those of the transposition, which custom_vjp functions take part in.
    return jax.shard_map(function, in_specs=(divided, specs), out_specs=divided, check_vma=False)(batch, shared)


def _check_rules(axes: Iterable[str | None]) -> None:
    unknown = set(axes) - set(LOGICAL_RULES) - {None}
    if unknown:
        raise ValueError(f"each logical axis needs a rule in LOGICAL_RULES, got {sorted(map(str, unknown))}; add one")


def shardings(boxed: PyTree, mesh: Mesh) -> PyTree:
    """The shardings of a tree of (abstract) parameters that carry their logical axis names."""

    def of_leaf(leaf: Any) -> PyTree:
        if not isinstance(leaf, nn.Partitioned):
            return NamedSharding(mesh, PartitionSpec())
        # Where an optimizer has parts, each holds an empty place in the box of every parameter that is not its own.
        if not jax.tree.leaves(leaf):
            return nn.unbox(leaf)
        return NamedSharding(mesh, spec(leaf.names, leaf.value.shape, mesh))

    return jax.tree.map(of_leaf, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int | None = None) -> dict[str, Array]:
    """Places host arrays [B, ...] on the mesh, divided over the batch axis.

    With ``batch_size`` the arrays hold this process's ``own_rows`` of so many.
    """
    sharding = _batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    first = 0 if batch_size is None else own_rows(mesh, batch_size).start

    def put(rows: np.ndarray) -> Array:
        shape = (batch_size or rows.shape[0], *rows.shape[1:])

        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            return rows[start - first : stop - first]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(put, batch)


def own_rows(mesh: Mesh, batch_size: int) -> range:
    """Those rows of a global batch, from the first to the last, that the devices of this process hold."""
    places: Any = _batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    bounds = [place[0].indices(batch_size) for place in places]
    return range(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


def _batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(LOGICAL_RULES["batch"]))


def of_each_process(value: int, mesh: Mesh) -> Array:
    """[devices] int32: on each device ``value``, which each process has for itself."""
    one, sharding = np.full(1, value, np.int32), NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.make_array_from_callback((mesh.size,), sharding, lambda _: one)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on each device, so that every process can read it."""
    return NamedSharding(mesh, PartitionSpec())
