"""A MoE layer as a loop over tokens, choices and experts."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.model.moe.experts import ExpertWeights


def choose(logits_TE: np.ndarray, top_k: int) -> np.ndarray:
    """[T, K]: each token's highest scores, the lower expert first among equals."""
    return np.argsort(-np.asarray(logits_TE), axis=-1, kind="stable")[:, :top_k]


def keep(expert_TK: np.ndarray, num_experts: int, capacity: int) -> np.ndarray:
    """[T, K] bool: rows in token-major order fill the experts; E marks a masked token."""
    used = [0] * (num_experts + 1)
    kept = np.zeros(expert_TK.shape, bool)
    for token, experts in enumerate(expert_TK):
        for choice, expert in enumerate(experts):
            kept[token, choice] = expert < num_experts and used[expert] < capacity
            used[expert] += 1
    return kept


def moe_loop(
    x_TD: jax.Array,
    logits_TE: jax.Array,
    weights: ExpertWeights,
    expert_TK: np.ndarray,
    kept_TK: np.ndarray,
    activation: str = "swiglu",
) -> jax.Array:
    """y_t = Σ over kept choices of weight · expert(x_t), every expert on every token; differentiable."""
    chosen_TK = jnp.take_along_axis(logits_TE, jnp.asarray(expert_TK), axis=1)
    weight_TK = jax.nn.softmax(chosen_TK) if chosen_TK.shape[1] > 1 else jnp.exp(chosen_TK) / total(logits_TE)
    y_TD = jnp.zeros_like(x_TD)
    for expert in range(logits_TE.shape[1]):
        weight_T = jnp.sum(weight_TK * ((expert_TK == expert) & kept_TK), axis=1)
        y_TD += weight_T[:, None] * one_expert(weights, expert, x_TD, activation)
    return y_TD


def total(logits_TE: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(logits_TE), axis=1, keepdims=True)


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
