"""Every router with every dispatcher against the loop over experts: values, gradients, drops, causality, masks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.model.mlp import ExpertWeights
from moe_jax.model.moe.layer import MoE
from moe_jax.model.moe.routing import ROUTERS, expert_capacity
from tests.oracles.moe import (
    assert_trees_close,
    choose,
    choose_in_groups,
    choose_tokens,
    combine_weights,
    keep,
    make_weights,
    moe_loop,
)

# 13 tokens a group: no shape divides another, and T·K/E is no whole number.
G, T, D, F, E = 2, 13, 7, 10, 6
LOADS = ["even", "skewed", "all_to_one", "empty_expert", "one_row"]
CAPACITIES = {"einsum": 1.0, "gather": 1.0, "blocked": None, "ragged": None, "by_row": None}
"""Each backend, with a capacity that makes it drop rows where it can."""


def make_config(router: str, dispatch: str, factor: float | None, **moe) -> MoEConfig:
    if router == "switch":
        moe |= {"top_k": 1, "router_jitter": 0.05}
    if router == "sigmoid_bias":
        moe |= {"num_expert_groups": 2, "top_k_groups": 1, "routed_scaling_factor": 2.5}  # 2 of 3 in a group
    if router == "noisy_top_k":
        moe |= {"routed_scaling_factor": 0.5}
    if router == "expert_choice":
        factor = factor or 2.0
    return MoEConfig(dispatch=dispatch, num_experts=E, expert_dim=F, router=router, capacity_factor=factor, **moe)


def covering(router: str, dispatch: str) -> bool:
    """Whether a pair is in the default run, where each router meets two backends, and each backend two routers."""
    return (list(ROUTERS).index(router) - list(CAPACITIES).index(dispatch)) % len(ROUTERS) < 2


# Nothing dropped; and a capacity of 1.0, which sorted rows do not have, but expert choice always has.
PAIRS = [
    *(
        pytest.param(router, dispatch, None, marks=() if covering(router, dispatch) else pytest.mark.slow)
        for router in ROUTERS
        for dispatch in CAPACITIES
    ),
    *((router, dispatch, 1.0) for router in ROUTERS for dispatch in ("einsum", "gather")),
]


def make_tokens(load: str) -> tuple[np.ndarray, np.ndarray]:
    """(x [G, T, D], router [D, E]): the first E entries of a token are, by and large, its scores.

    They lead to the named load; small random parts keep weights and gradients generic. No score is so high that its
    softmax is all but one: there the router's gradient is a difference of equal numbers, in any float32 formula.
    """
    rng = np.random.default_rng(LOADS.index(load))
    x = 0.3 * rng.standard_normal((G, T, D))
    token = np.arange(T)
    if load == "even":
        x[:, token, token % E] += 4
        x[:, token, (token + 1) % E] += 2
    elif load == "skewed":
        x[..., :E] += np.array([3.0, 2.0, 0.0, -1.0, -1.0, 0.0]) + rng.standard_normal((G, T, E))
    elif load == "all_to_one":
        x[..., 2] += 2.5
        x[..., 3] += 1
    elif load == "empty_expert":
        x[..., 1] -= 8
    elif load == "one_row":
        x[..., 3] -= 8
        x[:, 5, 3] += 14
    router = np.eye(D, E) + 0.05 * rng.standard_normal((D, E))
    return x.astype(np.float32), router.astype(np.float32)


WEIGHTS = make_weights(E, D, F)
BIAS_E = jnp.asarray([0.05, -0.05, 0.1, 0.0, -0.1, 0.02])
KEYS_G = jax.random.split(jax.random.key(11), G)
NOISE_DE = jnp.asarray(np.random.default_rng(5).standard_normal((D, E)) / 10, jnp.float32)


def make_params(router: np.ndarray | jax.Array, weights: ExpertWeights = WEIGHTS) -> dict:
    return {
        "router": jnp.asarray(router),
        "router_noise": NOISE_DE,
        "w_up": weights.w_up_EDF,
        "w_down": weights.w_down_EFD,
        "w_gate": weights.w_gate_EDF,
    }


EVERYTHING = np.ones((G, T), bool)
# A fixed random projection, so that every output element has a gradient of its own.
PROJECTION = np.random.default_rng(3).standard_normal((G, T, D)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("moe", "train"))
def run(moe, params, x_GTD, mask_GT=EVERYTHING, projection_GTD=PROJECTION, train=True):
    """(output, dropped rows of each group, gradients of <projection, output> for (params, x))."""
    bias_E = BIAS_E if moe.router == "sigmoid_bias" else None

    def objective(params, x_GTD):
        used = params if moe.router == "noisy_top_k" else {k: v for k, v in params.items() if k != "router_noise"}
        y_GTD, statistics = MoE(ModelConfig(embed_dim=D, moe=moe)).apply(
            {"params": used}, x_GTD, train=train, token_mask_GT=mask_GT, noise_keys_G=KEYS_G, expert_bias_E=bias_E
        )
        return jnp.vdot(y_GTD.astype(jnp.float32), projection_GTD), (y_GTD, statistics.num_dropped)

    gradients, (y_GTD, dropped_G) = jax.grad(objective, argnums=(0, 1), has_aux=True)(params, x_GTD)
    return y_GTD, dropped_G, gradients


def oracle_logits(moe, params, x_TD, key):
    """[T, E]: the scores of one group, perturbed as the router perturbs them in training."""
    if moe.router == "switch":
        low, high = 1 - moe.router_jitter, 1 + moe.router_jitter
        x_TD = x_TD * jax.random.uniform(key, x_TD.shape, jnp.float32, low, high)
    logits_TE = x_TD @ params["router"]
    if moe.router == "noisy_top_k":
        scale_TE = jnp.log1p(jnp.exp(x_TD @ params["router_noise"]))
        logits_TE += jax.random.normal(key, logits_TE.shape, jnp.float32) * scale_TE
    return logits_TE


def oracle_choice(moe, params, x_TD, key):
    """(experts, kept) of one group, each [T, K]."""
    logits_TE = np.asarray(oracle_logits(moe, params, x_TD, key))
    capacity = expert_capacity(moe, len(x_TD), train=True)
    if moe.router == "expert_choice":
        probs_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(axis=1, keepdims=True)
        expert_TK = choose_tokens(probs_TE, capacity)
    elif moe.router == "sigmoid_bias":
        scores_TE = 1 / (1 + np.exp(-logits_TE)) + np.asarray(BIAS_E)
        expert_TK = choose_in_groups(scores_TE, moe.top_k, moe.num_expert_groups, moe.top_k_groups)
    else:
        expert_TK = choose(logits_TE, moe.top_k)
    return expert_TK, keep(expert_TK, E, capacity)


def oracle_output(moe, params, x_TD, key, expert_TK, kept_TK):
    weight_TK = combine_weights(moe, oracle_logits(moe, params, x_TD, key), expert_TK)
    weights = ExpertWeights(params["w_up"], params["w_down"], params["w_gate"])
    return moe.routed_scaling_factor * moe_loop(x_TD, weight_TK, weights, expert_TK, kept_TK)


@functools.partial(jax.jit, static_argnames="moe")
def oracle_run(moe, params, x_GTD, expert_GTK, kept_GTK):
    def objective(params, x_GTD):
        groups = [oracle_output(moe, params, x_GTD[g], KEYS_G[g], expert_GTK[g], kept_GTK[g]) for g in range(G)]
        return jnp.vdot(jnp.stack(groups), PROJECTION), jnp.stack(groups)

    gradients, y_GTD = jax.grad(objective, argnums=(0, 1), has_aux=True)(params, x_GTD)
    return y_GTD, gradients


def expected(moe, x, router):
    """(output, gradients, experts, kept) of the loop in float64, so that what differs is the layer's own rounding."""
    params = make_params(router)
    choices = [oracle_choice(moe, params, x[g], KEYS_G[g]) for g in range(G)]
    expert_GTK, kept_GTK = (np.stack(parts) for parts in zip(*choices, strict=True))
    # The loop knows no dispatcher, so that all of them share its compiled program.
    moe = dataclasses.replace(moe, dispatch="auto", capacity_factor=None)
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, x))
        output, gradients = jax.device_get(oracle_run(moe, params, x, expert_GTK, kept_GTK))
    return output, gradients, expert_GTK, kept_GTK


