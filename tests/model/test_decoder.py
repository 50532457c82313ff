"""The decoder in every variant: causality, one forward for training and decoding, depth, initialisation."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.model.decoder import Decoder, Tokens, Variables, forward, initial_expert_bias, layout
from tests.oracles.moe import on_cpu
from tests.oracles.programs import equations_of

VOCAB, B, L = 29, 2, 10
MOE = MoEConfig(num_experts=4, expert_dim=12, capacity_factor=1.0)
TINY = ModelConfig(
    context_length=L,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    init_std=0.3,  # far from uniform, so that a wrong mask or position shows
    moe=MOE,
)
LLAMA = dataclasses.replace(TINY, num_kv_heads=2, qk_norm=True, tie_embeddings=False)
GPT = dataclasses.replace(
    TINY,
    norm="layernorm",
    positions="learned",
    activation="relu",
    use_bias=True,
    init="kaiming",
    moe=dataclasses.replace(MOE, router="noisy_top_k", dispatch="einsum"),
)
MIXED = dataclasses.replace(
    TINY,
    num_layers=5,
    activation="gelu",
    init="xavier",
    moe=dataclasses.replace(MOE, top_k=1, first_dense=1, every=2),
)
DEEPSEEK = dataclasses.replace(
    TINY,
    num_layers=3,
    moe=MoEConfig(
        num_experts=6,
        expert_dim=12,
        router="sigmoid_bias",
        num_expert_groups=2,
        top_k_groups=1,
        routed_scaling_factor=2.0,
        num_shared_experts=1,
        first_dense=1,
        dispatch="blocked",  # also where cached decoding, with its few rows, would gather weights by row
    ),
)
DENSE = dataclasses.replace(TINY, moe=MoEConfig(num_experts=0, expert_dim=12))
VARIANTS = {"llama": LLAMA, "gpt": GPT, "mixed": MIXED, "deepseek": DEEPSEEK, "dense": DENSE}


TOKENS_BL = jax.random.randint(jax.random.key(1), (B, L), 0, VOCAB)


def make_variables(config, length=2):
    decoder, tokens = Decoder(on_cpu(config, length), VOCAB), Tokens(jnp.zeros((1, length), jnp.int32))
    params = nn.unbox(jax.jit(decoder.init)(jax.random.key(0), tokens))["params"]
    bias_NE = initial_expert_bias(config)
    if bias_NE is not None:  # another one in each layer, so that layers cannot be mixed up
        bias_NE = 0.2 * jax.random.normal(jax.random.key(2), bias_NE.shape)
    return Variables(params, bias_NE)


variables_of = functools.cache(make_variables)


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    """(config, variables)."""
    config = VARIANTS[request.param]
    return config, variables_of(config)


def apply_of(config, train=False, keys_B=None, mask_BL=None):
    def apply(variables, tokens_BL):
        decoder = Decoder(on_cpu(config, tokens_BL.size, train=train), VOCAB)
        return forward(decoder, variables, Tokens(tokens_BL, mask_BL), train=train, keys_B=keys_B)

    return jax.jit(apply)


def test_no_token_sees_a_later_one_another_row_or_a_masked_one_though_capacity_binds(model):
    config, variables = model
    apply, tokens_BL = apply_of(config, train=True), TOKENS_BL
    before = apply(variables, tokens_BL)
    if config.moe.num_experts and config.moe.capacity_factor is not None:
        assert float(jnp.sum(before.statistics.num_dropped)) > 0, "capacity must bind"
    for token in range(0, VOCAB, 4):
        after = apply(variables, tokens_BL.at[:, -1].set(token))
        np.testing.assert_array_equal(before.logits_BLV[:, :-1], after.logits_BLV[:, :-1])
    other = apply(variables, tokens_BL.at[1].set(3))
    np.testing.assert_array_equal(before.logits_BLV[0], other.logits_BLV[0])
    masked = apply_of(config, train=True, mask_BL=jnp.ones((B, L), bool).at[0, 7:].set(False))
    first, second = masked(variables, tokens_BL), masked(variables, tokens_BL.at[0, 7:].set(5))
    np.testing.assert_array_equal(first.logits_BLV[0, :7], second.logits_BLV[0, :7])
    if config.moe.num_experts:
        np.testing.assert_array_equal(first.statistics.router.num_tokens[:, 0], 7)


def gradient_of(config):
    """A function: variables to the gradient of the sum of all logits, by them."""
    return jax.grad(lambda variables: jnp.sum(apply_of(config, train=True)(variables, TOKENS_BL).logits_BLV))


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("gpt", "llama", "mixed", "dense")]


@pytest.mark.parametrize("model", ["deepseek", *SLOWER], indirect=True)
def test_remat_and_unrolling_change_no_gradient(model):
    config, variables = model

    def gradient(config):
        def loss(params):
            return jnp.std(apply_of(config, train=True)(variables.replace(params=params), TOKENS_BL).logits_BLV)

        return jax.jit(jax.grad(loss))(variables.params)

    expected = gradient(config)
    for change in ({"remat": "full"}, {"remat": "dots", "scan_unroll": 2}):
        got = gradient(dataclasses.replace(config, **change))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-6), got, expected)


@pytest.mark.parametrize("router", ["noisy_top_k", "switch"])
def test_evaluation_is_without_noise_though_keys_are_given(router):
    moe = dataclasses.replace(GPT.moe, router=router, top_k=1, dispatch="gather", router_jitter=0.5)
    config = dataclasses.replace(GPT, moe=moe)
    variables, tokens_BL = variables_of(GPT if router == "noisy_top_k" else config), TOKENS_BL
    keys_B = jax.random.split(jax.random.key(3), B)
    quiet = apply_of(config)(variables, tokens_BL).logits_BLV
    np.testing.assert_array_equal(apply_of(config, keys_B=keys_B)(variables, tokens_BL).logits_BLV, quiet)
    trained = dataclasses.replace(config, moe=dataclasses.replace(moe, capacity_factor=None))
    noisy = apply_of(trained, train=True, keys_B=keys_B)(variables, tokens_BL).logits_BLV
    assert float(jnp.max(jnp.abs(noisy - quiet))) > 1e-3


@pytest.mark.parametrize(
    ("dispatch", "loop"), [("blocked", "while"), ("ragged", "ragged_dot_general"), ("pallas", "pallas_call")]
)
def test_remat_of_all_but_products_does_not_compute_sorted_experts_twice(dispatch, loop):
    # Their products' results have to be named for the policy, which sees neither into a loop nor grouped products.
    def num_loops(remat):
        moe = dataclasses.replace(DEEPSEEK.moe, dispatch=dispatch)
        config = dataclasses.replace(DEEPSEEK, remat=remat, moe=moe)
        variables = jax.eval_shape(lambda: make_variables(config))
        program = jax.make_jaxpr(gradient_of(config))(variables)
        return sum(equation.primitive.name == loop for equation in equations_of(program.jaxpr))

    assert num_loops("dots") == num_loops("none") < num_loops("full")


def test_a_deeper_model_is_no_longer_program():
    """The program that XLA compiles has one period in a loop, whatever the depth."""

    def num_operations(num_layers):
        config = dataclasses.replace(TINY, num_layers=num_layers)
        variables = jax.eval_shape(lambda: make_variables(config))
        return jax.jit(gradient_of(config)).lower(variables).as_text().count(" = ")

    assert num_operations(3) == num_operations(12)


def test_layout_follows_first_dense_and_every():
    assert layout(MIXED) == [("first_dense", (False,), 0, 1), ("periods", (False, True), 1, 2)]
    assert layout(DENSE) == [("periods", (False,), 0, 2)]


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    config = dataclasses.replace(LLAMA, dtype="bfloat16")
    shapes = jax.eval_shape(lambda: make_variables(config))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    variables = variables_of(LLAMA)
    exact = apply_of(LLAMA)(variables, TOKENS_BL).logits_BLV
    rough = apply_of(config)(variables, TOKENS_BL).logits_BLV
    assert rough.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean((rough - exact) ** 2)) / jnp.std(exact)
    assert 1e-4 < float(error) < 0.05


@pytest.mark.parametrize(
    ("init", "std_up", "std_down"),
    [
        ("scaled_normal", 0.02, 0.02 / (2 * 3) ** 0.5),
        ("kaiming", (2 / 64) ** 0.5, (2 / 96) ** 0.5),
        ("xavier", (2 / 160) ** 0.5, (2 / 160) ** 0.5),
    ],
)
def test_initial_standard_deviations_count_no_expert_axis_as_a_fan(init, std_up, std_down):
    config = ModelConfig(num_layers=3, embed_dim=64, init=init, moe=MoEConfig(num_experts=4, expert_dim=96))
    moe = make_variables(config).params["periods"]["block_0"]["moe"]
    assert moe["w_up"].shape == (3, 4, 64, 96)
    np.testing.assert_allclose(jnp.std(moe["w_up"]), std_up, rtol=0.03)
    np.testing.assert_allclose(jnp.std(moe["w_down"]), std_down, rtol=0.03)


@functools.partial(jax.jit, static_argnames=("config", "length"))
def dropped_out(config, variables, length, seed):
    """Logits of a training forward of equal tokens, whose dropout is drawn by ``seed``."""
    keys_B = jax.random.split(jax.random.key(seed), B)
    return apply_of(config, train=True, keys_B=keys_B)(variables, jnp.ones((B, length), jnp.int32)).logits_BLV


def test_dropout_differs_by_key():
    config = dataclasses.replace(LLAMA, dropout_rate=0.5)
    variables = variables_of(LLAMA)
    one, again, other = (dropped_out(config, variables, L, seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, again)
    assert float(jnp.max(jnp.abs(one - other))) > 1e-2
    assert float(jnp.max(jnp.abs(one[0] - one[1]))) > 1e-2, "each sequence has its own key"


def test_the_embedding_may_be_left_out_of_dropout():
    # No blocks' outputs and one token: what differs between keys can only be the embedding's dropout.
    config = dataclasses.replace(LLAMA, dropout_rate=0.5)
    params = variables_of(LLAMA).params
    variables = Variables(params | {"periods": jax.tree.map(jnp.zeros_like, params["periods"])})
    one, other = (dropped_out(config, variables, 1, seed) for seed in (0, 1))
    assert float(jnp.max(jnp.abs(one - other))) > 1e-3
    without = dataclasses.replace(config, embedding_dropout=False)
    one, other = (dropped_out(without, variables, 1, seed) for seed in (0, 1))
    np.testing.assert_array_equal(one, other)
