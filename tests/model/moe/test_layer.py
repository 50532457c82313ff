"""Every router with every dispatcher against the loop over experts: values, gradients, drops, causality, masks."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.model.mlp import ExpertWeights
from moe_jax.model.moe.layer import MoE
from moe_jax.model.moe.routing import expert_capacity
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
GROUPED = ["blocked", "ragged", "by_row"]
ROUTERS = list(typing.get_args(typing.get_type_hints(MoEConfig)["router"]))
CAUSAL = [router for router in ROUTERS if router != "expert_choice"]


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


# Nothing dropped; and a capacity of 1.0, which the sorted dispatcher does not have, but expert choice always has.
PAIRS = [
    *((router, dispatch, None) for router in ROUTERS for dispatch in ("einsum", "gather", *GROUPED)),
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


@pytest.mark.parametrize("router", CAUSAL)
def test_dispatchers_with_capacity_drop_exactly_the_same_rows(router):
    # A token whose rows are all dropped is zero, and one that lost some is another than with all of them.
    for load in LOADS:
        x, router_DE = make_tokens(load)
        (y, dropped_G, _), (z, also_dropped_G, _) = (
            run(make_config(router, name, 1.0), make_params(router_DE), x) for name in ("einsum", "gather")
        )
        np.testing.assert_array_equal(dropped_G, also_dropped_G)
        np.testing.assert_array_equal(y == 0, z == 0)
        assert_trees_close(y, z, 2e-6)


@pytest.mark.parametrize("dispatch", ["einsum", "gather", *GROUPED])
@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_any_number_of_choices_equals_the_loop(dispatch, top_k):
    assert_equals_the_loop(make_config("top_k", dispatch, None if dispatch in GROUPED else 1.0, top_k=top_k), "skewed")


@pytest.mark.parametrize("router", ["top_k", "sigmoid_bias"])
def test_weights_that_are_not_renormalised_equal_the_loop(router):
    assert_equals_the_loop(make_config(router, "gather", None, renormalise=False), "skewed")


@pytest.mark.parametrize("dispatch", ["einsum", "gather", *GROUPED])
def test_bfloat16_stays_close_to_the_loop(dispatch):
    moe = make_config("top_k", dispatch, None if dispatch in GROUPED else 1.0)
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


MASKED = [("top_k", dispatch, 1.0) for dispatch in ("einsum", "gather")]
MASKED += [("top_k", dispatch, None) for dispatch in GROUPED]
MASKED += [(router, dispatch, None) for router in ROUTERS[1:] for dispatch in ("gather", "blocked")]


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
    if router in ("top_k", "sigmoid_bias"):  # the draws of noise depend on the length of the group
        capacity = expert_capacity(moe, T, train=True)
        for g in range(G):
            real = x[g][mask[g]]
            expert_TK, _ = oracle_choice(moe, params, real, KEYS_G[g])
            want = oracle_output(moe, params, real, KEYS_G[g], expert_TK, keep(expert_TK, E, capacity))
            assert_trees_close(got[g][mask[g]], want, 2e-6)


@pytest.mark.parametrize("dispatch", ["einsum", "gather", *GROUPED])
def test_one_token_passes_its_experts(dispatch):
    moe = make_config("top_k", dispatch, None)
    x = np.zeros((1, 1, D), np.float32)
    x[0, 0, :E] = [0.3, 2.0, -1.0, 1.0, 0.0, 0.5]
    params = make_params(np.eye(D, E, dtype=np.float32))
    got, _ = jax.jit(lambda x: MoE(ModelConfig(embed_dim=D, moe=moe)).apply({"params": params}, x, train=False))(x)
    odds = np.exp(np.float32([2.0, 1.0]))
    want = moe_loop(x[0], odds[None] / odds.sum(), WEIGHTS, np.array([[1, 3]]), np.ones((1, 2), bool))
    assert_trees_close(got[0], want, 2e-6)


@pytest.mark.parametrize("dispatch", ["einsum", "gather"])
@pytest.mark.parametrize("router", CAUSAL)
def test_an_earlier_token_never_depends_on_a_later_one_though_rows_are_dropped(router, dispatch):
    moe = make_config(router, dispatch, 1.0)
    x, router_DE = make_tokens("skewed")
    params = make_params(router_DE)
    first_half = np.where(np.arange(T)[None, :, None] < T // 2, PROJECTION, 0)
    before, dropped_G, (_, dx) = run(moe, params, x, projection_GTD=first_half)
    assert dropped_G.sum() >= 0.1 * G * T * moe.top_k, "capacity must bind"
    assert np.all(np.asarray(dx)[:, T // 2 :] == 0)
    assert np.mean(np.any(np.asarray(dx)[:, : T // 2] != 0, axis=-1)) > 0.5
    for favourite in range(E):
        edited = x.copy()
        edited[:, -1] *= -3
        edited[:, -1, favourite] = 9
        after, _, _ = run(moe, params, edited)
        np.testing.assert_array_equal(before[:, :-1], after[:, :-1])


def test_expert_choice_is_not_causal():
    # What sampling from it is refused for: a later token takes the place of an earlier one.
    moe = make_config("expert_choice", "gather", 1.0)
    x, router_DE = make_tokens("skewed")
    before, _, _ = run(moe, make_params(router_DE), x)
    edited = x.copy()
    edited[:, -1, :E] = [9, -9, -9, -9, -9, -9]
    after, _, _ = run(moe, make_params(router_DE), edited)
    assert np.any(np.asarray(before)[:, :-1] != np.asarray(after)[:, :-1])


@pytest.mark.parametrize("dispatch", ["einsum", "gather", *GROUPED])
def test_permuting_tokens_permutes_the_output_when_nothing_is_dropped(dispatch):
    moe = make_config("sigmoid_bias", dispatch, None)
    x, router_DE = make_tokens("skewed")
    order = np.random.default_rng(0).permutation(T)
    straight, _, _ = run(moe, make_params(router_DE), x)
    permuted, _, _ = run(moe, make_params(router_DE), x[:, order])
    assert_trees_close(permuted, straight[:, order], 2e-6)


def test_outside_of_training_nothing_is_dropped():
    x, router_DE = make_tokens("all_to_one")
    params = {name: value for name, value in make_params(router_DE).items() if name != "router_noise"}

    def evaluate(moe):
        return MoE(ModelConfig(embed_dim=D, moe=moe)).apply({"params": params}, jnp.asarray(x), train=False)

    limited, statistics = evaluate(make_config("top_k", "gather", 1.0))
    free, _ = evaluate(make_config("top_k", "blocked", None))
    assert not statistics.num_dropped.any()
    assert_trees_close(limited, free, 2e-6)


def test_shared_experts_add_one_mlp_of_their_joint_width():
    x, router_DE = make_tokens("skewed")
    shared = make_weights(1, D, 3 * F, seed=8)
    params = make_params(router_DE)
    without, _, _ = run(make_config("top_k", "gather", None), params, x)
    params["shared"] = {"w_up": shared.w_up_EDF[0], "w_down": shared.w_down_EFD[0], "w_gate": shared.w_gate_EDF[0]}
    got, _, _ = run(make_config("top_k", "gather", None, num_shared_experts=3), params, x)
    one, first, kept = np.ones((T, 1)), np.zeros((T, 1), int), np.ones((T, 1), bool)
    want = jnp.stack([moe_loop(group, one, shared, first, kept) for group in x])
    assert_trees_close(got - without, want, 2e-6)


def test_the_router_state_of_sigmoid_bias_is_never_taken_for_granted():
    moe = make_config("sigmoid_bias", "gather", None)
    x, router_DE = make_tokens("even")
    with pytest.raises(ValueError, match="sigmoid_bias needs its router state expert_bias_E"):
        MoE(ModelConfig(embed_dim=D, moe=moe)).apply({"params": make_params(router_DE)}, x, train=False)


def test_a_layer_needs_the_name_of_a_backend():
    moe = make_config("top_k", "auto", None)
    with pytest.raises(ValueError, match="needs the name of a backend, got"):
        MoE(ModelConfig(embed_dim=D, moe=moe)).init(jax.random.key(0), jnp.zeros((1, 2, D)), train=False)