def assert_equals_the_loop(moe, load):
    """Output and gradients of ``run``; returns the share of dropped rows."""
    x, router_DE = make_tokens(load)
    want, want_gradients, expert_GTK, kept_GTK = expected(moe, x, router_DE)
    got, dropped_G, got_gradients = run(moe, make_params(router_DE), x)
    num_rows_G = np.sum(expert_GTK < E, axis=(1, 2))
    np.testing.assert_array_equal(dropped_G, num_rows_G - np.sum(kept_GTK, axis=(1, 2)))
    assert_trees_close(got, want, 2e-6)
    assert_trees_close(got_gradients, want_gradients, 4e-6)
    return float(dropped_G.sum() / num_rows_G.sum())


@pytest.mark.parametrize(("router", "dispatch", "factor"), PAIRS)
def test_values_and_gradients_equal_the_loop(router, dispatch, factor):
    moe = make_config(router, dispatch, factor)
    dropped = [assert_equals_the_loop(moe, load) for load in LOADS]
    if factor == 1.0 and router != "expert_choice":
        assert sum(share >= 0.1 for share in dropped) >= 2, "the case must drop rows to test dropping"
    else:
        assert not any(dropped)


@pytest.mark.parametrize(
    ("router", "dispatch", "changes"),
    [
        *(
            pytest.param("top_k", dispatch, {"top_k": top_k}, marks=() if dispatch in default else pytest.mark.slow)
            for top_k, default in {1: ("blocked",), 3: ("einsum", "by_row"), 6: ("gather", "ragged")}.items()
            for dispatch in CAPACITIES
        ),
        *((router, "gather", {"renormalise": False}) for router in ("top_k", "sigmoid_bias")),
    ],
)
def test_any_number_of_choices_and_weights_as_they_are_equal_the_loop(router, dispatch, changes):
    assert_equals_the_loop(make_config(router, dispatch, CAPACITIES[dispatch], **changes), "skewed")


