"""Grouped matrix products: each backend against one expert after the other, and how much each of them computes."""

import functools
import itertools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.errors import UserError
from moe_jax.model.moe.choice import BY_ROW_ROWS, choose_dispatch
from moe_jax.model.moe.dispatch import num_slots
from moe_jax.model.moe.grouped import (
    _blocks,
    block_sizes,
    blocked_mlp,
    by_row_mlp,
    ragged_mlp,
    tokamax_mlp,
)
from moe_jax.model.moe.layer import MoE
from tests.oracles.moe import assert_trees_close, make_weights, one_expert
from tests.oracles.programs import calls_of, equations_of

D, F, E, S = 6, 10, 5, 48
SIZES = (16, 8, 4)
# Slots of each expert, multiples of 4: every mixture of blocks, none at all, and slots past the last expert's.
LOADS = [(16, 8, 4, 12, 8), (0, 48, 0, 0, 0), (4, 0, 28, 0, 12), (0, 0, 0, 0, 0), (20, 4, 4, 4, 4)]


def experts_of(size_E):
    """[S]: the expert of each slot; E past the last expert's."""
    return np.append(np.repeat(np.arange(E), size_E), np.full(S - sum(size_E), E))


@functools.partial(jax.jit, static_argnames="activation")
def one_by_one(weights, x_SD, expert_S, activation):
    """Every expert on all rows, of which it is asked for its own; zeros for rows of none."""
    return sum(
        jnp.where((expert_S == expert)[:, None], one_expert(weights, expert, x_SD, activation), 0)
        for expert in range(weights.w_up_EDF.shape[0])
    )


@functools.partial(jax.jit, static_argnames="activation")
def one_by_one_with_gradients(weights, x_SD, expert_S, activation, projection_SD):
    y_SD, vjp = jax.vjp(lambda w, x: one_by_one(w, x, expert_S, activation), weights, x_SD)
    return y_SD, vjp(projection_SD)


def by_row(weights, x_SD, size_E, activation):
    expert_S = jnp.repeat(jnp.arange(E), size_E, total_repeat_length=S)
    return by_row_mlp(weights, x_SD, expert_S, activation)


BACKENDS = {
    "blocked": functools.partial(blocked_mlp, sizes=SIZES),
    "ragged": ragged_mlp,
    "by_row": by_row,
}


@functools.partial(jax.jit, static_argnames=("backend", "activation"))
def run(backend, weights, x_SD, size_E, activation, projection_SD):
    mlp = BACKENDS[backend]
    if backend == "blocked":  # a custom_vjp function takes its static arguments by place
        y_SD, vjp = jax.vjp(lambda w, x: blocked_mlp(w, x, size_E, activation, SIZES), weights, x_SD)
    else:
        y_SD, vjp = jax.vjp(lambda w, x: mlp(w, x, size_E, activation), weights, x_SD)
    return y_SD, vjp(projection_SD)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("activation", "bias"), [("swiglu", True), ("gelu", False), ("relu", True)])
def test_every_backend_equals_one_expert_after_the_other(backend, activation, bias):
    weights = make_weights(E, D, F, activation=activation, bias=bias)
    rng = np.random.default_rng(1)
    x_SD = rng.standard_normal((S, D)).astype(np.float32)
    for load in LOADS:
        real = np.arange(S)[:, None] < sum(load)
        projection_SD = np.where(real, rng.standard_normal((S, D)), 0).astype(np.float32)
        arguments = (weights, x_SD, experts_of(load), activation, projection_SD)
        want, (want_dweights, want_dx) = one_by_one_with_gradients(*arguments)
        y_SD, (dweights, dx) = run(backend, weights, x_SD, jnp.asarray(load, jnp.int32), activation, projection_SD)
        assert_trees_close(jnp.where(real, y_SD, 0), want, 2e-6)
        assert_trees_close(jnp.where(real, dx, 0), want_dx, 2e-6)
        assert_trees_close(dweights, want_dweights, 2e-6)


