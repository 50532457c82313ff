"""The examples in docstrings are run as they stand."""

import doctest
import importlib

import pytest

MODULES = (
    "model.attention",
    "model.layers",
    "model.moe.dispatch",
    "model.moe.plan",
    "model.moe.routing",
    "model.moe.statistics",
    "data.batches",
    "data.pieces",
    "data.rows",
    "data.tokenizer",
    "sampling.processors",
    "sampling.text",
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_give_what_they_say(name):
    result = doctest.testmod(importlib.import_module(f"moe_jax.{name}"), verbose=False)
    assert result.attempted
    assert not result.failed
