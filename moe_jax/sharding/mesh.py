"""The device mesh, and which of its axes each logical axis is divided over."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.axes import Array, PyTree
from moe_jax.config import MeshConfig
from moe_jax.errors import UserError

# Every logical axis in the package; a name without a rule is an error.
LOGICAL_RULES: tuple[tuple[str, str | None], ...] = (
    ("batch", "data"),
    ("embed", None),
    ("heads", None),
    ("head_dim", None),
    ("mlp", None),
    ("expert", None),
    ("vocab", None),
    ("position", None),
    ("layer", None),
)


def make_mesh(config: MeshConfig, microbatch_size: int) -> Mesh:
    """A mesh of ``config.data`` devices. UserError where there are not as many, or they do not divide the batch."""
    available = jax.device_count()
    num_devices = available if config.data == -1 else config.data
    if num_devices > available:
        raise UserError(
            f"mesh.data must be at most the {available} devices here, got {num_devices}; lower it or use -1"
        )
    if microbatch_size % num_devices:
        raise UserError(
            f"data.batch_size / optimizer.accumulation_steps must be a multiple of the {num_devices} devices of the "
            f"mesh, got {microbatch_size}; change the batch size or lower mesh.data"
        )
    # Auto axes: linen's constraints and Embed do not work under Explicit ones, which are jax.make_mesh's default.
    return jax.make_mesh((num_devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:num_devices])


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Within it, logical axis names mean this mesh's axes."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_RULES):
        yield


def with_axes(init: Callable[..., Array], axes: tuple[str, ...]) -> Any:
    """``init``, with the logical axis names of the parameter that it makes."""
    _check_rules(axes)
    return nn.with_logical_partitioning(init, axes)


def constrain(x: Array, axes: tuple[str | None, ...]) -> Array:
    """``x``, divided over the mesh by the logical names of its axes; None: not divided."""
    _check_rules(axes)
    return nn.with_logical_constraint(x, axes)


def _check_rules(axes: Iterable[str | None]) -> None:
    # flax would take a name that it does not know for one that is not divided.
    unknown = set(axes) - {name for name, _ in LOGICAL_RULES} - {None}
    if unknown:
        raise ValueError(f"each logical axis needs a rule in LOGICAL_RULES, got {sorted(map(str, unknown))}; add one")


def on_each_device(function: Callable[[PyTree, PyTree], PyTree], batch: PyTree, shared: PyTree) -> PyTree:
    """``function(batch, shared)``, on each device for its own part of the batch, where a mesh divides the batch.

    Every leaf of ``batch`` and of the result has the batch as its leading axis; ``shared`` is the same everywhere, and
    its gradients are summed over the devices. A batch that the devices do not divide evenly, as the single sequence of
    a sample, is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = nn.logical_to_mesh_axes(("batch",))
    if mesh.empty or not axes or axes[0] is None:
        return function(batch, shared)
    names = axes[0] if isinstance(axes[0], tuple) else (axes[0],)
    num_parts = math.prod(mesh.shape[name] for name in names)
    if num_parts == 1 or jax.tree.leaves(batch)[0].shape[0] % num_parts:
        return function(batch, shared)
    replicated = PartitionSpec()
    # check_vma=False: the sums over devices are those of the transposition, which custom_vjp functions take part in.
    return jax.shard_map(function, in_specs=(axes, replicated), out_specs=axes, check_vma=False)(batch, shared)


def shardings(boxed: PyTree, mesh: Mesh) -> PyTree:
    """The shardings of a tree of (abstract) parameters that carry their logical axis names."""
    # Where an optimizer has parts, each holds an empty place in the box of every parameter that is not its own.
    filled = jax.tree.map(
        lambda leaf: leaf if jax.tree.leaves(leaf) else nn.unbox(leaf),
        boxed,
        is_leaf=lambda x: isinstance(x, nn.Partitioned),
    )
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(filled), mesh, LOGICAL_RULES)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Places host arrays [B, ...] on the mesh, divided over the batch axis."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