def test_blocks_leave_rows_past_the_last_expert_alone():
    poisoned = jnp.full((S, D), jnp.nan).at[:16].set(1.0)
    size_E = jnp.asarray([4, 0, 8, 0, 4])
    y_SD, (dweights, dx) = run("blocked", make_weights(E, D, F), poisoned, size_E, "swiglu", poisoned)
    assert np.all(np.asarray(y_SD)[16:] == 0)
    assert np.all(np.asarray(dx)[16:] == 0)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((dweights, y_SD)))


@pytest.mark.parametrize("load", LOADS)
def test_blocks_cover_every_slot_once_and_hold_one_expert_each(load):
    covered = np.full(S, -1)
    for blocks in _blocks(jnp.asarray(load), SIZES, S):
        for index in range(int(blocks.count)):
            start = int(blocks.start_I[index])
            assert np.all(covered[start : start + blocks.size] == -1)
            covered[start : start + blocks.size] = blocks.expert_I[index]
    np.testing.assert_array_equal(covered, np.where(experts_of(load) < E, experts_of(load), -1))


def test_sorted_computes_at_most_half_as_much_again_as_it_must():
    # The slots are what all blocks together may compute, each once in each of the three (backward six) products.
    for T, K, E in itertools.product([1, 7, 64, 100, 1000, 8192], [1, 2, 8], [1, 4, 8, 64, 100]):
        if K <= E and T * K >= 16 * E:
            sizes = block_sizes(T * K, E)
            assert all(large % small == 0 for large, small in itertools.pairwise(sizes))
            assert num_slots(T * K, E, sizes[-1]) <= 1.5 * T * K


def test_a_layer_of_one_token_reads_the_weights_of_its_experts_only():
    E, K = 16, 2
    moe = MoEConfig(num_experts=E, top_k=K, expert_dim=F)
    layer = MoE(ModelConfig(embed_dim=D, moe=moe))
    x_GTD = jnp.ones((1, 1, D))
    params = layer.init(jax.random.key(0), x_GTD, train=False)
    program = jax.make_jaxpr(lambda params: layer.apply(params, x_GTD, train=False)[0])(params)
    matrices = {(E, D, F), (E, F, D)}
    reads = [
        equation
        for equation in equations_of(program.jaxpr)
        if not calls_of(equation) and matrices & {getattr(read.aval, "shape", None) for read in equation.invars}
    ]
    # All that touches the experts' matrices takes a slice of one expert for each of the K rows.
    assert [equation.primitive.name for equation in reads] == ["gather"] * 3
    assert {equation.params["slice_sizes"][0] for equation in reads} == {1}
    assert {equation.outvars[0].aval.shape[0] for equation in reads} == {K}
    # And so what the others hold does not matter.
    weights = make_weights(8, D, F)
    others = jnp.asarray([0, 1, 3, 4, 6, 7])
    poisoned = jax.tree.map(lambda leaf: leaf.at[others].set(jnp.nan), weights)
    assert jnp.all(jnp.isfinite(by_row_mlp(poisoned, jnp.ones((2, D)), jnp.asarray([5, 2]), "swiglu")))


def pretend(monkeypatch, device, packages=()):
    """This process has one device of that kind, and of other people's packages only ``packages``."""
    platform = device if device in ("cpu", "tpu") else "gpu"
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=device)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in packages else None)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cpu", "tokamax needs an NVIDIA GPU, got a cpu; set it to auto"),
        ("AMD Instinct", "tokamax needs an NVIDIA GPU, got a AMD Instinct; set it to auto"),
        ("NVIDIA H100", "needs the package tokamax, which is not installed; pip install tokamax"),
    ],
)
def test_tokamax_where_it_cannot_run_is_refused_with_the_remedy(monkeypatch, device, words):
    pretend(monkeypatch, device)
    with pytest.raises(UserError, match=words):
        choose_dispatch(MoEConfig(grouped_matmul="tokamax"), 4096, train=True)


