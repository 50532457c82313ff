"""Logits processors on rows worked by hand, and the distribution that is drawn from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import SampleConfig
from moe_jax.data.tokenizer import ByteTokenizer
from moe_jax.sampling.batch import _rows
from moe_jax.sampling.decode import Rows, draw
from moe_jax.sampling.processors import (
    gumbel,
    keep_min_p,
    keep_top_k,
    keep_top_k_and_p,
    keep_top_p,
    penalise_repetition,
    scale_by_temperature,
)
from moe_jax.sampling.text import Text

BYTES = ByteTokenizer("endoftext")
# Probabilities .1, .4, .2, .3 in this order of token ids.
LOGITS = jnp.log(jnp.asarray([0.1, 0.4, 0.2, 0.3]))


def kept(logits_V):
    return np.flatnonzero(np.isfinite(logits_V)).tolist()


@pytest.mark.parametrize(
    ("processor", "value", "tokens"),
    [
        *((keep_top_k, *row) for row in [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]),
        *((keep_top_p, value, [1]) for value in (1e-6, 0.39)),
        *((keep_top_p, value, [1, 3]) for value in (0.41, 0.69)),
        (keep_top_p, 0.71, [1, 2, 3]),
        *((keep_top_p, value, [0, 1, 2, 3]) for value in (0.95, 1.0)),
        *((keep_min_p, value, [0, 1, 2, 3]) for value in (0.0, 0.24)),
        (keep_min_p, 0.26, [1, 2, 3]),
        *((keep_min_p, value, [1]) for value in (0.76, 1.0)),
    ],
)
def test_which_tokens_are_kept(processor, value, tokens):
    assert kept(processor(LOGITS, jnp.asarray(value))) == tokens


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


def test_a_penalty_makes_what_is_in_the_text_less_likely_whatever_its_sign():
    logits, seen = jnp.array([2.0, -2.0, 1.0, -1.0]), jnp.array([True, True, False, False])
    np.testing.assert_allclose(penalise_repetition(logits, seen, jnp.asarray(2.0)), [1.0, -4.0, 1.0, -1.0])


def sorted_top_k(logits, top_k):
    """The oracle: by a stable sort."""
    order = np.argsort(-logits, kind="stable")[:top_k]
    return sorted(int(token) for token in order if np.isfinite(logits[token]))


def sorted_top_p(logits, top_p):
    shifted = np.exp((logits - logits.max()).astype(np.float64))
    probs, order, total, found = shifted / shifted.sum(), np.argsort(-logits, kind="stable"), 0.0, []
    for token in order:
        if found and total >= top_p:
            break
        found.append(int(token))
        total += probs[token]
    return sorted(token for token in found if np.isfinite(logits[token]))


def rows_of_all_kinds():
    random = np.random.default_rng(0)
    for size in (1, 2, 7, 50, 333):
        for scale in (0.1, 1.0, 5.0, 30.0):
            row = random.normal(0, scale, size).astype(np.float32)
            yield row
            yield np.round(row)  # ties
            yield np.where(random.random(size) < 0.5, -np.inf, row).astype(np.float32) if size > 5 else row - 100
    yield np.zeros(64, np.float32)
    yield np.array([-0.0, 0.0, -0.0, 1e-30], np.float32)


def test_thresholds_keep_what_a_sort_keeps():
    by_k, by_p = jax.jit(keep_top_k), jax.jit(keep_top_p)
    for row in rows_of_all_kinds():
        if not np.isfinite(row).any():
            continue
        for top_k in (1, 2, 5, 40):
            got = kept(by_k(jnp.asarray(row), jnp.asarray(top_k)))
            assert got == sorted_top_k(row + np.float32(0.0), top_k), (row, top_k)
        for top_p in (0.05, 0.303, 0.9001, 0.999):
            assert kept(by_p(jnp.asarray(row), jnp.asarray(top_p))) == sorted_top_p(row, top_p), (row, top_p)


def many_rows(V):
    """[600, V]: logits of all kinds, ties among them, as computed in float32 and in bfloat16."""
    random = np.random.default_rng(V)
    x = random.normal(0, random.choice([0.1, 1.0, 5.0, 30.0], (100, 1)), (100, V)).astype(np.float32)
    coarse = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
    half = np.where(x < np.median(x, axis=1, keepdims=True), -np.inf, x)
    both_zeros = np.where(x > 0, 0.0, -0.0)
    return jnp.asarray(np.concatenate([x, np.round(x), coarse, coarse / 0.7, half, both_zeros]), jnp.float32)


@pytest.mark.parametrize("V", [1, 2, 50, 333])
def test_one_sort_keeps_what_the_thresholds_keep(V):
    logits_BV, random = many_rows(V), np.random.default_rng(0)
    B = logits_BV.shape[0]
    top_k_B = jnp.asarray(random.choice([1, 2, 5, 40, V, V, V + 9], B))
    top_p_B = jnp.asarray(random.choice([1e-6, 0.05, 0.303, 0.5, 0.9001, 0.999, 1.0, 1.0], B), jnp.float32)
    min_p_B = jnp.asarray(random.choice([0.0, 0.0, 0.1, 1.0], B), jnp.float32)

    def by_thresholds(logits_V, top_k, top_p, min_p):
        return keep_min_p(keep_top_p(keep_top_k(logits_V, top_k), top_p), min_p)

    def by_sort(logits_V, top_k, top_p, min_p):
        return keep_min_p(keep_top_k_and_p(logits_V, top_k, top_p), min_p)

    settings = (top_k_B, top_p_B, min_p_B)
    expected_BV = jax.jit(jax.vmap(by_thresholds))(logits_BV, *settings)
    np.testing.assert_array_equal(jax.jit(jax.vmap(by_sort))(logits_BV, *settings), expected_BV)
    alone = jax.jit(by_sort)  # not a batch of one, but a program of its own
    for row in range(0, B, 50):
        np.testing.assert_array_equal(alone(logits_BV[row], *(each_B[row] for each_B in settings)), expected_BV[row])


def make(B, samples=None, **settings):
    """Settings of ``B`` rows, all the same; the samples are 0, 1, 2 and so on where none are given."""
    values = {"seed": 0, "temperature": 1.0, "top_k": 4, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    kinds = {"seed": jnp.uint32, "top_k": jnp.int32}
    columns = {
        f"{name}_B": jnp.full(B, value, kinds.get(name, jnp.float32)) for name, value in (values | settings).items()
    }
    return Rows(sample_B=jnp.arange(B) if samples is None else samples, **columns)


DRAW = jax.jit(draw, static_argnames="by_sort")


def drawn(rows, position=0, seen=None, **settings):
    B = rows.shape[0]
    seen = jnp.zeros(rows.shape, bool) if seen is None else seen
    return np.asarray(DRAW(rows, make(B, **settings), jnp.full(B, position), seen))


def test_greedy_takes_the_most_likely_after_the_penalty():
    rows = jnp.stack([LOGITS, LOGITS[::-1]])
    np.testing.assert_array_equal(drawn(rows, temperature=0.0), [1, 2])
    seen = jnp.array([[False, True, False, False]] * 2)
    np.testing.assert_array_equal(drawn(rows, temperature=0.0, repetition_penalty=5.0, seen=seen), [3, 2])


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        # Temperature 1/2 squares the probabilities.
        ({"temperature": 0.5}, [1, 16, 4, 9]),
        ({"top_k": 3}, [0, 4, 2, 3]),
        ({"top_p": 0.65}, [0, 4, 0, 3]),
        ({"min_p": 0.4}, [0, 4, 2, 3]),
        # Of tokens 1 and 3, which are in the text: logits below 0 are multiplied.
        ({"repetition_penalty": 2.0}, [10, 16, 20, 9]),
        # In this order: of 1, 16, 4 and 9 the first three are left; 25 of 29 are two of them; 9/16 is above 0.5.
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.8, "min_p": 0.5}, [0, 16, 0, 9]),
        ({}, [1, 4, 2, 3]),
    ],
)
def test_drawn_frequencies_are_the_processed_probabilities(settings, weights):
    count = 50_000
    rows = jnp.broadcast_to(LOGITS, (count, 4))
    seen = jnp.broadcast_to(jnp.array([False, True, False, True]), (count, 4))
    counts = np.bincount(drawn(rows, 3, seen, **settings), minlength=4)
    expected = count * np.array(weights) / sum(weights)
    assert np.all(counts[expected == 0] == 0)
    counts, expected = counts[expected > 0], expected[expected > 0]
    limit = {1: 10.8, 2: 13.8, 3: 16.3}[len(counts) - 1]
    assert np.sum((counts - expected) ** 2 / expected) < limit, "chi-square, p = 0.001"


def test_a_draw_depends_on_seed_sample_and_position_only():
    rows = jnp.broadcast_to(LOGITS, (64, 4))
    tokens = drawn(rows, 5)
    np.testing.assert_array_equal(tokens[:8], drawn(rows[:8], 5))
    np.testing.assert_array_equal(tokens[8:16], drawn(rows[:8], 5, samples=jnp.arange(8, 16)))
    assert not np.array_equal(tokens, drawn(rows, 6))
    assert not np.array_equal(tokens, drawn(rows, 5, seed=1))


def test_no_two_texts_of_a_call_share_their_draws():
    sample = SampleConfig(seed=2**32 - 1)
    at = [(0, 0), (0, 1), (0, 2**16 - 1), (1, 0), (2**16 - 1, 2**16 - 1), (2**16, 0), (2**17, 5)]
    rows = _rows([Text(BYTES, [0], sample, number, -1, index=index) for index, number in at], 261)
    found = list(zip(rows.seed_B.tolist(), rows.sample_B.tolist(), strict=True))
    assert len(set(found)) == len(at)
    assert found[:3] == [(2**32 - 1, number) for number in (0, 1, 2**16 - 1)]


@pytest.mark.parametrize("settings", [{"temperature": 9e-4}, {"top_p": 0.0}, {"top_p": 1e-60}])
def test_what_leaves_one_token_or_divides_by_next_to_nothing_is_greedy(settings):
    sample = SampleConfig(**settings)
    assert _rows([Text(BYTES, [0], sample, 0, -1)], 261).temperature_B.tolist() == [0.0]


def test_noise_is_exact_where_it_is_largest(monkeypatch):
    """By 23 of the 32 bits, none would be above 15.9, and a token of probability 1e-8 hardly ever drawn."""
    key = jax.random.key(3)
    found, usual = np.asarray(gumbel(key, 100_000)), np.asarray(jax.random.gumbel(key, (100_000,)))
    most = (usual > -2) & (usual < 6)
    np.testing.assert_allclose(found[most], usual[most], atol=1e-3)
    bits = np.array([2**32 - 1, 2**32 - 2, 2**32 - 300, 2**32 - 2**20, 2**32 - 2**26, 2**31, 2**20, 0], np.uint32)
    monkeypatch.setattr(jax.random, "bits", lambda *_: jnp.asarray(bits))
    expected = -np.log(-np.log1p(-(2.0**32 - bits - 0.5) / 2.0**32))
    assert expected[0] > 22
    np.testing.assert_allclose(gumbel(key, 8)[:7], expected[:7], rtol=1e-5)
    assert np.isfinite(gumbel(key, 8)[7])


def test_each_row_is_drawn_by_its_own_settings():
    every = [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 2}, {"top_p": 0.65}, {"min_p": 0.5, "seed": 9}]
    every += [{"repetition_penalty": 4.0}, {}]
    seen = jnp.broadcast_to(jnp.array([False, True, False, False]), (6, 4))
    rows = jnp.stack([LOGITS] * 6)
    own = [make(1, jnp.array([index]), **settings) for index, settings in enumerate(every)]
    together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *own)
    for position in range(20):
        tokens = DRAW(rows, together, jnp.full(6, position), seen)
        np.testing.assert_array_equal(DRAW(rows, together, jnp.full(6, position), seen, by_sort=True), tokens)
        for index, settings in enumerate(every):
            alone = drawn(rows[:1], position, seen[:1], samples=jnp.array([index]), **settings)
            assert tokens[index] == alone[0], (position, settings)
