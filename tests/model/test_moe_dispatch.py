"""Every dispatcher against the loop over experts, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MoEConfig
from moe_jax.model.moe.dispatch import DISPATCHERS
from moe_jax.model.moe.experts import ExpertWeights, expert_mlp
from moe_jax.model.moe.layer import expert_capacity
from moe_jax.model.moe.plan import place
from moe_jax.model.moe.routing import top_k_plan
from tests.oracles.moe import choose, keep, moe_loop

G, T, D, F, E, K = 2, 12, 6, 10, 4, 2
TIGHT = T * K // E  # capacity factor 1.0
LOADS = ["even", "skewed", "all_to_one", "empty_expert", "one_row"]


def make_logits(load: str) -> np.ndarray:
    """Scores [G, T, E] that lead to the named load; small random parts keep weights and gradients generic."""
    rng = np.random.default_rng(LOADS.index(load))
    logits = 0.1 * rng.standard_normal((G, T, E))
    token = np.arange(T)
    if load == "even":
        logits[:, token, token % E] += 4
        logits[:, token, (token + 1) % E] += 2
    elif load == "skewed":
        logits += np.array([3.0, 2.0, 0.0, -1.0]) + rng.standard_normal((G, T, E))
    elif load == "all_to_one":
        logits[..., 2] += 4
        logits[..., 0] += 2
    elif load == "empty_expert":
        logits[..., 1] -= 8
    elif load == "one_row":
        logits[..., 3] -= 8
        logits[:, 5, 3] += 12
    return logits.astype(np.float32)


def make_weights(activation: str = "swiglu", bias: bool = False) -> ExpertWeights:
    rng = np.random.default_rng(7)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) / 3, jnp.float32)

    gated = activation == "swiglu"
    return ExpertWeights(
        w_up_EDF=normal(E, D, F),
        w_down_EFD=normal(E, F, D),
        w_gate_EDF=normal(E, D, F) if gated else None,
        b_up_EF=normal(E, F) if bias else None,
        b_gate_EF=normal(E, F) if bias and gated else None,
        b_down_ED=normal(E, D) if bias else None,
    )


def run_dispatcher(name, capacity, x_GTD, logits_GTE, weights, activation="swiglu", top_k=K, mask_GT=None):
    plan = jax.vmap(lambda logits, mask: top_k_plan(logits, top_k, mask))(logits_GTE, mask_GT)
    return DISPATCHERS[name](x_GTD, plan, E, capacity, lambda x: expert_mlp(weights, x, activation))


COMPILED = jax.jit(run_dispatcher, static_argnames=("name", "capacity", "activation", "top_k"))


def gradients(function, *arguments):
    """Gradients of a fixed random projection of the output, for every argument."""
    projection = jax.random.normal(jax.random.key(3), (G, T, D))
    return jax.grad(lambda *args: jnp.vdot(function(*args), projection), argnums=(0, 1, 2))(*arguments)


GRADIENTS = {
    (name, capacity): jax.jit(
        lambda *args, name=name, capacity=capacity: gradients(
            lambda *inner: run_dispatcher(name, capacity, *inner)[0], *args
        )
    )
    for name in DISPATCHERS
    for capacity in (T, TIGHT)
}


def assert_trees_close(actual, expected, rtol):
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.max(jnp.abs(want))) + 1e-30
        np.testing.assert_allclose(np.asarray(got) / scale, np.asarray(want) / scale, atol=rtol, rtol=0)


def oracle(x_GTD, logits_GTE, weights, capacity, logits_for_choice, activation="swiglu", top_k=K):
    outputs = []
    for g in range(G):
        expert_TK = choose(logits_for_choice[g], top_k)
        kept_TK = keep(expert_TK, E, capacity)
        outputs.append(moe_loop(x_GTD[g], logits_GTE[g], weights, expert_TK, kept_TK, activation))
    return jnp.stack(outputs)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("capacity", [T, TIGHT], ids=["dropless", "capacity1.0"])
def test_values_and_gradients_equal_the_loop(load, capacity):
    x_GTD = jax.random.normal(jax.random.key(1), (G, T, D))
    logits = make_logits(load)
    weights = make_weights()
    kept = np.stack([keep(choose(group, K), E, capacity) for group in logits])
    if capacity == TIGHT and load != "even":
        assert (~kept).mean() >= 0.1, "the case must drop rows to test dropping"

    def naive(x, logits_GTE, weights):
        return oracle(x, logits_GTE, weights, capacity, logits)

    expected = naive(x_GTD, jnp.asarray(logits), weights)
    expected_gradients = gradients(naive, x_GTD, jnp.asarray(logits), weights)
    for name in DISPATCHERS:
        actual, kept_GTK = COMPILED(name, capacity, x_GTD, jnp.asarray(logits), weights)
        np.testing.assert_array_equal(kept_GTK, kept)
        assert_trees_close(actual, expected, 2e-6)
        assert_trees_close(GRADIENTS[name, capacity](x_GTD, jnp.asarray(logits), weights), expected_gradients, 2e-6)


@pytest.mark.parametrize("name", DISPATCHERS)
@pytest.mark.parametrize(("activation", "bias"), [("swiglu", True), ("gelu", False), ("relu", True)])
def test_activations_and_biases_equal_the_loop(name, activation, bias):
    x_GTD = jax.random.normal(jax.random.key(1), (G, T, D))
    logits, weights = make_logits("skewed"), make_weights(activation, bias)
    actual, _ = COMPILED(name, TIGHT, x_GTD, jnp.asarray(logits), weights, activation=activation)
    assert_trees_close(actual, oracle(x_GTD, logits, weights, TIGHT, logits, activation), 2e-6)


@pytest.mark.parametrize("name", DISPATCHERS)
@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_any_number_of_choices_equals_the_loop(name, top_k):
    x_GTD = jax.random.normal(jax.random.key(1), (G, T, D))
    logits, weights = make_logits("skewed"), make_weights()
    actual, _ = COMPILED(name, 5, x_GTD, jnp.asarray(logits), weights, top_k=top_k)
    assert_trees_close(actual, oracle(x_GTD, logits, weights, 5, logits, top_k=top_k), 2e-6)


@pytest.mark.parametrize("name", DISPATCHERS)
def test_bfloat16_stays_close_to_the_float32_loop(name):
    x_GTD = jax.random.normal(jax.random.key(1), (G, T, D)).astype(jnp.bfloat16)
    logits, weights = make_logits("skewed"), make_weights()
    actual, _ = COMPILED(name, TIGHT, x_GTD, jnp.asarray(logits), weights)
    assert actual.dtype == jnp.bfloat16
    expected = oracle(x_GTD.astype(jnp.float32), logits, weights, TIGHT, logits)
    # Three products and a gate, each rounded to 8 bits of mantissa.
    assert_trees_close(actual.astype(jnp.float32), expected, 3 * 2.0**-7)


@pytest.mark.parametrize("name", DISPATCHERS)
def test_a_masked_token_leaves_no_trace_even_when_it_is_nan(name):
    weights, logits = make_weights(), make_logits("skewed")
    mask = np.ones((G, T), bool)
    mask[0, 3:6] = mask[1, 10:] = False
    x_GTD = jax.random.normal(jax.random.key(1), (G, T, D))
    clean_x = jnp.where(mask[..., None], x_GTD, 0.0)
    poisoned_logits = np.where(mask[..., None], logits, np.nan)

    def apply(x, logits_GTE, weights):
        return run_dispatcher(name, TIGHT, x, logits_GTE, weights, mask_GT=jnp.asarray(mask))[0]

    actual = apply(clean_x, jnp.asarray(poisoned_logits), weights)
    dx, dlogits, dweights = gradients(apply, clean_x, jnp.asarray(poisoned_logits), weights)
    assert np.all(np.asarray(actual)[~mask] == 0)
    assert np.all(np.asarray(dlogits)[~mask] == 0)
    for g in range(G):
        real = mask[g]
        expert_TK = choose(logits[g][real], K)
        kept = keep(expert_TK, E, TIGHT)
        expected = moe_loop(clean_x[g][real], jnp.asarray(logits[g][real]), weights, expert_TK, kept)
        assert_trees_close(actual[g][real], expected, 2e-6)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((dx, dweights)))


@pytest.mark.parametrize("name", DISPATCHERS)
def test_one_token(name):
    x_GTD = jax.random.normal(jax.random.key(1), (1, 1, D))
    logits = np.asarray([[[0.3, 2.0, -1.0, 1.0]]], np.float32)
    actual, kept = COMPILED(name, 1, x_GTD, jnp.asarray(logits), make_weights())
    assert kept.all()
    expected = moe_loop(x_GTD[0], jnp.asarray(logits[0]), make_weights(), np.array([[1, 3]]), np.ones((1, 2), bool))
    assert_trees_close(actual[0], expected, 2e-6)


def test_no_expert_accepts_more_than_its_capacity_and_earlier_tokens_go_first():
    logits = make_logits("all_to_one")[0]
    plan = top_k_plan(jnp.asarray(logits), K)
    placement = place(plan, E, 5)
    # Every token's first choice is expert 2 and its second expert 0, so both take the first five tokens.
    np.testing.assert_array_equal(placement.kept_TK[:5], True)
    np.testing.assert_array_equal(placement.kept_TK[5:], False)
    np.testing.assert_array_equal(placement.position_TK[:, 0], np.arange(T))


@pytest.mark.parametrize("name", DISPATCHERS)
def test_permuting_tokens_permutes_the_output_when_nothing_is_dropped(name):
    x_GTD = jax.random.normal(jax.random.key(1), (G, T, D))
    logits, weights = make_logits("skewed"), make_weights()
    order = np.random.default_rng(0).permutation(T)
    straight, _ = COMPILED(name, T, x_GTD, jnp.asarray(logits), weights)
    permuted, _ = COMPILED(name, T, x_GTD[:, order], jnp.asarray(logits[:, order]), weights)
    assert_trees_close(permuted, straight[:, order], 2e-6)


@pytest.mark.parametrize("name", DISPATCHERS)
def test_an_earlier_token_never_depends_on_a_later_one_though_rows_are_dropped(name):
    weights, logits = make_weights(), jnp.asarray(make_logits("skewed"))
    x_GTD = jax.random.normal(jax.random.key(1), (G, T, D))
    before, kept = COMPILED(name, TIGHT, x_GTD, logits, weights)
    assert not kept.all(), "capacity must bind"
    for favourite in range(E):
        edited = logits.at[:, -1].set(jax.nn.one_hot(favourite, E) * 9)
        after, _ = COMPILED(name, TIGHT, x_GTD.at[:, -1].mul(-3), edited, weights)
        np.testing.assert_array_equal(before[:, :-1], after[:, :-1])

    def first_tokens(x, logits_GTE):
        return jnp.sum(run_dispatcher(name, TIGHT, x, logits_GTE, weights)[0][:, : T // 2] ** 2)

    dx, dlogits = jax.grad(first_tokens, argnums=(0, 1))(x_GTD, logits)
    assert np.all(np.asarray(dx)[:, T // 2 :] == 0)
    assert np.all(np.asarray(dlogits)[:, T // 2 :] == 0)
    assert np.any(np.asarray(dx)[:, : T // 2] != 0)


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "factor", "capacity"),
    [
        (128, 2, 8, 1.25, 40),
        (10, 1, 8, 1.0, 2),  # 1.25 rounded up
        (160, 5, 8, 1.1, 110),  # not 111, though 100 * 1.1 is 110.00000000000001
        (16, 2, 4, 99.0, 16),  # an expert never sees a token twice
        (16, 2, 4, 1e-9, 1),
        (16, 2, 4, None, 16),
    ],
)
def test_expert_capacity(num_tokens, top_k, num_experts, factor, capacity):
    moe = MoEConfig(num_experts=num_experts, top_k=top_k, capacity_factor=factor)
    assert expert_capacity(moe, num_tokens, train=True) == capacity
    assert expert_capacity(moe, num_tokens, train=False) == num_tokens
