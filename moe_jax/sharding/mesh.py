"""The device mesh, and which of its axes each logical axis is divided over."""

import contextlib
from collections.abc import Iterator

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.axes import Array, PyTree
from moe_jax.config import MeshConfig
from moe_jax.errors import UserError

# Every logical axis in the package; a name without a rule would be replicated without a word, so a test compares them.
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