def test_tokamax_is_called_with_kernels_only_and_computes_the_mlp(monkeypatch):
    # Stands in for the package, which CI does not install: the call's shape and what is made of its results.
    calls = []

    def ragged_dot(lhs, rhs, group_sizes, *, implementation):
        calls.append(implementation)
        return jax.lax.ragged_dot(lhs, rhs, group_sizes)

    monkeypatch.setitem(sys.modules, "tokamax", types.SimpleNamespace(ragged_dot=ragged_dot))
    weights, x_SD, load = make_weights(E, D, F, bias=True), jnp.ones((S, D)), LOADS[0]
    got = tokamax_mlp(weights, x_SD, jnp.asarray(load), "swiglu")
    assert_trees_close(got, one_by_one(weights, x_SD, experts_of(load), "swiglu"), 2e-6)
    assert calls == [("mosaic", "triton")] * 3, "XLA's product, dense over all experts, is never among them"


def test_what_a_kernel_leaves_undefined_reaches_nothing(monkeypatch):
    # Rows past the last expert's and gradients of experts without rows hold anything, NaN included, with some kernels.
    @jax.custom_vjp
    def product(lhs, rhs, group_sizes):
        y = jax.lax.ragged_dot(lhs, rhs, group_sizes)
        return jnp.where((jnp.arange(S) < jnp.sum(group_sizes))[:, None], y, jnp.nan)

    def forward(lhs, rhs, group_sizes):
        return product(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)

    def backward(residuals, dy):
        lhs, rhs, group_sizes = residuals
        _, vjp = jax.vjp(lambda lhs, rhs: jax.lax.ragged_dot(lhs, rhs, group_sizes), lhs, rhs)
        dlhs, drhs = vjp(dy)
        dlhs = jnp.where((jnp.arange(S) < jnp.sum(group_sizes))[:, None], dlhs, jnp.nan)
        return dlhs, jnp.where((group_sizes > 0)[:, None, None], drhs, jnp.nan), None

    product.defvjp(forward, backward)
    stand_in = types.SimpleNamespace(ragged_dot=lambda lhs, rhs, sizes, implementation: product(lhs, rhs, sizes))
    monkeypatch.setitem(sys.modules, "tokamax", stand_in)
    weights, load = make_weights(E, D, F, bias=True), (0, 16, 8, 0, 4)
    real = np.arange(S)[:, None] < sum(load)
    x_SD = np.where(real, np.random.default_rng(0).standard_normal((S, D)), 0).astype(np.float32)
    projection_SD = np.broadcast_to(real, (S, D)).astype(np.float32)
    want, (want_dweights, want_dx) = one_by_one_with_gradients(
        weights, x_SD, experts_of(load), "swiglu", projection_SD
    )
    y_SD, vjp = jax.vjp(lambda w, x: tokamax_mlp(w, x, jnp.asarray(load), "swiglu"), weights, x_SD)
    dweights, dx = vjp(jnp.asarray(projection_SD))
    assert_trees_close((jnp.where(real, y_SD, 0), dx), (want, want_dx), 2e-6)
    assert_trees_close(dweights, want_dweights, 2e-6)


def test_gradients_of_weights_add_up_in_float32_over_many_blocks():
    # One expert has 400 rows of bfloat16 in blocks of 8: added up in bfloat16 their sum would lose its last bits.
    rng = np.random.default_rng(0)
    weights = make_weights(1, D, F)
    x_SD, dy_SD = (jnp.asarray(1 + 0.1 * rng.standard_normal((400, D)), jnp.bfloat16) for _ in range(2))
    _, vjp = jax.vjp(lambda w: blocked_mlp(w, x_SD, jnp.asarray([400]), "swiglu", (8,)), weights)
    whole = x_SD.astype(jnp.float32), dy_SD.astype(jnp.float32)
    _, want_vjp = jax.vjp(lambda w: one_expert(w, 0, whole[0], "swiglu"), weights)
    # What is kept in between is bfloat16, with errors of either sign.
    assert_trees_close(vjp(dy_SD), want_vjp(whole[1]), 2.0**-9)


