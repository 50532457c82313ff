"""Which backend is chosen, and what is said of it."""

import types

import jax
import pytest

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.errors import UserError
from moe_jax.model.machine import Machine, this_machine
from moe_jax.model.moe.backends import BY_ROW_ROWS, choose, for_machine

CPU, TPU, AMD = Machine("cpu"), Machine("tpu"), Machine("gpu")
NVIDIA = Machine("gpu", is_nvidia=True)
SLOTS = {"capacity_factor": 1.0}
CHOICE = {"router": "expert_choice", "capacity_factor": 1.0}


@pytest.mark.parametrize(
    ("machine", "moe", "train", "name"),
    [
        (CPU, {}, True, "blocked"),
        (TPU, {}, True, "ragged"),
        (NVIDIA, {}, True, "pallas"),
        (AMD, {}, True, "pallas"),
        (CPU, SLOTS, True, "gather"),
        (CPU, SLOTS, False, "blocked"),
        (CPU, CHOICE, False, "gather"),
        (CPU, CHOICE | {"dispatch": "blocked"}, True, "blocked"),
        (CPU, {"dispatch": "einsum"}, False, "einsum"),
        (NVIDIA, {"dispatch": "ragged"}, True, "ragged"),
    ],
)
def test_auto_picks_by_machine_and_capacity_and_never_a_dense_product(machine, moe, train, name):
    choice = choose(MoEConfig(**moe), 4096, train=train, machine=machine)
    assert choice.name == name
    is_dense = name == "einsum" or (name == "ragged" and machine != TPU)
    assert ("E/K times" in str(choice)) == is_dense, "a dense product is said"


@pytest.mark.parametrize(
    ("top_k", "num_tokens", "name"),
    [(2, BY_ROW_ROWS // 2, "by_row"), (2, BY_ROW_ROWS, "blocked"), (16, 1, "by_row"), (16, 2, "blocked")],
)
def test_a_handful_of_rows_is_not_sorted(top_k, num_tokens, name):
    assert choose(MoEConfig(top_k=top_k), num_tokens, train=False, machine=CPU).name == name


@pytest.mark.parametrize("machine", [CPU, TPU])
def test_kernels_for_gpus_are_refused_elsewhere_with_the_remedy(machine):
    model = ModelConfig(moe=MoEConfig(dispatch="pallas"))
    with pytest.raises(UserError, match=f"pallas needs a GPU, which this {machine.platform} is not; set it to auto"):
        for_machine(model, 4096, train=True, machine=machine)
    # A run of another machine may have been trained with it.
    assert for_machine(model, 4096, train=True, machine=machine, as_set=False).moe.dispatch != "pallas"


@pytest.mark.parametrize(
    ("settings", "train", "machine", "attention"),
    [
        ({"dtype": "bfloat16"}, True, NVIDIA, "cudnn"),
        ({"dtype": "bfloat16"}, True, AMD, "full"),
        ({"dtype": "bfloat16", "attention": "full"}, True, NVIDIA, "full"),
        ({"dtype": "bfloat16", "dropout_rate": 0.1}, True, NVIDIA, "full"),
        ({"dtype": "bfloat16", "dropout_rate": 0.1}, False, NVIDIA, "cudnn"),
        ({"dtype": "bfloat16", "embed_dim": 48}, True, NVIDIA, "full"),
        ({}, True, NVIDIA, "full"),
        # Longer contexts in blocks, unless there is dropout.
        ({"context_length": 64}, True, CPU, "full"),
        ({"context_length": 65}, True, CPU, "blocks"),
        ({"context_length": 1025}, True, NVIDIA, "blocks"),
        ({"context_length": 256, "attention": "full"}, True, CPU, "full"),
        ({"context_length": 256, "dropout_rate": 0.1}, True, CPU, "full"),
        ({"context_length": 256, "dropout_rate": 0.1}, False, CPU, "blocks"),
        ({"context_length": 256, "dtype": "bfloat16"}, True, NVIDIA, "cudnn"),
        ({"attention": "blocks"}, True, CPU, "blocks"),
    ],
)
def test_attention_is_as_measured_fastest(settings, train, machine, attention):
    assert for_machine(ModelConfig(**settings), 4096, train=train, machine=machine).attention == attention


@pytest.mark.parametrize(
    ("settings", "machine", "words"),
    [
        ({"dtype": "bfloat16"}, CPU, "cudnn needs an NVIDIA GPU, which this cpu is not; set it to auto"),
        ({}, NVIDIA, "cudnn computes in bfloat16, got model.dtype=float32"),
        ({"dtype": "bfloat16", "embed_dim": 48}, NVIDIA, "multiples of 8, got embed_dim / num_heads = 12"),
        ({"dtype": "bfloat16", "dropout_rate": 0.1}, NVIDIA, "has no dropout, got model.dropout_rate=0.1"),
    ],
)
def test_cudnn_where_it_cannot_be_is_refused_with_the_remedy(settings, machine, words):
    with pytest.raises(UserError, match=words):
        for_machine(ModelConfig(attention="cudnn", **settings), 4096, train=True, machine=machine)


def test_packed_rows_are_not_for_cudnn():
    settings = {"dtype": "bfloat16", "context_length": 2048}
    chosen = for_machine(ModelConfig(**settings), 4096, train=True, machine=NVIDIA, packed=True)
    assert chosen.attention == "blocks"
    with pytest.raises(UserError, match=r"cudnn cannot keep documents of one row apart, got data.mode=packed; set it"):
        for_machine(ModelConfig(attention="cudnn", **settings), 4096, train=True, machine=NVIDIA, packed=True)


def test_blocks_with_dropout_are_refused_with_the_remedy():
    with pytest.raises(UserError, match=r"blocks has no dropout, got model.dropout_rate=0.1; set it to auto"):
        for_machine(ModelConfig(attention="blocks", dropout_rate=0.1), 4096, train=True, machine=CPU)


@pytest.mark.parametrize(
    ("device", "machine"), [("cpu", CPU), ("tpu", TPU), ("NVIDIA H100", NVIDIA), ("AMD Instinct", AMD)]
)
def test_the_machine_is_that_of_this_process(monkeypatch, device, machine):
    monkeypatch.setattr(jax, "default_backend", lambda: device if device in ("cpu", "tpu") else "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=device)])
    assert this_machine() == machine
