"""The language-model loss of the last hidden states, in chunks of positions where all logits would be too many."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from moe_jax.axes import Array, PyTree
from moe_jax.sharding.mesh import constrain, spec

LOGITS_BYTES = 2**29
"""Bytes of float32 logits that one device holds at a time; those of more tokens are computed in chunks."""


@jax.custom_vjp
def cross_entropy(hidden_BLD: Array, output_DV: Array, target_BL: Array, mask_BL: Array | None, count: Array) -> Array:
    """The sum over the mask's tokens of -log softmax(hidden @ output)[target] in nats, over ``count``: [] float32.

    Where it is differentiated the forward pass computes the gradient too, so that each product is made once, no
    logits outlive their chunk, and the gradient of the output adds up in float32.
    """

    def of_chunk(hidden_GTD: Array, target_GT: Array, output_DV: Array) -> tuple[tuple, Array]:
        return (), _losses(hidden_GTD, output_DV, target_GT)[0]

    _, loss_BL = _over_chunks(of_chunk, (hidden_BLD, target_BL), output_DV)
    return _sum(loss_BL, mask_BL) / count


def _forward(
    hidden_BLD: Array, output_DV: Array, target_BL: Array, mask_BL: Array | None, count: Array
) -> tuple[Array, tuple[Array, Array]]:
    def of_chunk(hidden_GTD: Array, target_GT: Array, dloss_GT: Array, output_DV: Array) -> tuple[Array, PyTree]:
        loss_GT, logits_GTV, logsumexp_GT = _losses(hidden_GTD, output_DV, target_GT)
        # In one pass: the gradient of a gather would be a scatter into as many zeros as there are logits.
        is_target_GTV = jnp.arange(logits_GTV.shape[-1])[None, None, :] == target_GT[..., None]
        dlogits_GTV = (jnp.exp(logits_GTV - logsumexp_GT[..., None]) - is_target_GTV) * dloss_GT[..., None]
        dlogits_GTV = dlogits_GTV.astype(hidden_GTD.dtype)
        doutput_GDV = jnp.einsum("GTD,GTV->GDV", hidden_GTD, dlogits_GTV, preferred_element_type=jnp.float32)
        return constrain(doutput_GDV, ("batch", None, "vocab")), (loss_GT, jnp.matmul(dlogits_GTV, output_DV.T))

    dloss_BL = jnp.broadcast_to(1.0 / count, target_BL.shape)
    dloss_BL = dloss_BL if mask_BL is None else jnp.where(mask_BL, dloss_BL, 0.0)
    doutput_GDV, (loss_BL, dhidden_BLD) = _over_chunks(of_chunk, (hidden_BLD, target_BL, dloss_BL), output_DV)
    gradients = (dhidden_BLD, jnp.sum(doutput_GDV, axis=0).astype(output_DV.dtype))
    return _sum(loss_BL, mask_BL) / count, gradients


def _backward(gradients: tuple[Array, Array], dloss: Array) -> tuple[Array | None, ...]:
    return *((dloss * each).astype(each.dtype) for each in gradients), None, None, None


cross_entropy.defvjp(_forward, _backward)


def _losses(hidden_GTD: Array, output_DV: Array, target_GT: Array) -> tuple[Array, Array, Array]:
    """Losses, logits and their logsumexp, float32, of factors in the type of the activations."""
    logits_GTV = jnp.matmul(hidden_GTD, output_DV, preferred_element_type=jnp.float32)
    logits_GTV = constrain(logits_GTV, ("batch", None, "vocab"))
    logsumexp_GT = jax.nn.logsumexp(logits_GTV, axis=-1)
    logit_GT = jnp.take_along_axis(logits_GTV, target_GT[..., None], axis=-1)[..., 0]
    return logsumexp_GT - logit_GT, logits_GTV, logsumexp_GT


def _sum(loss_BL: Array, mask_BL: Array | None) -> Array:
    return jnp.sum(loss_BL if mask_BL is None else jnp.where(mask_BL, loss_BL, 0.0))


def _over_chunks(
    function: Callable[..., tuple[PyTree, PyTree]], arrays: tuple[Array, ...], output_DV: Array
) -> PyTree:
    """(the sum, the others joined) of ``function(*chunk, output)``'s results over chunks of ``arrays`` [B, L, ...].

    A chunk is [G, T, ...], G being the parts that a mesh divides the batch into: what is computed for each part stays
    on its devices, and what is added up over chunks crosses between devices once.
    """
    B, L = arrays[0].shape[:2]
    rows, _, width = _on_a_device(("batch", None, "vocab"), (B, L, output_DV.shape[1]))
    num_chunks = -(-L // max(1, LOGITS_BYTES // (4 * rows * width)))
    length = -(-L // num_chunks)
    # Gathered once, not in each chunk.
    output_DV = constrain(output_DV.astype(arrays[0].dtype), (None, "vocab"))

    def split(x_BL: Array) -> Array:
        """[B, L, ...] -> [chunks, G, T, ...], with zeros behind the last positions."""
        rest = x_BL.shape[2:]
        x_BL = jnp.pad(x_BL, ((0, 0), (0, num_chunks * length - L), *((0, 0) for _ in rest)))
        chunks = jnp.moveaxis(x_BL.reshape(B // rows, rows, num_chunks, length, *rest), 2, 0)
        chunks = chunks.reshape(num_chunks, B // rows, rows * length, *rest)
        return constrain(chunks, (None, "batch", None, *(None for _ in rest)))

    def join(chunks: Array) -> Array:
        rest = chunks.shape[3:]
        x_BL = jnp.moveaxis(chunks.reshape(num_chunks, B // rows, rows, length, *rest), 0, 2)
        return constrain(x_BL.reshape(B, num_chunks * length, *rest)[:, :L], ("batch", None, *(None for _ in rest)))

    chunks = jax.tree.map(split, arrays)
    if num_chunks == 1:
        total, others = function(*(each[0] for each in chunks), output_DV)
        return total, jax.tree.map(lambda each: join(each[None]), others)

    def add(total: PyTree, chunk: tuple[Array, ...]) -> tuple[PyTree, PyTree]:
        more, others = function(*chunk, output_DV)
        return jax.tree.map(jnp.add, total, more), others

    shapes, _ = jax.eval_shape(function, *(each[0] for each in chunks), output_DV)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, others = jax.lax.scan(add, zeros, chunks)
    return total, jax.tree.map(join, others)


def _on_a_device(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The part of an array of these logical axes that one device of the mesh in use holds."""
    mesh = jax.sharding.get_abstract_mesh()
    return shape if mesh.empty else NamedSharding(mesh, spec(axes, shape, mesh)).shard_shape(shape)