@pytest.mark.parametrize("dispatch", CAPACITIES)
def test_bfloat16_stays_close_to_the_loop(dispatch):
    moe = make_config("top_k", dispatch, CAPACITIES[dispatch])
    x, router_DE = make_tokens("skewed")
    x = jnp.asarray(x, jnp.bfloat16)
    want, want_gradients, _, _ = expected(moe, np.asarray(x.astype(jnp.float32)), router_DE)
    got, _, got_gradients = run(moe, make_params(router_DE), x)
    assert got.dtype == got_gradients[1].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(got_gradients[0])} == {jnp.dtype("float32")}
    # Three products and a gate, each rounded to 8 bits of mantissa; backward as many again.
    assert_trees_close(got.astype(jnp.float32), want, 3 * 2.0**-7)
    for actual, exact in zip(jax.tree.leaves(got_gradients), jax.tree.leaves(want_gradients), strict=True):
        assert_trees_close(actual.astype(jnp.float32), exact, 6 * 2.0**-7)


MASKED = [("top_k", *each) for each in CAPACITIES.items()]
MASKED += [(router, dispatch, None) for router in list(ROUTERS)[1:] for dispatch in ("gather", "blocked")]


@pytest.mark.parametrize(("router", "dispatch", "factor"), MASKED)
def test_a_masked_token_leaves_no_trace_even_when_it_is_nan(router, dispatch, factor):
    moe = make_config(router, dispatch, factor)
    x, router_DE = make_tokens("skewed")
    mask = EVERYTHING.copy()
    mask[0, 3:6] = mask[1, 10:] = False
    params = make_params(router_DE)
    got, dropped_G, (dparams, dx) = run(moe, params, np.where(mask[..., None], x, np.nan), mask)
    assert np.all(np.asarray(got)[~mask] == 0)
    assert np.all(np.asarray(dx)[~mask] == 0)
    other, _, (other_dparams, other_dx) = run(moe, params, np.where(mask[..., None], x, 2.0), mask)
    assert_trees_close((got, dparams, dx), (other, other_dparams, other_dx), 1e-7)
    if factor == 1.0:
        assert dropped_G.sum() > 0
    if not ROUTERS[router].has_noise:  # the draws of noise depend on the length of the group
        for g in range(G):  # as if the group had been so short, with the capacity that it would have had
            real = x[g][mask[g]]
            want = oracle_output(moe, params, real, KEYS_G[g], *oracle_choice(moe, params, real, KEYS_G[g]))
            assert_trees_close(got[g][mask[g]], want, 2e-6)


@pytest.mark.parametrize("dispatch", ["einsum", "gather"])
@pytest.mark.parametrize("router", ROUTERS)
def test_only_where_experts_choose_does_an_earlier_token_depend_on_a_later_one(router, dispatch):
    # Rows are dropped. Where experts choose, a later token takes an earlier one's place: no sampling from that.
    moe = make_config(router, dispatch, 1.0)
    x, router_DE = make_tokens("skewed")
    params = make_params(router_DE)
    first_half = np.where(np.arange(T)[None, :, None] < T // 2, PROJECTION, 0)
    before, dropped_G, (_, dx) = run(moe, params, x, projection_GTD=first_half)
    assert np.all(np.asarray(dx)[:, T // 2 :] == 0)
    assert np.mean(np.any(np.asarray(dx)[:, : T // 2] != 0, axis=-1)) > 0.5
    is_changed = []
    for favourite in range(E):
        edited = x.copy()
        edited[:, -1] *= -3
        edited[:, -1, favourite] = 9
        after, _, _ = run(moe, params, edited)
        is_changed.append(np.any(before[:, :-1] != after[:, :-1]))
    assert any(is_changed) != ROUTERS[router].is_causal
    if ROUTERS[router].is_causal:
        assert dropped_G.sum() >= 0.1 * G * T * moe.top_k, "capacity must bind"


def test_outside_of_training_nothing_is_dropped():
    x, router_DE = make_tokens("all_to_one")
    params = make_params(router_DE)
    limited, dropped_G, _ = run(make_config("top_k", "gather", 1.0), params, x, train=False)
    free, _, _ = run(make_config("top_k", "blocked", None), params, x, train=False)
    assert not dropped_G.any()
    assert_trees_close(limited, free, 2e-6)


@pytest.mark.parametrize(
    ("router", "dispatch", "words"),
    [
        ("sigmoid_bias", "gather", "sigmoid_bias needs its router state expert_bias_E"),
        ("top_k", "auto", "needs the name of a backend, got"),
    ],
)
def test_neither_router_state_nor_backend_is_taken_for_granted(router, dispatch, words):
    layer = MoE(ModelConfig(embed_dim=D, moe=make_config(router, dispatch, None)))
    with pytest.raises(ValueError, match=words):
        layer.init(jax.random.key(0), jnp.zeros((1, 2, D)), train=False)
