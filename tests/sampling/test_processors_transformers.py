"""Which tokens processors keep, against the ones of transformers, on 1,000 random rows; needs the extra "parity"."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.sampling.processors import (
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    scale_by_temperature,
)

torch = pytest.importorskip("torch", reason="needs the extra parity")
logits_process = pytest.importorskip("transformers.generation.logits_process", reason="needs the extra parity")

V = 211


@pytest.fixture(scope="module")
def rows():
    """[1000, V], from nearly flat to nearly certain."""
    random = np.random.default_rng(0)
    return (random.normal(size=(1000, V)) * np.exp(random.uniform(-2, 2.5, (1000, 1)))).astype(np.float32)


def of_transformers(warper, rows, ids=None):
    return warper(ids, torch.from_numpy(rows)).numpy()


@pytest.mark.parametrize(
    ("ours", "theirs", "value"),
    [
        *((keep_top_k, "TopKLogitsWarper", value) for value in (1, 2, 17, 210, 211)),
        *((keep_top_p, "TopPLogitsWarper", value) for value in (0.05, 0.5, 0.9, 0.95, 0.999, 1.0)),
        *((keep_min_p, "MinPLogitsWarper", value) for value in (0.01, 0.1, 0.5, 1.0)),
    ],
)
def test_which_tokens_are_kept(rows, ours, theirs, value):
    expected = of_transformers(getattr(logits_process, theirs)(value), rows)
    np.testing.assert_array_equal(jax.vmap(lambda row: ours(row, jnp.asarray(value)))(rows), expected)


@pytest.mark.parametrize("value", [0.3, 1.0, 1.7])
def test_temperature_and_repetition_penalty(rows, value):
    expected = of_transformers(logits_process.TemperatureLogitsWarper(value), rows)
    np.testing.assert_allclose(scale_by_temperature(rows, jnp.asarray(value)), expected, rtol=1e-6)
    ids = np.random.default_rng(1).integers(0, V, (1000, 30))
    seen = np.zeros((1000, V), bool)
    seen[np.arange(1000)[:, None], ids] = True
    penalty = logits_process.RepetitionPenaltyLogitsProcessor(value)
    expected = of_transformers(penalty, rows, torch.from_numpy(ids))
    np.testing.assert_allclose(penalise_repetition(rows, seen, jnp.asarray(value)), expected, rtol=1e-6)


def test_all_in_their_order(rows):
    """Temperature, top-k, top-p, min-p: the order of transformers too."""
    expected = of_transformers(logits_process.TemperatureLogitsWarper(0.7), rows)
    expected = of_transformers(logits_process.TopKLogitsWarper(60), expected)
    expected = of_transformers(logits_process.TopPLogitsWarper(0.9), expected)
    expected = of_transformers(logits_process.MinPLogitsWarper(0.03), expected)

    def ours(row):
        row = keep_top_k(scale_by_temperature(row, jnp.asarray(0.7)), jnp.asarray(60))
        return keep_min_p(keep_top_p(row, jnp.asarray(0.9)), jnp.asarray(0.03))

    np.testing.assert_array_equal(np.isfinite(jax.vmap(ours)(rows)), np.isfinite(expected))
