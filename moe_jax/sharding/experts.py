"""Expert parallelism: each device computes the rows of its own experts, exactly, for any router and backend.

Everything here runs inside of ``on_devices_of_experts``, manual over all axes of the mesh, so that each exchange is
written down: weights are gathered over ``fsdp``, results are summed over ``tensor``, and over ``expert``

* the slots of experts travel (``to_experts``, ``from_experts``), where each expert has a fixed number of them: an
  all-to-all, to the devices of the experts and back;
* the tokens travel (``of_own_experts``), where nothing is dropped and an expert may have any number of rows: each
  device gets the tokens of all, computes the rows of its own experts, and the partial sums are scattered back. No
  shape depends on the routing and nothing can be dropped.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_jax.axes import Array, PyTree
from moe_jax.sharding.mesh import on_each_device, spec


def on_devices_of_experts(
    compute: Callable[[PyTree, PyTree], tuple[Array, Array]], tokens: PyTree, weights: PyTree, axes: PyTree
) -> tuple[Array, Array]:
    """``compute(tokens, weights)`` on each device, for its own part of the batch: (y [G, T, D], kept [G, T, K]).

    Args:
      compute: gets a part of the groups, and the weights of the device's own experts, whole along ``embed`` and
        divided along ``mlp``; where that divides them, its y is a partial sum.
      tokens: every leaf has the G groups in front.
      weights: E experts, whose gradients are summed over the devices.
      axes: the logical axes of each leaf of ``weights``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return compute(tokens, weights)
    specs = jax.tree.map(lambda leaf, names: spec(names, leaf.shape, mesh), weights, axes)
    dtype = jax.tree.leaves(tokens)[0].dtype

    def on_this_device(tokens: PyTree, weights: PyTree) -> tuple[Array, Array]:
        if not jax.sharding.get_abstract_mesh().manual_axes:  # too short a batch to be divided
            return compute(tokens, weights)
        y_GTD, kept_GTK = compute(tokens, jax.tree.map(functools.partial(_whole, dtype), weights, specs))
        if mesh.shape["tensor"] > 1:
            y_GTD = _sum_over_tensor(y_GTD.astype(jnp.float32)).astype(y_GTD.dtype)
        return y_GTD, kept_GTK

    if mesh.shape["fsdp"] > 1:
        on_this_device = jax.checkpoint(on_this_device, policy=_all_but_gathered)
    return on_each_device(on_this_device, tokens, weights, specs)


def _whole(dtype: jnp.dtype, weight: Array, divided: PartitionSpec) -> Array:
    """A weight as it is multiplied: in the type of the tokens, gathered over ``fsdp``; its gradient is scattered.

    What is added by each device of ``tensor``, a bias that is not divided among them, is left to the first.
    """
    mesh = jax.sharding.get_abstract_mesh()
    for axis, names in enumerate(divided if mesh.shape["fsdp"] > 1 else ()):
        if "fsdp" in (names or ()):
            weight = jax.lax.all_gather(weight.astype(dtype), "fsdp", axis=axis, tiled=True)
    if mesh.shape["tensor"] > 1 and not any("tensor" in (names or ()) for names in divided):
        weight = jnp.where(jax.lax.axis_index("tensor") == 0, weight, 0)
    return weight


@jax.custom_vjp
def _sum_over_tensor(y: Array) -> Array:
    return jax.lax.psum(y, "tensor")


# The sum is the same on the n devices, and so is its gradient, of which shard_map gives each a part 1/n. The default
# would be to add these up again.
_sum_over_tensor.defvjp(lambda y: (_sum_over_tensor(y), None), lambda _, dy: (dy * jax.lax.axis_size("tensor"),))


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    # The backward pass gathers a layer's weights again: kept, those of all layers would fill each device. So would
    # what is made of them element by element.
    return primitive not in (jax.lax.all_gather_p, jax.lax.select_n_p, jax.lax.convert_element_type_p)


def expert_parts() -> int:
    """The number of devices that experts are divided over: 1 but within ``on_devices_of_experts``."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape["expert"] if "expert" in mesh.manual_axes else 1


def to_experts(x_ERD: Array) -> Array:
    """[E, R, D], this device's rows for all experts -> [E/n, n·R, D], all devices' rows for its own."""
    if expert_parts() == 1:
        return x_ERD
    return jax.lax.all_to_all(x_ERD, "expert", split_axis=0, concat_axis=1, tiled=True)


def from_experts(y_ERD: Array) -> Array:
    """[E/n, n·R, D] -> [E, R, D]: the inverse of ``to_experts``."""
    if expert_parts() == 1:
        return y_ERD
    return jax.lax.all_to_all(y_ERD, "expert", split_axis=1, concat_axis=0, tiled=True)


def of_own_experts(compute: Callable[[PyTree, Array], Array], rows: PyTree) -> Array:
    """The sum over all devices of ``compute(rows of all, the number of its part)``: y [T, D] in float32.

    Each leaf of ``rows`` has the device's T tokens in front. They are computed in as many chunks as there are parts,
    where that divides T, and computed again in the backward pass: should all rows of a chunk belong to one device, it
    holds no more of them at a time than it would without expert parallelism.
    """
    n = expert_parts()
    num_tokens = jax.tree.leaves(rows)[0].shape[0]
    num_chunks = math.gcd(n, num_tokens)
    chunks = jax.tree.map(lambda leaf: leaf.reshape(num_chunks, num_tokens // num_chunks, *leaf.shape[1:]), rows)

    @jax.checkpoint
    def compute_chunk(chunk: PyTree) -> Array:
        everyones = jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, "expert", tiled=True), chunk)
        y_TD = compute(everyones, jax.lax.axis_index("expert")).astype(jnp.float32)
        return jax.lax.psum_scatter(y_TD, "expert", tiled=True)

    return jax.lax.map(compute_chunk, chunks).reshape(num_tokens, -1)
