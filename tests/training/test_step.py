"""The optimizer step: accumulation, devices and the meaning of its losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Config, DataConfig, MeshConfig, ModelConfig, MoEConfig, OptimizerConfig
from moe_jax.config.rules import check
from moe_jax.model.decoder import Decoder, Tokens, Variables
from moe_jax.sharding.mesh import make_mesh, put_batch, use_mesh
from moe_jax.training.diagnosis import find_not_finite, finite_by_layer, first_bad_gradient
from moe_jax.training.optimizer import make_optimizer, make_schedule
from moe_jax.training.state import init_state
from moe_jax.training.step import eval_step, train_step
from tests.oracles.moe import on_cpu
from tests.tiny import change

VOCAB, L, BATCH = 23, 12, 16
CONFIG = Config(
    model=ModelConfig(
        context_length=L,
        num_layers=2,
        embed_dim=16,
        num_heads=2,
        dropout_rate=0.1,
        moe=MoEConfig(
            num_experts=4,
            expert_dim=12,
            router="noisy_top_k",
            capacity_factor=1.0,
            load_balancing_weight=0.1,
            importance_weight=0.1,
            router_z_weight=0.1,
        ),
    ),
    data=DataConfig(batch_size=BATCH),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, clip_norm=0.1),
)


def batch():
    tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, L + 1)).astype(np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def two_steps(config, devices=1, made=None):
    """(variables after two steps on the batch ``made``, outputs of both)."""
    check(config)
    made = batch() if made is None else made
    decoder = Decoder(on_cpu(config.model, train=True), VOCAB)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, 10))
    mesh = make_mesh(MeshConfig(data=devices), config.model, BATCH // config.optimizer.accumulation_steps)
    with use_mesh(mesh):
        state = init_state(decoder, optimizer, mesh, seed=0)
        step = jax.jit(functools.partial(train_step, config, decoder, optimizer))
        state, first = step(state, put_batch(made, mesh))
        state, second = step(state, put_batch(made, mesh))
    return jax.device_get((state.variables, (first, second)))


@pytest.fixture(scope="module")
def reference():
    return two_steps(CONFIG)


def assert_same_training(actual, expected):
    for got, want in zip(jax.tree.leaves(actual[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)
    for got, want in zip(jax.tree.leaves(actual[0]), jax.tree.leaves(expected[0]), strict=True):
        # Adam's first steps divide a gradient by its own size, which blows up rounding where it is near zero.
        assert np.mean(np.abs(got - want) > 1e-5) < 0.01


@pytest.mark.slow  # test_eight_devices_with_accumulation_equal_one is its like
@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_changes_nothing_though_there_is_dropout_noise_and_dropping(reference, accumulation):
    assert_same_training(two_steps(change(CONFIG, optimizer={"accumulation_steps": accumulation})), reference)


@pytest.mark.slow  # test_eight_devices_with_accumulation_equal_one is its like
def test_eight_devices_equal_one(reference):
    assert_same_training(two_steps(CONFIG, devices=8), reference)


def test_eight_devices_with_accumulation_equal_one(reference):
    assert float(reference[1][0].routing.dropped_N.sum()) > 0
    assert_same_training(two_steps(change(CONFIG, optimizer={"accumulation_steps": 2}), devices=8), reference)


@pytest.mark.slow  # tests/model/moe/test_layer.py compares their values and gradients
def test_einsum_trains_as_gather_does(reference):
    assert_same_training(two_steps(change(CONFIG, moe={"dispatch": "einsum"})), reference)


@pytest.fixture(scope="module")
def one_step():
    """A new state, the function of a state that makes one step, and the one that looks for what is not finite."""
    config = change(CONFIG, moe={"router": "sigmoid_bias", "router_z_weight": 0.0})
    decoder = Decoder(on_cpu(config.model, train=True), VOCAB)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, 10))
    step = jax.jit(functools.partial(train_step, config, decoder, optimizer))
    mesh = make_mesh(MeshConfig(data=1), CONFIG.model, BATCH)

    def make(state):
        with use_mesh(mesh):
            return step(state, put_batch(batch(), mesh))

    def find(state):
        with use_mesh(mesh):
            return find_not_finite(config, decoder, state, put_batch(batch(), mesh))

    with use_mesh(mesh):
        return init_state(decoder, optimizer, mesh, seed=0), make, find


def changed_weight(name, layer, value):
    def poison(params):
        block = params["periods"]["block_0"]
        moe = {**block["moe"], name: block["moe"][name].at[layer].set(value)}
        return {**params, "periods": {"block_0": {**block, "moe": moe}}}

    return poison


def test_a_step_without_a_finite_loss_changes_nothing_and_says_which_layer_was_first(one_step):
    new, make, find = one_step
    state = new.replace(params=changed_weight("w_up", 1, jnp.nan)(new.params))
    after, output = make(state)
    assert not output.is_finite
    assert int(after.step) == int(state.step) + 1
    for got, want in zip(jax.tree.leaves(after.replace(step=0)), jax.tree.leaves(state.replace(step=0)), strict=True):
        np.testing.assert_array_equal(got, want)
    assert find(state) == "the loss was not finite: the output of layer 1 was the first"


def test_a_fault_that_does_not_happen_again_is_said_to_be_one_of_the_machine(one_step):
    state, _, find = one_step
    assert find(state) == "everything was finite when it was made again, so suspect the machine"


def test_an_ordinary_step_is_finite_and_moves_everything(one_step):
    state, make, _ = one_step
    after, output = make(state)
    assert output.is_finite
    for name in ("params", "expert_bias_NE", "optimizer_state"):
        pairs = zip(jax.tree.leaves(getattr(after, name)), jax.tree.leaves(getattr(state, name)), strict=True)
        assert all(np.any(got != want) for got, want in pairs), name


def first_bad(gradients):
    return first_bad_gradient(CONFIG, finite_by_layer(CONFIG, gradients))


def test_the_first_bad_gradient_is_that_of_the_layer_nearest_to_the_loss(reference):
    params = jax.tree.map(jnp.zeros_like, reference[0].params)
    assert first_bad(params) is None
    first = changed_weight("w_down", 0, jnp.inf)(params)
    assert first_bad(first) == "layer 0 moe w_down"
    both = changed_weight("router", 1, jnp.nan)(first)
    assert first_bad(both) == "layer 1 moe router"
    assert first_bad({**both, "final_norm": {"scale": jnp.array([jnp.nan])}}) == "final norm scale"
    assert first_bad({**params, "embedding": jnp.array([jnp.nan])}) == "embedding"


LOSSES = {"load_balancing_weight": 0.1, "importance_weight": 0.1, "router_z_weight": 0.1}
VARIANTS = {
    # (settings of the layer, devices, accumulation). The dropless ones are sorted by each device for itself.
    "sigmoid_bias": (
        {"router": "sigmoid_bias", "num_shared_experts": 1, "bias_update_rate": 0.1, "router_z_weight": 0.0},
        8,
        2,
    ),
    "quantile": ({"router": "sigmoid_bias", "bias_update": "quantile"}, 8, 2),
    "switch": ({"router": "switch", "top_k": 1, "router_jitter": 0.1, "load_balancing_scope": "batch"}, 4, 1),
    "expert_choice": ({"router": "expert_choice", "capacity_factor": 1.0}, 4, 2),
}


@pytest.mark.slow  # tests/training/test_meshes.py has two of them on eight devices
@pytest.mark.parametrize("router", VARIANTS)
def test_devices_accumulation_and_remat_change_no_router(router):
    moe, devices, accumulation = VARIANTS[router]
    config = change(CONFIG, model={"moe": MoEConfig(num_experts=4, expert_dim=12, **LOSSES | moe)})
    divided = change(config, model={"remat": "full"}, optimizer={"accumulation_steps": accumulation})
    divided = two_steps(divided, devices)
    expected = two_steps(config)
    assert_same_training(divided, expected)
    variables, (first, second) = expected
    if router == "sigmoid_bias":
        # Twice up or down by the rate, by the whole batch's load of each step; centred; untouched by the optimizer.
        moved = [np.sign(out.routing.load_NE.mean(1, keepdims=True) - out.routing.load_NE) for out in (first, second)]
        centred = sum(moved) - sum(moved).mean(1, keepdims=True)
        np.testing.assert_allclose(variables.expert_bias_NE, 0.1 * centred, rtol=1e-5, atol=1e-8)
        assert np.any(moved[0])
        np.testing.assert_array_equal(variables.expert_bias_NE, divided[0].expert_bias_NE)
    elif router == "quantile":
        assert first.routing.load_NE.max() > 1.2 * first.routing.load_NE.mean()
        assert np.all(variables.expert_bias_NE.std(axis=1) > 0.001)
        np.testing.assert_allclose(variables.expert_bias_NE, divided[0].expert_bias_NE, atol=1e-5)
    else:
        assert variables.expert_bias_NE is None


def test_the_reported_loss_is_the_language_model_loss_alone():
    moe = {"router": "top_k", "load_balancing_weight": 50.0, "capacity_factor": None}
    config = change(CONFIG, model={"dropout_rate": 0.0}, moe=moe)
    decoder = Decoder(on_cpu(config.model, train=True), VOCAB)
    mesh = make_mesh(MeshConfig(data=1), CONFIG.model, BATCH)
    with use_mesh(mesh):
        optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, 10))
        state = init_state(decoder, optimizer, mesh, seed=0)
        params = state.params
        _, first = jax.jit(functools.partial(train_step, config, decoder, optimizer))(state, put_batch(batch(), mesh))
        logits = jax.jit(decoder.apply)({"params": params}, Tokens(batch()["inputs"])).logits_BLV
        everything = {**batch(), "mask": np.ones((BATCH, L), bool)}
        evaluated = jax.jit(functools.partial(eval_step, decoder))(Variables(params), everything)
    log_probs = jax.nn.log_softmax(logits)
    expected = -np.mean(np.take_along_axis(np.asarray(log_probs), batch()["targets"][..., None], axis=-1))
    np.testing.assert_allclose(first.loss, expected, rtol=1e-5)
    np.testing.assert_allclose(evaluated.loss / evaluated.num_tokens, expected, rtol=1e-5)


def test_a_bias_by_quantile_is_frozen_in_evaluation_and_its_counts_stay_in_the_step():
    moe = MoEConfig(num_experts=4, expert_dim=12, router="sigmoid_bias", bias_update="quantile")
    config = change(CONFIG, model={"moe": moe})
    variables, (first, _) = two_steps(config)
    assert first.routing.reach_NEQ is None
    rows = {**batch(), "mask": np.ones((BATCH, L), bool)}
    by_quantile, by_sign = (
        jax.jit(functools.partial(eval_step, Decoder(on_cpu(each.model), VOCAB)))(variables, rows)
        for each in (config, change(config, moe={"bias_update": "sign"}))
    )
    assert by_quantile.routing.reach_NEQ is None
    for got, want in zip(jax.tree.leaves(by_quantile), jax.tree.leaves(by_sign), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_the_gradient_norm_is_taken_before_clipping_and_the_update_after(reference):
    _, (first, _) = reference
    assert float(first.grad_norm) > CONFIG.optimizer.clip_norm


def test_evaluation_scores_only_what_the_mask_says(reference):
    decoder, params = Decoder(on_cpu(CONFIG.model), VOCAB), reference[0].params
    mask = np.zeros((BATCH, L), bool)
    mask[:3] = True
    mask[3, :5] = True
    score = jax.jit(functools.partial(eval_step, decoder))
    full = score(Variables(params), {**batch(), "mask": mask})
    poisoned = {name: np.where(mask, value, 7) for name, value in batch().items()}
    again = score(Variables(params), {**poisoned, "mask": mask})
    assert int(full.num_tokens) == 3 * L + 5
    np.testing.assert_allclose(full.loss, again.loss, rtol=1e-6)
    np.testing.assert_array_equal(full.routing.load_NE, again.routing.load_NE)
    np.testing.assert_array_equal(full.routing.dropped_N, 0)
    assert float(full.routing.load_NE[0].sum()) == (3 * L + 5) * CONFIG.model.moe.top_k


def packed_batch(garbage=0):
    """Rows of two documents and padding of many lengths; ``garbage`` is what padding holds."""
    first, second = np.arange(BATCH) % 5 + 1, np.arange(BATCH) % 4 + 1
    place_L = np.arange(L)[None]
    segments = np.where(place_L < first[:, None], 1, np.where(place_L < (first + second)[:, None], 2, 0))
    mask = segments > 0
    tokens = {name: np.where(mask, values, garbage).astype(np.int32) for name, values in batch().items()}
    positions = np.where(segments == 2, place_L - first[:, None], place_L)
    return tokens | {"mask": mask, "segments": segments.astype(np.int32), "positions": positions.astype(np.int32)}


@pytest.mark.slow  # tests/model/test_documents.py and tests/data hold what it is made of
def test_rows_of_documents_train_the_same_under_accumulation_and_devices_whatever_padding_holds():
    expected = two_steps(CONFIG, made=packed_batch())
    accumulated = change(CONFIG, optimizer={"accumulation_steps": 2})
    assert_same_training(two_steps(accumulated, devices=8, made=packed_batch(garbage=5)), expected)
    first, _ = expected[1]
    assert int(first.num_targets) == packed_batch()["mask"].sum() < BATCH * L
    assert int(first.routing.num_tokens) == int(first.num_targets)
