"""The MoE layer against the sparse MoE blocks of Hugging Face transformers, whose checkpoints it should agree with."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.model.moe.layer import MoE

GOLDEN = Path(__file__).parents[2] / "golden" / "moe_blocks.npz"

TOP_2_OF_8 = MoEConfig(num_experts=8, top_k=2, expert_dim=12, router="top_k", capacity_factor=None)
FAMILIES = {
    "mixtral": dataclasses.replace(TOP_2_OF_8, renormalise=True),
    "olmoe": dataclasses.replace(TOP_2_OF_8, renormalise=False),
    "qwen3_moe": dataclasses.replace(TOP_2_OF_8, renormalise=True),
    "qwen3_moe_unnormalised": dataclasses.replace(TOP_2_OF_8, renormalise=False),
    "deepseek_v3": MoEConfig(
        num_experts=16,
        top_k=4,
        expert_dim=12,
        router="sigmoid_bias",
        capacity_factor=None,
        renormalise=True,
        num_shared_experts=2,
        num_expert_groups=4,
        top_k_groups=2,
        routed_scaling_factor=2.5,
    ),
}


@functools.partial(jax.jit, static_argnames="config")
def run_layer(config: ModelConfig, params: dict, x_TD: jax.Array, bias_E: jax.Array | None) -> jax.Array:
    y_GTD, _ = MoE(config).apply({"params": params}, x_TD[None], train=False, expert_bias_E=bias_E)
    return y_GTD[0]


def assert_same_output(arrays: dict[str, np.ndarray], family: str, dispatch: str):
    """Runs our layer on the weights and tokens that ``arrays`` holds of ``family``, and compares the outputs."""
    block = {key.removeprefix(f"{family}/"): array for key, array in arrays.items() if key.startswith(f"{family}/")}
    x_TD, y_TD, bias_E = block.pop("x"), block.pop("y"), block.pop("expert_bias", None)
    shared = {key.removeprefix("shared_"): block.pop(key) for key in list(block) if key.startswith("shared_")}
    params = {**block, "shared": shared} if shared else block
    moe = dataclasses.replace(FAMILIES[family], dispatch=dispatch)
    actual_TD = run_layer(ModelConfig(embed_dim=x_TD.shape[1], activation="swiglu", moe=moe), params, x_TD, bias_E)
    # Another order of additions changes the outputs by 2e-7 of the largest, and any mistake in the mathematics by 0.1.
    np.testing.assert_allclose(actual_TD, y_TD, rtol=0, atol=1e-5 * np.abs(y_TD).max())


@pytest.mark.parametrize("dispatch", ["blocked", "gather", "einsum"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_gives_the_outputs_of_transformers(family, dispatch):
    with np.load(GOLDEN) as arrays:
        assert_same_output(dict(arrays), family, dispatch)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_live_blocks_of_transformers(seed):
    # Other weights than the stored ones, and whatever release is installed: its blocks may change after the file.
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.golden.make_moe_blocks import blocks

    arrays = blocks(seed)
    for family in FAMILIES:
        assert_same_output(arrays, family, "blocked")
