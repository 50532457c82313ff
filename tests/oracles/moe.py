"""A MoE layer as loops over tokens, choices and experts, and each router as its paper's sentence says it."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import MoEConfig
from moe_jax.model.moe.experts import ExpertWeights


def choose(scores_TE: np.ndarray, top_k: int) -> np.ndarray:
    """[T, K]: each token's highest scores, the lower expert first among equals."""
    return np.argsort(-np.asarray(scores_TE), axis=-1, kind="stable")[:, :top_k]


def choose_in_groups(scores_TE: np.ndarray, top_k: int, num_groups: int, top_k_groups: int) -> np.ndarray:
    """[T, K]: as ``choose``, among the experts of the groups with the largest sums of their two best."""
    chosen = []
    for scores_E in np.asarray(scores_TE):
        groups = scores_E.reshape(num_groups, -1)
        best = choose(np.sort(groups)[:, -2:].sum(axis=1)[None], top_k_groups)[0]
        allowed = np.isin(np.arange(scores_E.size) // groups.shape[1], best)
        chosen.append(choose(np.where(allowed, scores_E, -np.inf)[None], top_k)[0])
    return np.array(chosen)


def choose_tokens(scores_TE: np.ndarray, capacity: int) -> np.ndarray:
    """[T, E]: e where expert e takes the token, else E; each expert the highest scores, the earlier token first."""
    T, E = scores_TE.shape
    expert_TE = np.full((T, E), E)
    for expert in range(E):
        expert_TE[choose(np.asarray(scores_TE).T[expert][None], capacity)[0], expert] = expert
    return expert_TE


def keep(expert_TK: np.ndarray, num_experts: int, capacity: int) -> np.ndarray:
    """[T, K] bool: rows in token-major order fill the experts; E marks no row."""
    used = [0] * (num_experts + 1)
    kept = np.zeros(expert_TK.shape, bool)
    for token, experts in enumerate(expert_TK):
        for choice, expert in enumerate(experts):
            kept[token, choice] = expert < num_experts and used[expert] < capacity
            used[expert] += 1
    return kept


def combine_weights(moe: MoEConfig, logits_TE: jax.Array, expert_TK: jax.Array) -> jax.Array:
    """[T, K]: softmax or sigmoid scores of the chosen experts, over their sum where the router says so."""
    odds_TE = jnp.exp(logits_TE)
    by_sigmoid = moe.router == "sigmoid_bias"
    scores_TE = odds_TE / (1 + odds_TE) if by_sigmoid else odds_TE / jnp.sum(odds_TE, axis=1, keepdims=True)
    chosen_TK = jnp.take_along_axis(scores_TE, jnp.minimum(expert_TK, moe.num_experts - 1), axis=1)
    if moe.router == "expert_choice" or moe.top_k == 1 or not moe.renormalise:
        return chosen_TK
    return chosen_TK / jnp.sum(chosen_TK, axis=1, keepdims=True)


def moe_loop(
    x_TD: jax.Array,
    weight_TK: jax.Array,
    weights: ExpertWeights,
    expert_TK: jax.Array,
    kept_TK: jax.Array,
    activation: str = "swiglu",
) -> jax.Array:
    """y_t = Σ over kept choices of weight · expert(x_t), every expert on every token; differentiable."""
    y_TD = jnp.zeros_like(x_TD)
    for expert in range(weights.w_up_EDF.shape[0]):
        weight_T = jnp.sum(weight_TK * ((expert_TK == expert) & kept_TK), axis=1)
        y_TD += weight_T[:, None] * one_expert(weights, expert, x_TD, activation)
    return y_TD


def one_expert(weights: ExpertWeights, expert: int, x_TD: jax.Array, activation: str) -> jax.Array:
    def linear(x, kernel, bias):
        return x @ kernel[expert] + (0.0 if bias is None else bias[expert][None, :])

    up = linear(x_TD, weights.w_up_EDF, weights.b_up_EF)
    if activation == "swiglu":
        gate = linear(x_TD, weights.w_gate_EDF, weights.b_gate_EF)
        hidden = gate / (1 + jnp.exp(-gate)) * up
    else:
        hidden = {"relu": jax.nn.relu, "gelu": jax.nn.gelu}[activation](up)
    return linear(hidden, weights.w_down_EFD, weights.b_down_ED)


def make_weights(
    num_experts: int, D: int, F: int, *, activation: str = "swiglu", bias: bool = False, seed: int = 7
) -> ExpertWeights:
    """Random experts, about as large as keeps the outputs near one."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal((num_experts, *shape)) / 3, jnp.float32)

    gated = activation == "swiglu"
    return ExpertWeights(
        w_up_EDF=normal(D, F),
        w_down_EFD=normal(F, D),
        w_gate_EDF=normal(D, F) if gated else None,
        b_up_EF=normal(F) if bias else None,
        b_gate_EF=normal(F) if bias and gated else None,
        b_down_ED=normal(D) if bias else None,
    )


def assert_trees_close(actual, expected, rtol: float) -> None:
    """Each leaf within ``rtol`` of the expected one, relative to that leaf's largest element."""
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.max(jnp.abs(want))) + 1e-30
        np.testing.assert_allclose(np.asarray(got) / scale, np.asarray(want) / scale, atol=rtol, rtol=0)
