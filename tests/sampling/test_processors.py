"""Logits processors on rows worked by hand, and the distribution that is drawn from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.sampling.decode import Settings, draw
from moe_jax.sampling.processors import keep_top_k, keep_top_p, scale_by_temperature

# Probabilities .1, .4, .2, .3 in this order of token ids.
LOGITS = jnp.log(jnp.asarray([0.1, 0.4, 0.2, 0.3]))


def kept(logits_V):
    return np.flatnonzero(np.isfinite(logits_V)).tolist()


@pytest.mark.parametrize(
    ("top_k", "tokens"), [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_top_k(top_k, tokens):
    assert kept(keep_top_k(LOGITS, jnp.asarray(top_k))) == tokens


@pytest.mark.parametrize(
    ("top_p", "tokens"),
    [
        (1e-6, [1]),
        (0.39, [1]),
        (0.41, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [1, 2, 3]),
        (0.95, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p(top_p, tokens):
    assert kept(keep_top_p(LOGITS, jnp.asarray(top_p))) == tokens


def test_top_p_counts_what_top_k_left():
    # Of .4 and .3, renormalised 4/7 and 3/7: the first alone reaches 0.5 but not 0.6.
    left = keep_top_k(LOGITS, jnp.asarray(2))
    assert kept(keep_top_p(left, jnp.asarray(0.5))) == [1]
    assert kept(keep_top_p(left, jnp.asarray(0.6))) == [1, 3]


def test_ties_keep_the_lower_token_and_exactly_k():
    assert kept(keep_top_k(jnp.zeros(5), jnp.asarray(2))) == [0, 1]
    assert kept(keep_top_p(jnp.zeros(4), jnp.asarray(0.5))) == [0, 1]


def test_temperature_divides():
    np.testing.assert_allclose(scale_by_temperature(LOGITS, jnp.asarray(0.5)), 2 * LOGITS, rtol=1e-6)


def make(temperature=1.0, top_k=4, top_p=1.0, is_greedy=False, seed=0):
    return Settings(
        seed=jnp.asarray(seed, jnp.uint32),
        temperature=jnp.asarray(temperature),
        top_k=jnp.asarray(top_k),
        top_p=jnp.asarray(top_p),
        is_greedy=is_greedy,
    )


def test_greedy_takes_the_most_likely():
    np.testing.assert_array_equal(
        draw(jnp.stack([LOGITS, LOGITS[::-1]]), make(is_greedy=True), jnp.asarray(0)), [1, 2]
    )


def test_drawn_frequencies_are_the_processed_probabilities():
    # Temperature 1/2 squares the probabilities: .01 .16 .04 .09; top-3 drops the first; 16, 4 and 9 of 29 are left.
    settings = make(temperature=0.5, top_k=3)
    rows = jnp.broadcast_to(LOGITS, (20_000, 4))
    tokens = jax.jit(lambda: draw(rows, settings, jnp.asarray(3)))()
    counts = np.bincount(tokens, minlength=4)
    assert counts[0] == 0
    expected = 20_000 * np.array([16, 4, 9]) / 29
    assert np.sum((counts[1:] - expected) ** 2 / expected) < 13.8, "chi-square, 2 degrees of freedom, p = 0.001"


def test_a_draw_depends_on_seed_row_and_position_only():
    rows = jnp.broadcast_to(LOGITS, (64, 4))
    tokens = np.asarray(draw(rows, make(), jnp.asarray(5)))
    np.testing.assert_array_equal(tokens[:8], draw(rows[:8], make(), jnp.asarray(5)))
    assert not np.array_equal(tokens, draw(rows, make(), jnp.asarray(6)))
    assert not np.array_equal(tokens, draw(rows, make(seed=1), jnp.asarray(5)))
