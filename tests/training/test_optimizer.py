"""Schedules by hand, the decay mask, clipping, and Muon against a loop over single matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.config import ModelConfig, MoEConfig, OptimizerConfig
from moe_jax.model.decoder import Decoder, Tokens
from moe_jax.training.optimizer import decay_mask, make_optimizer, make_schedule, muon_labels
from tests.oracles.moe import on_cpu

VOCAB = 23


def params_of(**model):
    """The shapes of a model's parameters."""
    config = ModelConfig(embed_dim=16, num_heads=2, num_layers=2, qk_norm=True, **model)
    decoder = Decoder(on_cpu(config), VOCAB)
    return jax.eval_shape(lambda: decoder.init(jax.random.key(0), Tokens(jnp.zeros((1, 2), jnp.int32)))["params"])


def by_name(tree):
    """(parameter, leaf), whatever layer it is in."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path).split("'")[-2], leaf) for path, leaf in leaves]


def test_decay_is_for_matrices_only():
    moe = MoEConfig(router="noisy_top_k")
    params = params_of(moe=moe, use_bias=True, positions="learned", tie_embeddings=False, norm="layernorm")
    decayed = {name for name, is_decayed in by_name(decay_mask(params)) if is_decayed}
    every = {name for name, _ in by_name(params)}
    assert decayed == {
        *("query", "key", "value", "out", "router", "router_noise", "w_up", "w_gate", "w_down", "output")
    }
    assert {"embedding", "positions", "scale", "bias", "query_bias", "b_up", "b_down", "query_norm"} <= every - decayed


# Warm-up to 10 of 110 steps, peak 1, end 0.2: half of the warm-up, the peak, places of the decay, the end and later.
@pytest.mark.parametrize(
    ("schedule", "steps", "rates"),
    [
        # Half of the cosine: 0.2 + 0.8 / 2.
        ("cosine", (0, 5, 10, 60, 110, 500), (0, 0.5, 1, 0.6, 0.2, 0.2)),
        # The last fifth is steps 88 to 110: half of it is at 99.
        ("wsd", (0, 5, 10, 60, 88, 99, 110, 500), (0, 0.5, 1, 1, 1, 0.6, 0.2, 0.2)),
        # From 1/25, by a cosine: half of the way up is 0.04 + 0.96 / 2.
        ("onecycle", (0, 5, 10, 60, 110, 500), (0.04, 0.52, 1, 0.6, 0.2, 0.2)),
        ("constant", (0, 5, 10, 60, 110, 500), (0, 0.5, 1, 1, 1, 1)),
    ],
)
def test_schedules_by_hand(schedule, steps, rates):
    made = make_schedule(
        OptimizerConfig(schedule=schedule, learning_rate=1.0, warmup_steps=10, final_fraction=0.2), 110
    )
    np.testing.assert_allclose([made(step) for step in steps], rates, atol=1e-6)
    # Under jit, as the optimizer calls it.
    np.testing.assert_allclose(jax.jit(jax.vmap(made))(jnp.array(steps)), rates, atol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "onecycle", "constant"])
def test_no_warm_up_starts_at_the_peak(schedule):
    made = make_schedule(OptimizerConfig(schedule=schedule, learning_rate=1.0, warmup_steps=0), 100)
    np.testing.assert_allclose(made(0), 1.0)


def test_a_decay_over_all_steps_leaves_the_warm_up_whole():
    config = OptimizerConfig(schedule="wsd", learning_rate=1.0, warmup_steps=10, decay_fraction=1.0, final_fraction=0)
    np.testing.assert_allclose(
        [make_schedule(config, 110)(step) for step in (5, 10, 60, 110)], [0.5, 1, 0.5, 0], atol=1e-6
    )


@pytest.mark.parametrize(("element", "norm"), [(100.0, 0.5), (0.1, 0.2), (0.0, 0.0)])
def test_clipping_bounds_the_gradient_that_adam_sees(element, norm):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, warmup_steps=0, clip_norm=0.5), lambda step: 1.0)
    params = {"w_up": jnp.zeros(4)}
    _, state = optimizer.update({"w_up": jnp.full(4, element)}, optimizer.init(params), params)
    # After one step mu = (1 - b1) * clipped gradient.
    clipped_norm = optax.tree.norm(optax.tree.get(state, "mu")) / (1 - 0.9)
    np.testing.assert_allclose(clipped_norm, norm, rtol=1e-5)


def naive_muon(param, gradients, config):
    """One matrix after steps on ``gradients`` (arXiv 2502.16982, algorithm 1), its mean of gradients unbiased."""
    mean, beta = np.zeros_like(param), config.muon_beta
    for step, gradient in enumerate(gradients, start=1):
        mean = beta * mean + (1 - beta) * gradient
        ahead = beta * mean / (1 - beta ** (step + 1)) + (1 - beta) * gradient / (1 - beta**step)
        x = ahead if ahead.shape[0] <= ahead.shape[1] else ahead.T
        x = x / np.linalg.norm(x)
        for _ in range(5):
            y = x @ x.T
            x = 3.4445 * x + (-4.7750 * y + 2.0315 * y @ y) @ x
        x = x if ahead.shape[0] <= ahead.shape[1] else x.T
        update = 0.2 * np.sqrt(max(param.shape)) * x + config.weight_decay * param
        param = param - config.learning_rate * update
    return param


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (8, 8)])
def test_muon_is_that_of_each_layers_and_experts_matrix_alone(shape):
    random = np.random.default_rng(0)
    # [N, E, D, F], as the layers are stacked; the experts' gradients differ by orders of magnitude.
    scale = np.array([1e-3, 1.0, 1e3], np.float32)[None, :, None, None]
    param = random.normal(size=(2, 3, *shape)).astype(np.float32)
    gradients = [(random.normal(size=param.shape) * scale).astype(np.float32) for _ in range(3)]
    config = OptimizerConfig(
        name="muon", schedule="constant", learning_rate=0.1, warmup_steps=0, weight_decay=0.5, clip_norm=None
    )
    optimizer = make_optimizer(config, make_schedule(config, 10))
    params = {"moe": {"w_up": jnp.asarray(param), "router": jnp.ones((2, shape[0], 3))}}
    state = optimizer.init(params)
    for gradient in gradients:
        tree = {"moe": {"w_up": jnp.asarray(gradient), "router": jnp.zeros((2, shape[0], 3))}}
        updates, state = jax.jit(optimizer.update)(tree, state, params)
        params = optax.apply_updates(params, updates)
    for layer in range(2):
        for expert in range(3):
            alone = naive_muon(param[layer, expert], [gradient[layer, expert] for gradient in gradients], config)
            np.testing.assert_allclose(params["moe"]["w_up"][layer, expert], alone, rtol=2e-3, atol=2e-4)


def test_muon_trains_hidden_matrices_and_adamw_the_rest():
    moe = MoEConfig(router="noisy_top_k", num_shared_experts=1)
    labels = by_name(muon_labels(params_of(moe=moe, use_bias=True, tie_embeddings=False)))
    by_muon = {name for name, label in labels if label == "muon"}
    assert by_muon == {"query", "key", "value", "out", "w_up", "w_gate", "w_down"}
    assert {"adamw"} == {label for _, label in labels} - {"muon"}


def test_the_rest_of_muon_is_adamw_to_the_bit():
    params = {"embedding": jnp.ones((5, 4)), "moe": {"router": jnp.ones((4, 3)), "w_up": jnp.ones((3, 4, 6))}}
    gradients = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), params)
    moved = {}
    for name in ("muon", "adamw"):
        optimizer = make_optimizer(OptimizerConfig(name=name, clip_norm=None), lambda step: 0.1)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        moved[name] = updates
    np.testing.assert_array_equal(moved["muon"]["embedding"], moved["adamw"]["embedding"])
    np.testing.assert_array_equal(moved["muon"]["moe"]["router"], moved["adamw"]["moe"]["router"])
    assert not np.array_equal(moved["muon"]["moe"]["w_up"], moved["adamw"]["moe"]["w_up"])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_mean_of_gradients_in_bfloat16_is_kept_so_and_nothing_else_is(name):
    params = {"embedding": jnp.ones((5, 4)), "moe": {"router": jnp.ones((4, 3)), "w_up": jnp.ones((3, 4, 6))}}
    keys = jax.random.split(jax.random.key(0), 5)
    all_gradients = [jax.tree.map(lambda leaf, key=key: jax.random.normal(key, leaf.shape), params) for key in keys]
    updates = {}
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(OptimizerConfig(name=name, mu_dtype=dtype), lambda step: 0.1)
        state = optimizer.init(params)
        for gradients in all_gradients:
            updates[dtype], state = jax.jit(optimizer.update)(gradients, state, params)
        leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]
        assert [leaf.dtype.name for path, leaf in leaves if ".mu" in path] == [dtype] * 3
        assert all(leaf.dtype in (jnp.float32, jnp.int32) for path, leaf in leaves if ".mu" not in path)
    for got, want in zip(jax.tree.leaves(updates["bfloat16"]), jax.tree.leaves(updates["float32"]), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=0.1, atol=2e-3)
        assert not np.array_equal(got, want)
