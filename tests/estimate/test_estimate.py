"""The command: what a step needs of each device."""

import importlib.util
import json
import sys

import pytest

from moe_jax.commands.estimate import EstimateCommand, main
from moe_jax.errors import EnvironmentFault, UserError
from moe_jax.estimate.devices import KINDS, absent_mesh, description
from tests.tiny import CONFIG, change, recipe


@pytest.fixture
def estimate(tmp_path, monkeypatch, capsys):
    """What the command prints for the flags."""
    config = change(CONFIG, moe={"router": "top_k"}, model={"dropout_rate": 0.0}, data={"batch_size": 8})
    (tmp_path / "tiny.py").write_text(recipe(config))

    def of(*flags):
        monkeypatch.setattr(sys, "argv", ["estimate", "--config", str(tmp_path / "tiny.py"), *flags])
        main()
        return capsys.readouterr().out

    return of


def test_shares_and_exchanges_of_a_mesh(estimate):
    flags = ("--device", "cpu", "--vocab-size", "24")
    one = json.loads(estimate(*flags, "--json"))
    mesh = ("--mesh.fsdp", "2", "--mesh.expert", "2", "--mesh.tensor", "2")
    eight = json.loads(estimate(*flags, *mesh, "--json"))
    assert one["exchanged"] == []
    assert eight["parameters"] == one["parameters"]
    assert one["parameter_bytes"] == 4 * one["parameters"]
    # Norms and routers are whole on each device.
    assert one["parameter_bytes"] / 8 < eight["parameter_bytes"] < one["parameter_bytes"] / 5
    assert eight["model_flops"] * 8 == one["model_flops"]
    found = {(row["kind"], *row["axes"]) for row in eight["exchanged"]}
    assert {("all-gather", "fsdp"), ("all-gather", "expert"), ("reduce-scatter", "expert")} <= found
    page = estimate(*flags, *mesh)
    assert "cpu, fsdp 2 x expert 2 x tensor 2; dispatch by blocked" in page
    assert "all-gather over fsdp: " in page
    assert "does not fit" not in page
    assert " ms" not in page, "a CPU has no data sheet"


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        (("--device", "cpu", "--vocab-size", "0"), UserError, "--vocab-size must be at least 1, got 0"),
        (("--device", "cpu"), UserError, "--vocab-size is needed: data.tokenizer=char does not say"),
        (("--mesh.fsdp", "3", "--vocab-size", "9"), UserError, "batch_size .* must be a multiple of the 3 devices"),
        (("--device", "v5e", "--mesh.data", "2", "--vocab-size", "9"), UserError, "one of 4, 8, .* got 2"),
    ],
)
def test_what_cannot_be_is_one_line(estimate, flags, error, words):
    with pytest.raises(error, match=words):
        estimate(*flags)


def test_a_compiler_that_is_not_installed_is_named(estimate, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match=r"compiler for h100 is not installed; .*pip install 'jax\[cuda12\]'"):
        estimate("--vocab-size", "24")


def test_gpus_come_in_whole_hosts():
    with pytest.raises(UserError, match="whole hosts of 8 h100, got 9 devices"):
        absent_mesh("h100", {"data": 9, "fsdp": 1, "expert": 1, "tensor": 1})


def test_each_device_has_a_description():
    assert set(EstimateCommand.__annotations__["device"].__args__) == set(KINDS)
    for name, kind in KINDS.items():
        if kind.platform == "gpu":
            assert f"device_memory_size: {kind.memory:.0f}" in description(name)