def test_the_real_tokamax_equals_one_expert_after_the_other():
    pytest.importorskip("tokamax")
    weights, load = make_weights(E, D, F), LOADS[0]
    x_SD = jax.random.normal(jax.random.key(0), (S, D))
    got = tokamax_mlp(weights, x_SD, jnp.asarray(load), "swiglu", implementation="xla")
    assert_trees_close(got, one_by_one(weights, x_SD, experts_of(load), "swiglu"), 2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("backend", ["blocked", "tokamax"])
def test_on_a_gpu_every_backend_equals_the_dense_loop(backend, dtype):
    E, D, F = 8, 128, 256
    load = [0, 128, 0, 512, 256, 64, 32, 32]
    S = sum(load)
    weights = make_weights(E, D, F)
    x_SD = jax.random.normal(jax.random.key(0), (S, D)).astype(dtype)
    mlp = tokamax_mlp if backend == "tokamax" else lambda w, x, s, a: blocked_mlp(w, x, s, a, (128, 32))
    y_SD, vjp = jax.vjp(lambda w, x: mlp(w, x, jnp.asarray(load, jnp.int32), "swiglu"), weights, x_SD)
    with jax.default_matmul_precision("highest"):
        x32_SD, expert_S = x_SD.astype(jnp.float32), np.repeat(np.arange(E), load)
        want, want_vjp = jax.vjp(lambda w, x: one_by_one(w, x, expert_S, "swiglu"), weights, x32_SD)
    assert_trees_close(y_SD.astype(jnp.float32), want, 4 * 2.0**-7)
    for got, expected in zip(
        jax.tree.leaves(vjp(jnp.ones_like(y_SD))), jax.tree.leaves(want_vjp(jnp.ones_like(want))), strict=True
    ):
        assert_trees_close(got.astype(jnp.float32), expected, 8 * 2.0**-7)


SLOTS = {"capacity_factor": 1.0}
CHOICE = {"router": "expert_choice", "capacity_factor": 1.0}


@pytest.mark.parametrize(
    ("device", "moe", "train", "expected"),
    [
        ("cpu", {}, True, ("sorted", "blocked")),
        ("tpu", {}, True, ("sorted", "ragged")),
        ("NVIDIA H100", {}, True, ("sorted", "tokamax")),
        ("AMD Instinct", {}, True, ("sorted", "blocked")),
        ("cpu", SLOTS, True, ("gather", None)),
        ("cpu", SLOTS, False, ("sorted", "blocked")),
        ("cpu", CHOICE, False, ("gather", None)),
        ("cpu", CHOICE | {"dispatch": "sorted"}, True, ("sorted", "blocked")),
        ("cpu", {"dispatch": "einsum"}, False, ("einsum", None)),
        ("NVIDIA H100", {"dispatch": "sorted", "grouped_matmul": "ragged"}, True, ("sorted", "ragged")),
    ],
)
def test_auto_picks_by_device_and_capacity_and_never_a_dense_product(monkeypatch, device, moe, train, expected):
    pretend(monkeypatch, device, packages=("tokamax",))
    choice = choose_dispatch(MoEConfig(**moe), 4096, train=train)
    assert (choice.dispatch, choice.grouped_matmul) == expected
    is_dense = choice.dispatch == "einsum" or (choice.grouped_matmul == "ragged" and device != "tpu")
    assert ("E/K times" in str(choice)) == is_dense, "a dense product is said"


def test_auto_without_tokamax_says_what_a_gpu_is_missing(monkeypatch):
    pretend(monkeypatch, "NVIDIA H100")
    choice = choose_dispatch(MoEConfig(), 4096, train=True)
    assert choice.grouped_matmul == "blocked"
    assert "pip install tokamax" in choice.reason


def test_experts_that_choose_have_a_row_for_every_token_and_expert():
    moe = MoEConfig(num_experts=64, top_k=2, dispatch="sorted", **CHOICE)
    assert choose_dispatch(moe, 2, train=True).grouped_matmul == "blocked"


def test_a_handful_of_rows_is_not_sorted():
    assert choose_dispatch(MoEConfig(top_k=2), BY_ROW_ROWS // 2, train=False).grouped_matmul == "by_row"
    assert choose_dispatch(MoEConfig(top_k=2), BY_ROW_ROWS, train=False).grouped_matmul == "blocked"
