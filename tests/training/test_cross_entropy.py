"""The loss in chunks of positions: values and gradients of the naive one, and what the compiled program holds."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig
from moe_jax.estimate.collectives import collectives
from moe_jax.estimate.program import operations, shapes_in
from moe_jax.model.decoder import Decoder, Variables
from moe_jax.sharding.mesh import make_mesh, put_batch, use_mesh
from moe_jax.training import cross_entropy as module
from moe_jax.training.cross_entropy import cross_entropy
from moe_jax.training.optimizer import make_optimizer, make_schedule
from moe_jax.training.state import abstract_state, init_state
from moe_jax.training.step import eval_step, gradient
from tests.oracles.moe import on_cpu
from tests.tiny import change

B, L, D, V = 3, 7, 8, 11
POSITION = 4 * B * V
"""Bytes of the logits of one position of each row."""


def naive(hidden_BLD, output_DV, target_BL, mask_BL, count):
    """All at once, in float32, of factors in the type of the activations."""
    factors = (each.astype(hidden_BLD.dtype).astype(jnp.float32) for each in (hidden_BLD, output_DV))
    logits_BLV = jnp.matmul(*factors)
    probs_BLV = jnp.exp(logits_BLV) / jnp.sum(jnp.exp(logits_BLV), axis=-1, keepdims=True)
    chosen_BL = jnp.sum(probs_BLV * jax.nn.one_hot(target_BL, V), axis=-1)
    loss_BL = -jnp.log(chosen_BL)
    return jnp.sum(loss_BL if mask_BL is None else loss_BL * mask_BL) / count


def example(rows=B, length=L, dtype=jnp.float32, masked=True):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden_BLD = jax.random.normal(keys[0], (rows, length, D)).astype(dtype)
    mask_BL = jax.random.bernoulli(keys[3], 0.6, (rows, length)) if masked else None
    target_BL = jax.random.randint(keys[2], (rows, length), 0, V)
    return hidden_BLD, jax.random.normal(keys[1], (D, V)), target_BL, mask_BL, jnp.float32(5)


def assert_near(got, want, tolerance):
    got, want = (np.asarray(each, np.float32) for each in (got, want))
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


CHUNKS = {"whole": 2**29, "three positions, which do not divide seven": 3 * POSITION, "one position": 1}


@pytest.mark.parametrize("limit", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 5e-3)])
def test_values_and_gradients_are_those_of_the_naive_loss(monkeypatch, dtype, tolerance, masked, limit):
    monkeypatch.setattr(module, "LOGITS_BYTES", limit)
    arguments = example(dtype=jnp.dtype(dtype), masked=masked)
    got, want = (jax.jit(jax.value_and_grad(each, argnums=(0, 1)))(*arguments) for each in (cross_entropy, naive))
    assert got[1][0].dtype == jnp.dtype(dtype)
    assert got[1][1].dtype == jnp.float32
    for mine, its in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_near(mine, its, tolerance)
    assert_near(jax.jit(cross_entropy)(*arguments), want[0], tolerance)


def test_over_chunks_the_gradient_of_the_output_adds_up_in_float32(monkeypatch):
    arguments, gradients = example(dtype=jnp.bfloat16), []
    for limit in (2**29, 1):
        monkeypatch.setattr(module, "LOGITS_BYTES", limit)
        gradients.append(jax.jit(jax.grad(cross_entropy, argnums=1))(*arguments))
    assert_near(*gradients, 1e-6)


@pytest.mark.parametrize("limit", [2**29, 1])
def test_one_token_none_at_all_and_a_loss_that_is_weighted_from_outside(monkeypatch, limit):
    monkeypatch.setattr(module, "LOGITS_BYTES", limit)

    def weighted(function):
        return jax.jit(jax.value_and_grad(lambda *arguments: 3 * function(*arguments), argnums=(0, 1)))

    one = example(1, 1, masked=False)
    for mine, its in zip(*(jax.tree.leaves(weighted(each)(*one)) for each in (cross_entropy, naive)), strict=True):
        assert_near(mine, its, 1e-6)
    hidden_BLD, output_DV, target_BL, _, count = example()
    none = weighted(cross_entropy)(hidden_BLD, output_DV, target_BL, jnp.zeros((B, L), bool), count)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(none))


@pytest.mark.parametrize("limit", [2**29, 2 * POSITION])
def test_logits_of_ten_thousand_overflow_nothing(monkeypatch, limit):
    monkeypatch.setattr(module, "LOGITS_BYTES", limit)
    hidden_BLD, output_DV, *others = example()
    arguments = (1e4 * hidden_BLD, output_DV, *others)
    loss, gradients = jax.jit(jax.value_and_grad(cross_entropy, argnums=(0, 1)))(*arguments)
    assert 1e3 < loss < 1e6
    assert all(np.all(np.isfinite(leaf)) for leaf in gradients)


# The whole step

BATCH, LONG, WIDTH, TOKENS = 16, 24, 16, 96
DENSE = Config(
    model=ModelConfig(context_length=LONG, num_layers=1, embed_dim=WIDTH, num_heads=4, mlp_dim=16),
    data=DataConfig(batch_size=BATCH),
    optimizer=OptimizerConfig(warmup_steps=0),
)
DENSE = change(DENSE, moe={"num_experts": 0})


def batch(vocab_size=TOKENS):
    tokens = np.random.default_rng(0).integers(0, vocab_size, (BATCH, LONG + 1)).astype(np.int32)
    mask = np.arange(LONG)[None, :] < 1 + np.arange(BATCH)[:, None] * 2
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}


def prepared(config, sizes, vocab_size=TOKENS):
    decoder = Decoder(on_cpu(config.model, train=True), vocab_size)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, 10))
    return decoder, optimizer, make_mesh(MeshConfig(**sizes), config.model, BATCH)


def first_gradient(config, sizes, vocab_size=TOKENS):
    decoder, optimizer, mesh = prepared(config, sizes, vocab_size)
    with use_mesh(mesh):
        state = init_state(decoder, optimizer, mesh, seed=0)
        rows = put_batch(batch(vocab_size), mesh)
        return jax.device_get(jax.jit(functools.partial(gradient, config, decoder))(state, rows))


@functools.cache
def at_once(config, vocab_size):
    return first_gradient(config, {"data": 1}, vocab_size)


@pytest.mark.parametrize(
    ("tied", "accumulation", "vocab_size", "sizes"),
    [
        (False, 2, TOKENS, {"data": 1}),
        (True, 2, TOKENS, {"data": 1, "fsdp": 2, "tensor": 2}),
        (False, 1, 95, {"data": 2, "fsdp": 2, "tensor": 2}),  # a vocabulary that two devices do not divide
        pytest.param(True, 1, TOKENS, {"data": 1}, marks=pytest.mark.slow),
        pytest.param(False, 1, TOKENS, {"data": 4, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_step_in_chunks_has_the_gradient_of_one_at_once(monkeypatch, tied, accumulation, vocab_size, sizes):
    config = change(DENSE, model={"tie_embeddings": tied})
    want = at_once(config, vocab_size)
    config = change(config, optimizer={"accumulation_steps": accumulation})
    rows, width = BATCH // accumulation // math.prod(sizes.values()), vocab_size
    if sizes.get("tensor") == 2 and vocab_size == TOKENS:
        rows, width = 2 * rows, width // 2
    monkeypatch.setattr(module, "LOGITS_BYTES", 4 * rows * width * 7)  # four chunks of six positions
    got = first_gradient(config, sizes, vocab_size)
    for (path, leaf), expected in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        distance = np.linalg.norm(leaf - expected)
        assert distance <= 1e-5 * np.linalg.norm(expected), jax.tree_util.keystr(path)


def test_an_evaluation_in_chunks_has_the_same_numbers(monkeypatch):
    decoder, optimizer, mesh = prepared(DENSE, {"data": 1})
    variables = Variables(init_state(decoder, optimizer, mesh, seed=0).params)
    outputs = []
    for limit in (2**29, 5000):
        monkeypatch.setattr(module, "LOGITS_BYTES", limit)
        outputs.append(jax.jit(functools.partial(eval_step, decoder))(variables, batch()))
    whole, chunked = outputs
    assert chunked.num_tokens == whole.num_tokens
    np.testing.assert_allclose(chunked.loss, whole.loss, rtol=1e-6)


def compiled(sizes, limit, monkeypatch):
    """The gradient of a step as compiled, and its mesh."""
    monkeypatch.setattr(module, "LOGITS_BYTES", limit)
    decoder, optimizer, mesh = prepared(DENSE, sizes, 508)
    with use_mesh(mesh):
        state, rows = abstract_state(decoder, optimizer, mesh), put_batch(batch(508), mesh)
        placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), (state, rows)
        )
        return jax.jit(functools.partial(gradient, DENSE, decoder)).lower(*placed).compile(), mesh


@pytest.mark.parametrize(
    ("sizes", "parts", "divided"),
    [({"data": 1}, 1, 1), ({"data": 8}, 8, 1), ({"data": 1, "fsdp": 2, "tensor": 4}, 2, 4)],
)
def test_no_device_holds_all_logits_and_the_gradient_of_the_output_crosses_once(monkeypatch, sizes, parts, divided):
    rows, width, chunks = BATCH // parts, 508 // divided, 8
    whole, _ = compiled(sizes, 2**29, monkeypatch)
    chunked, mesh = compiled(sizes, 4 * rows * width * LONG // chunks, monkeypatch)

    def largest(program):
        """Of the arrays that have the vocabulary as an axis, or as part of one: 508 is 4 times the prime 127."""
        shapes = {lengths for dtype, lengths in shapes_in(program.as_text()) if dtype == "f32"}
        return max(math.prod(lengths) for lengths in shapes if math.prod(lengths) % 127 == 0)

    logits = rows * LONG * width
    assert largest(whole) == logits
    assert largest(chunked) == max(logits // chunks, WIDTH * width), "a chunk's logits, or the matrix"
    memory = [program.memory_analysis().temp_size_in_bytes for program in (whole, chunked)]
    assert memory[0] - memory[1] > 0.7 * 4 * logits
    # As many operations as at once: each product is made once.
    flops = [sum(each.flops * each.times for each in operations(program.as_text())) for program in (whole, chunked)]
    assert flops[1] == pytest.approx(flops[0], rel=1e-3)
    if parts > 1:
        large = [each for each in collectives(chunked.as_text(), mesh) if each.num_bytes >= 4 * WIDTH * width // 4]
        matrices = [each for each in large if any(width in lengths for _, lengths in each.shapes)]
        assert matrices
        assert {each.times for each in matrices} == {1}
