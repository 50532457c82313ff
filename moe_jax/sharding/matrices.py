"""Matrices that a mesh divides, each brought together on one of its devices: for what has to see the whole of one."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_jax.axes import Array, PyTree
from moe_jax.sharding.mesh import spec


def on_whole_matrices(
    function: Callable[[PyTree, PyTree], PyTree], stacks: PyTree, axes: PyTree, others: PyTree
) -> PyTree:
    """``function(stacks, others)``, whose result has the shapes of ``stacks``, of arrays [..., m, n].

    The matrices of a stack are dealt out to the devices over which each is divided, and go back after it: two
    all-to-alls, of a device's share of the bytes each.

    Args:
      function: gets stacks [S, m, n] of a device's own whole matrices, which may have zeros behind them.
      axes: the logical axes of each leaf of ``stacks``.
      others: the same on each device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(stacks, others)
    specs = jax.tree.map(lambda leaf, names: spec(names, leaf.shape, mesh), stacks, axes)

    def on_this_device(stacks: PyTree, others: PyTree) -> PyTree:
        result = function(jax.tree.map(_whole, stacks, specs), others)
        return jax.tree.map(_divided, result, stacks, specs)

    return jax.shard_map(on_this_device, in_specs=(specs, PartitionSpec()), out_specs=specs, check_vma=False)(
        stacks, others
    )


def _exchanges(divided: PartitionSpec) -> list[tuple[int, str]]:
    """(axis of [S, m, n], mesh axis) for each of the two that is divided."""
    rows, columns = tuple(divided)[-2:]
    return [(axis, name[0] if isinstance(name, tuple) else name) for axis, name in ((1, rows), (2, columns)) if name]


def _whole(part: Array, divided: PartitionSpec) -> Array:
    """[..., m/a, n/b], a part of each matrix -> [S/(a·b), m, n], a part of the matrices, zeros behind them."""
    stack = part.reshape(-1, *part.shape[-2:])
    for axis, name in _exchanges(divided):
        missing = -stack.shape[0] % jax.lax.axis_size(name)
        stack = jnp.pad(stack, ((0, missing), (0, 0), (0, 0)))
        stack = jax.lax.all_to_all(stack, name, split_axis=0, concat_axis=axis, tiled=True)
    return stack


def _divided(stack: Array, part: Array, divided: PartitionSpec) -> Array:
    """The inverse of ``_whole``, to the shape of ``part``."""
    lengths = [math.prod(part.shape[:-2])]
    for _, name in _exchanges(divided):
        lengths.append(-(-lengths[-1] // jax.lax.axis_size(name)))
    for (axis, name), length in zip(reversed(_exchanges(divided)), reversed(lengths[:-1]), strict=True):
        stack = jax.lax.all_to_all(stack, name, split_axis=axis, concat_axis=0, tiled=True)[:length]
    return stack.reshape(part.shape)
