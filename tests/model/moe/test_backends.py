"""Which backend is chosen, and what is said of it."""

import types

import jax
import pytest

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.errors import UserError
from moe_jax.model.moe.backends import BY_ROW_ROWS, Machine, choose, this_machine, with_dispatch

CPU, TPU, AMD = Machine("cpu"), Machine("tpu"), Machine("gpu")
NVIDIA = Machine("gpu", is_nvidia=True, has_tokamax=True)
BARE_NVIDIA = Machine("gpu", is_nvidia=True)
SLOTS = {"capacity_factor": 1.0}
CHOICE = {"router": "expert_choice", "capacity_factor": 1.0}


@pytest.mark.parametrize(
    ("machine", "moe", "train", "name"),
    [
        (CPU, {}, True, "blocked"),
        (TPU, {}, True, "ragged"),
        (NVIDIA, {}, True, "tokamax"),
        (AMD, {}, True, "blocked"),
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


def test_auto_without_tokamax_says_what_a_gpu_is_missing():
    choice = choose(MoEConfig(), 4096, train=True, machine=BARE_NVIDIA)
    assert choice.name == "blocked"
    assert "pip install tokamax" in choice.reason


@pytest.mark.parametrize(
    ("top_k", "num_tokens", "name"),
    [(2, BY_ROW_ROWS // 2, "by_row"), (2, BY_ROW_ROWS, "blocked"), (16, 1, "by_row"), (16, 2, "blocked")],
)
def test_a_handful_of_rows_is_not_sorted(top_k, num_tokens, name):
    assert choose(MoEConfig(top_k=top_k), num_tokens, train=False, machine=CPU).name == name


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (CPU, "dispatch=tokamax needs an NVIDIA GPU, which this cpu is not; set it to auto"),
        (AMD, "dispatch=tokamax needs an NVIDIA GPU, which this gpu is not; set it to auto"),
        (BARE_NVIDIA, "needs the package tokamax, which is not installed; pip install tokamax"),
    ],
)
def test_tokamax_where_it_cannot_run_is_refused_with_the_remedy(machine, words):
    model = ModelConfig(moe=MoEConfig(dispatch="tokamax"))
    with pytest.raises(UserError, match=words):
        with_dispatch(model, 4096, train=True, machine=machine)
    # A run of another machine may have been trained with it.
    assert with_dispatch(model, 4096, train=True, machine=machine, as_set=False).moe.dispatch == "blocked"


@pytest.mark.parametrize(
    ("device", "packages", "machine"),
    [("cpu", (), CPU), ("tpu", (), TPU), ("NVIDIA H100", ("tokamax",), NVIDIA), ("AMD Instinct", (), AMD)],
)
def test_the_machine_is_that_of_this_process(monkeypatch, device, packages, machine):
    monkeypatch.setattr(jax, "default_backend", lambda: device if device in ("cpu", "tpu") else "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=device)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in packages else None)
    assert this_machine() == machine
