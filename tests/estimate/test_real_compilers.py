"""What eight H100s and eight TPUs exchange, in programs that XLA compiles for them: none of them has to be here."""

import functools
import importlib.util
import math

import jax
import pytest

from moe_jax.estimate.collectives import Collective, collectives
from moe_jax.estimate.devices import KINDS, absent_mesh
from moe_jax.estimate.step import compile_step
from tests.tiny import CONFIG, change

D, F, E, V, LAYERS, ROWS, L = 256, 384, 8, 1024, 5, 16, 128
SIZES = {"data": 1, "fsdp": 2, "expert": 4, "tensor": 1}
COMPILERS = {"h100": ("jax_cuda12_plugin", "jax_cuda13_plugin"), "v5e": ("libtpu",)}


@functools.cache
def exchanges(device: str, capacity_factor: float | None) -> list[Collective]:
    if not any(map(importlib.util.find_spec, COMPILERS[device])):
        pytest.skip(f"XLA's compiler for {device} is not installed")  # test_meshes.py reads a CPU's program
    config = change(
        CONFIG,
        moe={"num_experts": E, "expert_dim": F, "router": "top_k", "capacity_factor": capacity_factor},
        model={
            "context_length": L,
            "num_layers": LAYERS,
            "embed_dim": D,
            "dropout_rate": 0.0,
            "dtype": "bfloat16",
            "tie_embeddings": False,
            "remat": "full",
        },
        data={"batch_size": ROWS},
    )
    mesh = absent_mesh(device, SIZES)
    jax.config.update("jax_disable_most_optimizations", False)  # as users compile
    try:
        compiled, _, _ = compile_step(config, mesh, KINDS[device], V)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    return collectives(compiled.as_text(), mesh)


@pytest.mark.slow
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@pytest.mark.parametrize("device", COMPILERS)
def test_tokens_travel_over_expert_and_a_layer_at_a_time_over_fsdp(device, capacity_factor):
    found = exchanges(device, capacity_factor)
    shapes = [(each, lengths) for each in found for _, lengths in each.shapes]
    over_experts = [(each, lengths) for each, lengths in shapes if "expert" in each.axes]
    assert not [lengths for _, lengths in over_experts if F in lengths], "weights of experts stay where they are"
    kinds = {each.kind for each, _ in over_experts} - {"all-reduce"}
    assert kinds == ({"all-to-all"} if capacity_factor else {"all-gather", "reduce-scatter"})
    gathered = [lengths for each, lengths in shapes if each.kind == "all-gather" and each.axes == ("fsdp",)]
    a_layer, embedding = E // SIZES["expert"] * D * F, V * D
    assert {math.prod(lengths) for lengths in gathered} >= {a_layer, embedding}
    assert max(map(math.prod, gathered)) <= max(a_layer, embedding), "all layers at once"
