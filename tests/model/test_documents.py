"""Several documents in one row: none sees another, by editing and by gradient, whatever path attention takes."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.model.decoder import Decoder, Tokens, Variables, forward, unstack
from tests.oracles.moe import on_cpu

VOCAB, L = 24, 12
CONFIG = ModelConfig(
    context_length=L,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    init_std=0.3,
    tie_embeddings=False,
    moe=MoEConfig(num_experts=4, expert_dim=8),
)
# Three documents of 5, 4 and 1 tokens, and padding.
SIZES = (5, 4, 1)
SEGMENT_L = np.repeat([1, 2, 3, 0], [*SIZES, L - sum(SIZES)])
POSITION_L = np.concatenate([np.arange(size) for size in (*SIZES, 0)] + [np.zeros(L - sum(SIZES), int)])
TOKENS_L = np.random.default_rng(0).integers(0, VOCAB, L)

# Each way in which attention is computed over a row: under the scan, recomputed for the backward pass, block by block.
PATHS = {
    "scan": {},
    "remat": {"remat": "full"},
    "learned positions": {"positions": "learned"},
    "bfloat16": {"dtype": "bfloat16"},
    "walk": {},
    "blocks": {"attention": "blocks"},
}


@functools.cache
def new_variables(positions):
    """Those of a model with such positions, however it computes."""
    decoder = Decoder(on_cpu(dataclasses.replace(CONFIG, positions=positions)), VOCAB)
    first = Tokens(jnp.zeros((1, 2), jnp.int32))
    return Variables(nn.unbox(jax.jit(decoder.init)(jax.random.key(0), first))["params"])


@pytest.fixture(scope="module", params=PATHS)
def model(request):
    """(function of variables and tokens to logits, variables, the same compiled for them, tolerance)."""
    config = on_cpu(dataclasses.replace(CONFIG, **PATHS[request.param]))
    decoder, variables = Decoder(config, VOCAB), new_variables(config.positions)
    if request.param == "walk":
        decoder, variables = Decoder(config, VOCAB, unstacked=True), unstack(variables, config)

    def logits(variables, tokens):
        return forward(decoder, variables, tokens).logits_BLV

    # Rows of other lengths are rounded at other places: to 2^-8 of a number in bfloat16.
    run = jax.jit(lambda tokens: logits(variables, tokens))
    return logits, variables, run, 2**-6 if request.param == "bfloat16" else 2e-5


def row(tokens_L):
    """A row of documents."""
    return Tokens(*(jnp.asarray(leaf)[None] for leaf in (tokens_L, SEGMENT_L > 0, POSITION_L, SEGMENT_L)))


def test_no_document_sees_another_by_editing(model):
    _, _, run, _ = model
    before = run(row(TOKENS_L))
    for segment in (0, 1, 2, 3):
        edited = np.where(segment == SEGMENT_L, (TOKENS_L + 7) % VOCAB, TOKENS_L)
        after = run(row(edited))
        others = (segment != SEGMENT_L) & (SEGMENT_L > 0)
        np.testing.assert_array_equal(before[0, others], after[0, others])
        if segment:
            assert np.any(before[0, segment == SEGMENT_L] != after[0, segment == SEGMENT_L])


def test_no_document_sees_another_by_gradient(model):
    logits, variables, _, _ = model
    tokens = row(np.arange(L))  # every place its own token, so that the embedding's rows are the places

    def loss(params, segment):
        logits_LV = logits(variables.replace(params=params), tokens)[0]
        return jnp.sum(jnp.where((segment == SEGMENT_L)[:, None], jnp.sin(logits_LV), 0.0))

    # With untied embeddings the output is another matrix, so a row of the embedding has the gradient of its place.
    gradient = jax.jit(jax.grad(loss))
    for segment in (1, 2):
        gradient_VD = gradient(variables.params, segment)["embedding"][:L]
        reached = np.any(np.asarray(gradient_VD) != 0, axis=1)
        np.testing.assert_array_equal(reached, segment == SEGMENT_L)


def test_a_document_in_a_row_is_what_it_is_alone(model):
    _, _, run, tolerance = model
    together = run(row(TOKENS_L))[0]
    first = 0
    for size in SIZES:
        alone_L, mask_BL = np.resize(TOKENS_L[first : first + size], L), jnp.arange(L)[None] < size
        alone = run(Tokens(jnp.asarray(alone_L)[None], mask_BL, jnp.arange(L)[None], mask_BL.astype(int)))[0]
        np.testing.assert_allclose(together[first : first + size], alone[:size], atol=tolerance, rtol=1e-4)
        first += size
