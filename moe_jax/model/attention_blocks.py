"""Causal attention in blocks of queries: one block's scores in memory at a time, and none of the keys after it.

The idea of FlashAttention (arXiv 2205.14135, section 3.1) without its inner loop: the forward pass keeps the output
and each query's log-sum-exp, from which the backward pass computes a block's weights anew.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.axes import Array

BLOCK = 64
"""Queries of a block at least: fewer rows make matrix products slow. Also where blocks begin to gain on a CPU."""
_MOST_BLOCKS, _LARGEST = 8, 512
"""The loop over blocks is unrolled, as each sees another number of keys: so many, unless they would be larger."""
NAME = "attention_blocks"
"""The name, for rematerialisation policies, of what is kept for the backward pass."""


def attend_in_blocks(query_BLHA: Array, key_BLJA: Array, value_BLJA: Array, segment_BL: Array | None = None) -> Array:
    """``attend`` where query l sees the keys up to its own place, of its own segment alone where there are segments.

    Scores, softmax and sums are in float32, factors of products in the type of the query. Only differentiable once.

    Returns:
      [B, L, H, A] in the type of the query.
    """
    B, L, H, A = query_BLHA.shape
    J = key_BLJA.shape[2]
    # Heads first; the H/J query heads that read one key/value head stay an axis of their own (G).
    query_BJGLA = (query_BLHA * A**-0.5).reshape(B, L, J, H // J, A).transpose(0, 2, 3, 1, 4)
    key_BJLA, value_BJLA = (jnp.swapaxes(x, 1, 2) for x in (key_BLJA, value_BLJA))
    out_BJGLA = _attend(query_BJGLA, key_BJLA, value_BJLA, segment_BL)
    return out_BJGLA.transpose(0, 3, 1, 2, 4).reshape(B, L, H, A)


def _spans(L: int) -> list[tuple[int, int]]:
    """First and last place, plus one, of each block of queries."""
    size = max(BLOCK, min(_LARGEST, -(-L // _MOST_BLOCKS)))
    return [(start, min(L, start + size)) for start in range(0, L, size)]


def _rows(x_BJGLA: Array, start: int, stop: int) -> Array:
    """A block's queries of all heads that read one key/value head, or what belongs to them: [B, J, G · block, A]."""
    B, J, _, _, A = x_BJGLA.shape
    return x_BJGLA[:, :, :, start:stop].reshape(B, J, -1, A)


def _seen(segment_BL: Array | None, start: int, stop: int) -> Array:
    """[B or 1, block, stop]: True where a query of the block sees the key."""
    is_seen_1QM = (jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :])[None]
    if segment_BL is None:
        return is_seen_1QM
    return is_seen_1QM & (segment_BL[:, start:stop, None] == segment_BL[:, None, :stop])


@jax.custom_vjp
def _attend(query_BJGLA: Array, key_BJLA: Array, value_BJLA: Array, segment_BL: Array | None) -> Array:
    return _forward(query_BJGLA, key_BJLA, value_BJLA, segment_BL)[0]


def _forward(
    query_BJGLA: Array, key_BJLA: Array, value_BJLA: Array, segment_BL: Array | None
) -> tuple[Array, tuple[Array | None, ...]]:
    dtype, outs, logsumexps = query_BJGLA.dtype, [], []
    for start, stop in _spans(query_BJGLA.shape[3]):
        query, key, value = _rows(query_BJGLA, start, stop), key_BJLA[:, :, :stop], value_BJLA[:, :, :stop]
        score = _product(query, _transposed(key))
        score_BJGQM = score.reshape(*query_BJGLA.shape[:3], stop - start, stop)
        score = jnp.where(_seen(segment_BL, start, stop)[:, None, None], score_BJGQM, -1e30).reshape(score.shape)
        most = jnp.max(score, axis=-1, keepdims=True)
        weight = jnp.exp(score - most)
        total = jnp.sum(weight, axis=-1, keepdims=True)
        out = (_product(weight.astype(dtype), value) / total).astype(dtype)
        for parts, part in ((outs, out), (logsumexps, most + jnp.log(total))):
            parts.append(part.reshape(*query_BJGLA.shape[:3], stop - start, -1))
    kept = jnp.concatenate(outs, axis=3), jnp.concatenate(logsumexps, axis=3)
    out_BJGLA, logsumexp_BJGL1 = checkpoint_name(kept, NAME)
    return out_BJGLA, (query_BJGLA, key_BJLA, value_BJLA, segment_BL, out_BJGLA, logsumexp_BJGL1)


def _backward(residuals: tuple, dout_BJGLA: Array) -> tuple[Array, Array, Array, None]:
    query_BJGLA, key_BJLA, value_BJLA, segment_BL, out_BJGLA, logsumexp_BJGL1 = residuals
    dtype, L = query_BJGLA.dtype, query_BJGLA.shape[3]
    # What a query's weights lose to their own softmax: sum_m weight_m dweight_m = out . dout.
    mean_BJGL1 = jnp.sum(out_BJGLA.astype(jnp.float32) * dout_BJGLA.astype(jnp.float32), axis=-1, keepdims=True)
    dqueries: list[Array] = []
    dkey_BJLA = dvalue_BJLA = jnp.zeros(key_BJLA.shape, jnp.float32)

    def up_to_end(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, L - x.shape[2]), (0, 0)))

    # Scores lie transposed, [keys, queries]: then no product needs the transposition of anything as large as they are.
    for start, stop in _spans(L):
        query, dout, mean, logsumexp = (
            _rows(x, start, stop) for x in (query_BJGLA, dout_BJGLA, mean_BJGL1, logsumexp_BJGL1)
        )
        key, value = key_BJLA[:, :, :stop], value_BJLA[:, :, :stop]
        score = _product(key, _transposed(query))
        is_seen_BMQ = _transposed(_seen(segment_BL, start, stop))
        score_BJMGQ = score.reshape(*key.shape[:3], -1, stop - start)
        score = jnp.where(is_seen_BMQ[:, None, :, None], score_BJMGQ, -1e30).reshape(score.shape)
        weight = jnp.exp(score - _transposed(logsumexp))
        dscore = (weight * (_product(value, _transposed(dout)) - _transposed(mean))).astype(dtype)
        dquery = _transposed(_product(_transposed(key), dscore)).astype(dtype)
        dqueries.append(dquery.reshape(*query_BJGLA.shape[:3], stop - start, -1))
        dkey_BJLA += up_to_end(_product(dscore, query))
        dvalue_BJLA += up_to_end(_product(weight.astype(dtype), dout))
    return jnp.concatenate(dqueries, axis=3), dkey_BJLA.astype(dtype), dvalue_BJLA.astype(dtype), None


def _product(first: Array, second: Array) -> Array:
    return jnp.matmul(first, second, preferred_element_type=jnp.float32)


def _transposed(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


_attend.defvjp(_forward, _backward)
