"""An untrained model of eight letters, and its engine."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.config import Config, ModelConfig, MoEConfig
from moe_jax.model.decoder import Decoder, Tokens, Variables, initial_expert_bias
from moe_jax.model.moe.backends import Machine
from moe_jax.prepare.tokenizer import build_tokenizer
from moe_jax.sampling.engine import Engine
from tests.oracles.moe import on_cpu

TOKENIZER = build_tokenizer("char", ["abcdefgh"])
CONFIG = ModelConfig(
    context_length=16,
    num_layers=2,
    embed_dim=16,
    num_heads=2,
    init_std=0.4,
    moe=MoEConfig(num_experts=4, expert_dim=8, capacity_factor=1.0),
)


def make_trained(config, tokenizer=TOKENIZER):
    """(training decoder, its variables) of a model of ``config``."""
    decoder = Decoder(on_cpu(config), tokenizer.vocab_size)
    params = nn.unbox(jax.jit(decoder.init)(jax.random.key(1), Tokens(jnp.zeros((1, 2), jnp.int32))))["params"]
    return decoder, Variables(params, initial_expert_bias(config))


def make(config, tokenizer=TOKENIZER, end_token=None):
    """(engine, its variables, the decoder that takes them) of a model of ``config``."""
    engine = Engine(Config(model=config), tokenizer, Machine("cpu"), end_token=end_token)
    variables = engine.prepare(make_trained(config, tokenizer)[1])
    return engine, variables, engine.programs.decoder_for(4096)
