"""The examples in docstrings, run as they stand."""

import doctest
import importlib

import pytest

MODULES = ["sampling.processors", "sampling.text"]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    results = doctest.testmod(importlib.import_module(f"moe_jax.{name}"))
    assert results.attempted
    assert not results.failed
