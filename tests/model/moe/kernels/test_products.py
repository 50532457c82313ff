"""Grouped products against one expert after the other, what kernels leave undefined, and what ``by_row`` reads."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.model.moe.kernels.products import mlp_by_products
from moe_jax.model.moe.layer import MoE
from tests.oracles.moe import assert_equals_one_by_one
from tests.oracles.programs import calls_of, equations_of

D, F, E, S = 6, 10, 5, 48
LOADS = [(16, 8, 4, 12, 8), (0, 48, 0, 0, 0), (3, 0, 27, 0, 12), (0, 0, 0, 0, 0)]


def with_product(product):
    return lambda weights, x_SD, size_E, activation: mlp_by_products(product, weights, activation, x_SD, size_E)


@pytest.mark.parametrize(("activation", "bias"), [("swiglu", True), ("gelu", False), ("relu", True)])
def test_ragged_products_equal_one_expert_after_the_other(activation, bias):
    for load in LOADS:
        assert_equals_one_by_one(with_product(jax.lax.ragged_dot), load, activation, bias, S)


def test_what_a_kernel_leaves_undefined_reaches_nothing():
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
    assert_equals_one_by_one(with_product(product), (0, 16, 8, 0, 4), "swiglu", True, S)


def test_a_layer_of_one_token_reads_the_weights_of_its_experts_only():
    E, K = 16, 2
    moe = MoEConfig(num_experts=E, top_k=K, expert_dim=F, dispatch="by_row")
    layer = MoE(ModelConfig(embed_dim=D, moe=moe))
    x_GTD = jnp.ones((1, 1, D))
    params = jax.eval_shape(lambda: layer.init(jax.random.key(0), x_GTD, train=False))
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
