"""Parameters and operations by hand, and against what XLA counts in the program."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.model.decoder import Decoder, Tokens, Variables, forward, unstack
from moe_jax.training.flops import PEAK_FLOPS, count_params, flops_per_token, utilisation


def test_parameter_counts_by_hand():
    params = {
        "embedding": jnp.zeros((10, 4)),
        "moe": {"router": jnp.zeros((4, 8)), "w_up": jnp.zeros((8, 4, 6))},
    }
    assert count_params(params, MoEConfig(top_k=2, num_experts=8)) == (40 + 32 + 192, 40 + 32 + 192 // 4)


def test_operations_by_hand():
    model = ModelConfig(
        num_layers=2, embed_dim=4, context_length=5, tie_embeddings=False, moe=MoEConfig(num_experts=8, top_k=2)
    )
    params = {
        "embedding": jnp.zeros((10, 4)),
        "output": jnp.zeros((4, 10)),
        "moe": {"router": jnp.zeros((4, 8)), "router_noise": jnp.zeros((4, 8)), "w_up": jnp.zeros((8, 4, 6))},
        "shared": {"w_up": jnp.zeros((4, 6)), "b_up": jnp.zeros(6)},
    }
    # 6 (output 40 + router 32 + two of eight experts 48 + shared 24) + 12 * 2 layers * width 4 * 5 keys.
    assert flops_per_token(params, model) == 6 * (40 + 32 + 48 + 24) + 480
    tied = dataclasses.replace(model, tie_embeddings=True)
    params.pop("output")
    assert flops_per_token(params, tied) == 6 * (40 + 32 + 48 + 24) + 480


@pytest.mark.parametrize(
    ("num_experts", "router", "capacity_factor"), [(0, "top_k", 1.0), (4, "top_k", 1.0), (4, "expert_choice", 1.5)]
)
def test_xla_counts_about_as_many(num_experts, router, capacity_factor):
    # capacity_factor 1: the experts compute exactly K rows a token. Those that choose take as many more as they may.
    moe = MoEConfig(
        num_experts=num_experts,
        top_k=2,
        expert_dim=256,
        router=router,
        capacity_factor=capacity_factor,
        dispatch="gather",
    )
    config = ModelConfig(context_length=64, num_layers=2, embed_dim=256, num_heads=2, activation="gelu", moe=moe)
    decoder = Decoder(config, 512)
    params = nn.unbox(
        jax.eval_shape(lambda: decoder.init(jax.random.key(0), Tokens(jnp.zeros((1, 2), jnp.int32)))["params"])
    )
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    walking = Decoder(config, 512, unstacked=True)  # XLA counts a loop's body once

    def loss(params, tokens):
        logits = forward(walking, unstack(Variables(params), config), Tokens(tokens), train=True).logits_BLV
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens))

    counted = jax.jit(jax.grad(loss)).lower(params, tokens).cost_analysis()["flops"] / (2 * 64)
    assert counted == pytest.approx(flops_per_token(params, config), rel=0.05)


def test_utilisation_of_known_devices_only():
    assert utilisation(989e12, "NVIDIA H100 80GB HBM3", 4) == 0.25
    assert utilisation(1e12, "cpu", 1) is None
    assert all(1e14 < peak < 1e16 for peak in PEAK_FLOPS.values())
