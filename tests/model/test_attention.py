"""Attention and its parts against naive loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model import attention_blocks
from moe_jax.model.attention import LayerCache, attend, cache_mask, causal_mask, write_cache
from moe_jax.model.attention_blocks import attend_in_blocks
from moe_jax.model.layers import float32_product, layer_normalise, rms_normalise
from moe_jax.model.rotary import rotate, rotation_at, rotation_in_row
from tests.oracles.programs import equations_of

B, L, H, A = 2, 7, 4, 6


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("J", [4, 2, 1])
def test_attention_equals_a_loop_over_heads_and_positions(J):
    query, key, value = normal(0, B, L, H, A), normal(1, B, L, J, A), normal(2, B, L, J, A)
    mask = causal_mask(jnp.broadcast_to(jnp.arange(L), (B, L)))
    actual = attend(query, key.swapaxes(1, 2), value.swapaxes(1, 2), mask)
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    for b in range(B):
        for h in range(H):
            kv = h // (H // J)
            for position in range(L):
                scores = k[b, : position + 1, kv] @ q[b, position, h] / np.sqrt(A)
                weights = np.exp(scores - scores.max())
                expected = weights / weights.sum() @ v[b, : position + 1, kv]
                np.testing.assert_allclose(actual[b, position, h], expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("L", "block", "most_blocks", "J"), [(1, 4, 16, 4), (7, 3, 16, 2), (8, 4, 16, 4), (23, 2, 4, 2), (5, 8, 16, 1)]
)
def test_attention_in_blocks_equals_the_whole_with_gradients(monkeypatch, L, block, most_blocks, J, dtype):
    monkeypatch.setattr(attention_blocks, "BLOCK", block)
    monkeypatch.setattr(attention_blocks, "_MOST_BLOCKS", most_blocks)
    inputs = [normal(seed, B, L, heads, A).astype(dtype) for seed, heads in enumerate((H, J, J, H))]
    documents_BL = jnp.array([[0] * (L // 2) + [1] * (L - L // 2 - 1) + [2]] * B)  # the last of one token

    def whole(query, key, value, segment_BL):
        mask_BLM = causal_mask(jnp.broadcast_to(jnp.arange(L), (B, L)), segment_BL)
        return attend(query, key.swapaxes(1, 2), value.swapaxes(1, 2), mask_BLM)

    def with_gradients(function, segment_BL, query, key, value, dout):
        out, vjp = jax.vjp(lambda *inputs: function(*inputs, segment_BL), query, key, value)
        return out, *vjp(dout)

    for segment_BL in (None, documents_BL):
        want, got = (
            jax.jit(functools.partial(with_gradients, function))(segment_BL, *inputs)
            for function in (whole, attend_in_blocks)
        )
        assert {str(array.dtype) for array in got} == {dtype}
        rtol, atol = (1e-5, 3e-6) if dtype == "float32" else (2**-7, 2e-2)
        for each, expected in zip(got, want, strict=True):
            np.testing.assert_allclose(each.astype("float32"), expected.astype("float32"), rtol=rtol, atol=atol)


@pytest.mark.parametrize(("L", "sizes"), [(1, [1]), (150, [64, 64, 22]), (2048, [256] * 8), (8192, [512] * 16)])
def test_blocks_are_neither_small_nor_many_nor_large(L, sizes):
    spans = attention_blocks._spans(L)
    assert [stop - start for start, stop in spans] == sizes
    assert [start for start, _ in spans] == [0] + [stop for _, stop in spans[:-1]]


def test_attention_in_blocks_keeps_no_scores_for_the_backward_pass():
    L, block = 16, attention_blocks.BLOCK
    x = [normal(seed, 1, 4 * block, 2, L) for seed in range(3)]
    kept = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(attend_in_blocks, *x)[1], *x))
    assert max(leaf.size for leaf in kept) == x[0].size


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    x, y = normal(0, 1, 1, 1, A), normal(1, 1, 1, 1, A)

    def at(x, position):
        return rotate(x, rotation_at(jnp.asarray([[position]]), A // 2, 100.0))

    def product(i, j):
        return jnp.vdot(at(x, i), at(y, j))

    np.testing.assert_allclose(jnp.linalg.norm(at(x, 9)), jnp.linalg.norm(x), rtol=1e-6)
    np.testing.assert_allclose(product(11, 8), product(3, 0), rtol=1e-4)
    assert abs(float(product(11, 8) - product(11, 7))) > 1e-3
    # The first pair turns by one radian a token: (1, 0) at position 2 becomes (cos 2, sin 2).
    unit = jnp.zeros((1, 1, 1, A)).at[..., 0].set(1.0)
    turned = at(unit, 2)[0, 0, 0]
    np.testing.assert_allclose([turned[0], turned[A // 2]], [np.cos(2), np.sin(2)], rtol=1e-6)


@pytest.mark.parametrize("theta", [100.0, 10_000.0, 1e12])
def test_rotation_is_exact_at_any_position(theta):
    position_BL = np.array([[-1, 0, 1, 1023, 100_000, 12_345_678, 2**31 - 1]])
    x_BLHA = np.random.default_rng(0).standard_normal((1, 7, 1, 64)).astype(np.float32)
    angle_BLHA = position_BL[:, :, None, None] * theta ** (-np.arange(32) / 32)
    first, second = np.split(x_BLHA.astype(np.float64), 2, axis=-1)
    cos, sin = np.cos(angle_BLHA), np.sin(angle_BLHA)
    want = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    rotation = rotation_at(jnp.asarray(position_BL), 32, theta)
    np.testing.assert_allclose(rotate(jnp.asarray(x_BLHA), rotation), want, atol=2e-6)
    # By the tables too: NaN where they end, so that a position too many is noticed.
    rows = rotation_in_row(1024, 32, theta, jnp.asarray(position_BL))
    np.testing.assert_allclose(rotate(jnp.asarray(x_BLHA), rows)[:, 1:4], want[:, 1:4], atol=2e-6)
    assert jnp.isnan(rows.cos_BLA[0, 4:]).all()


def test_the_positions_of_a_row_are_its_places():
    plain = rotation_in_row(9, 3, 100.0)
    at_places = rotation_at(jnp.arange(9)[None], 3, 100.0)
    np.testing.assert_allclose(plain.cos_BLA, at_places.cos_BLA, atol=1e-6)
    np.testing.assert_allclose(plain.sin_BLA, at_places.sin_BLA, atol=1e-6)


def test_ring_cache_holds_the_last_positions_and_the_mask_knows_them():
    M = 4
    cache = LayerCache(jnp.zeros((1, 1, M, 1)), jnp.zeros((1, 1, M, 1)))
    for position in range(11):
        new = jnp.full((1, 1, 1, 1), float(position))
        cache = write_cache(cache, new, -new, jnp.asarray([[position]]))
        mask = cache_mask(jnp.asarray([[position]]), jnp.asarray([position]), M)[0, 0]
        visible = sorted(np.asarray(cache.key_BJMA)[0, 0, :, 0][np.asarray(mask)].tolist())
        assert visible == list(range(max(0, position - M + 1), position + 1))


def test_padding_is_not_written_to_the_cache():
    cache = LayerCache(jnp.zeros((1, 1, 4, 1)), jnp.zeros((1, 1, 4, 1)))
    keys = jnp.asarray([5.0, 6.0, 7.0]).reshape(1, 3, 1, 1)
    cache = write_cache(cache, keys, keys, jnp.asarray([[0, 1, -1]]))
    np.testing.assert_array_equal(cache.key_BJMA[0, 0, :, 0], [5, 6, 0, 0])


def test_norms_by_hand():
    x = jnp.asarray([[3.0, 4.0]])
    np.testing.assert_allclose(rms_normalise(x, jnp.asarray([1.0, 2.0])), [[3 / 12.5**0.5, 8 / 12.5**0.5]], rtol=1e-5)
    y = layer_normalise(x, jnp.ones(2), jnp.asarray([0.5, 0.0]))
    np.testing.assert_allclose(y, [[-1 + 0.5, 1.0]], rtol=1e-4)


def test_logits_are_float32_and_their_gradient_is_multiplied_in_the_type_of_the_activations():
    x, kernel, dy = normal(0, 5, 8), normal(1, 8, 3), normal(2, 5, 3)
    y, vjp = jax.vjp(float32_product, x, kernel)
    np.testing.assert_allclose(y, x @ kernel, rtol=1e-6)
    for got, want in zip(vjp(dy), (dy @ kernel.T, x.T @ dy), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    halves = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    y, vjp = jax.vjp(float32_product, *halves)
    assert y.dtype == jnp.float32
    products = [each for each in equations_of(jax.make_jaxpr(vjp)(dy).jaxpr) if each.primitive.name == "dot_general"]
    assert {str(factor.aval.dtype) for each in products for factor in each.invars} == {"bfloat16"}


@pytest.mark.gpu
@pytest.mark.parametrize(("L", "H", "J", "A"), [(256, 4, 4, 64), (1080, 4, 2, 64), (130, 2, 1, 128)])
def test_on_a_gpu_cudnns_attention_is_ours(L, H, J, A):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((2, L, H, A), (2, L, J, A), (2, L, J, A), (2, L, H, A))
    query, key, value, dout = (
        jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, shapes, strict=True)
    )

    def cudnn(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")

    def ours(query, key, value):
        return attend(query, key.swapaxes(1, 2), value.swapaxes(1, 2), causal_mask(jnp.arange(L)[None]))

    def with_gradients(function, *arguments):
        out, vjp = jax.vjp(function, *arguments)
        return out, vjp(dout.astype(out.dtype))

    with jax.default_matmul_precision("highest"):
        exact = jax.jit(with_gradients, static_argnums=0)(ours, *(x.astype(jnp.float32) for x in (query, key, value)))
    found = [jax.jit(with_gradients, static_argnums=0)(function, query, key, value) for function in (cudnn, ours)]
    for theirs, plain, want in zip(*map(jax.tree.leaves, (*found, exact)), strict=True):
        errors = [
            float(jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel())) for got in (theirs, plain)
        ]
        assert errors[0] <= 2 * errors[1]
