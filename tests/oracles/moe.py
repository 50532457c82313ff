"""A MoE layer as loops over tokens, choices and experts, and each router as its paper's sentence says it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.model.machine import Machine
from moe_jax.model.mlp import ExpertWeights
from moe_jax.model.moe.backends import for_machine


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


def shifts_to_share(biased_TE: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """[E] each: between which shifts of its s + bias alone each expert is above the thresholds of T·K/E tokens."""
    T, E = biased_TE.shape
    sorted_TE = -np.sort(-biased_TE.astype(np.float64))
    missing_TE = np.sort(sorted_TE[:, top_k - 1 : top_k + 1].mean(axis=1)[:, None] - biased_TE, axis=0)
    return missing_TE[T * top_k // E - 1], missing_TE[T * top_k // E]


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


def experts_of(size_E, num_slots: int) -> np.ndarray:
    """[S]: the expert of each of the sorted slots; E past the last expert's."""
    E = len(size_E)
    return np.append(np.repeat(np.arange(E), size_E), np.full(num_slots - sum(size_E), E))


def one_by_one(weights: ExpertWeights, x_SD: jax.Array, expert_S: jax.Array, activation: str) -> jax.Array:
    """Each row through its own expert; zeros for rows of none."""
    one_S1 = jnp.ones((x_SD.shape[0], 1), x_SD.dtype)
    return moe_loop(x_SD, one_S1, weights, expert_S[:, None], one_S1 > 0, activation)


@functools.partial(jax.jit, static_argnames=("mlp", "activation"))
def with_gradients(mlp, weights: ExpertWeights, x_SD: jax.Array, rows: jax.Array, activation: str, dy_SD: jax.Array):
    """(y, its gradients) of ``mlp(weights, x, rows, activation)``, by weights and x."""
    y_SD, vjp = jax.vjp(lambda weights, x_SD: mlp(weights, x_SD, rows, activation), weights, x_SD)
    return y_SD, vjp(dy_SD)


def assert_equals_one_by_one(mlp, load, activation: str, bias: bool, num_slots: int) -> None:
    """``mlp(weights, x_SD, size_E, activation)`` on sorted rows: values and gradients; the rest may be anything."""
    weights = make_weights(len(load), 6, 10, activation=activation, bias=bias)
    rng = np.random.default_rng(1)
    real = np.arange(num_slots)[:, None] < sum(load)
    x_SD, dy_SD = rng.standard_normal((2, num_slots, 6)).astype(np.float32)
    dy_SD = np.where(real, dy_SD, 0)
    expert_S = experts_of(load, num_slots)
    want, (want_dweights, want_dx) = with_gradients(one_by_one, weights, x_SD, expert_S, activation, dy_SD)
    y_SD, (dweights, dx) = with_gradients(mlp, weights, x_SD, jnp.asarray(load, jnp.int32), activation, dy_SD)
    assert_trees_close((jnp.where(real, y_SD, 0), jnp.where(real, dx, 0)), (want, want_dx), 2e-6)
    assert_trees_close(dweights, want_dweights, 2e-6)


def assert_equals_one_by_one_on_a_gpu(mlp, dtype: str) -> None:
    """As ``assert_equals_one_by_one``, for shapes that kernels take, against float32 to what ``dtype`` can hold."""
    load = [0, 128, 0, 512, 256, 64, 32, 32]
    weights, expert_S = make_weights(8, 128, 256), experts_of(load, sum(load))
    x_SD = jax.random.normal(jax.random.key(0), (sum(load), 128)).astype(dtype)
    y_SD, gradients = with_gradients(mlp, weights, x_SD, jnp.asarray(load, jnp.int32), "swiglu", jnp.ones_like(x_SD))
    with jax.default_matmul_precision("highest"):
        x_SD = x_SD.astype(jnp.float32)
        want, want_gradients = with_gradients(one_by_one, weights, x_SD, expert_S, "swiglu", jnp.ones_like(x_SD))
    assert_trees_close(y_SD.astype(jnp.float32), want, 4 * 2.0**-7)
    for got, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True):
        assert_trees_close(got.astype(jnp.float32), expected, 8 * 2.0**-7)


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


def on_cpu(model: ModelConfig, num_tokens: int = 4096, *, train: bool = False) -> ModelConfig:
    """``model`` as a decoder needs it: with the backend that a CPU takes for so many tokens where none is set."""
    interpreted = model.moe.dispatch == "pallas"  # which is refused on a CPU, but can be run there
    return for_machine(model, num_tokens, train=train, machine=Machine("gpu" if interpreted else "cpu"))
