"""An untrained model of eight letters, and its engine."""

import functools
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import Config, ModelConfig, MoEConfig
from moe_jax.data.tokenizer import document_end
from moe_jax.model.decoder import Decoder, Tokens, Variables, forward, initial_expert_bias
from moe_jax.model.machine import Machine
from moe_jax.prepare.tokenizer import build_tokenizer
from moe_jax.sampling.engine import Engine
from tests.oracles.moe import on_cpu

TOKENIZER = build_tokenizer("char", ["abcdefgh"])
END = document_end(TOKENIZER)
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
    return decoder, Variables(_new_params(decoder), initial_expert_bias(config))


@functools.cache  # what compiles longest in many tests, of the same few models
def _new_params(decoder):
    return nn.unbox(jax.jit(decoder.init)(jax.random.key(1), Tokens(jnp.zeros((1, 2), jnp.int32))))["params"]


def run_of(decoder, variables):
    """A compiled function: tokens [B, L] to logits [B, L, V], without a cache."""
    return lambda tokens_BL: _logits(decoder, variables, jnp.asarray(tokens_BL))


@functools.partial(jax.jit, static_argnames="decoder")
def _logits(decoder, variables, tokens_BL):
    return forward(decoder, variables, Tokens(tokens_BL)).logits_BLV


class Made(typing.NamedTuple):
    engine: Engine
    variables: Variables
    decoder: Decoder
    """The decoder that takes ``variables``."""

    def generate(self, prompt, settings):
        return self.engine.generate(self.variables, prompt, settings)

    def stream(self, prompt, settings):
        return self.engine.stream(self.variables, self.engine.begin(prompt, settings))

    def greedy_loop(self, prompt_ids, count, *, penalty=1.0, end=END):
        """The oracle: the next ``count`` tokens, or those before ``end``, by a forward of the window for each.

        The window is the whole text, until it is full and cut to its last half; what is in the text is penalised.
        """
        run, M = run_of(self.decoder, self.variables), self.decoder.config.context_length
        ids, start = list(prompt_ids), 0
        while len(ids) < len(prompt_ids) + count:
            start = len(ids) - M // 2 if len(ids) - start > M else start
            window = ids[start:] + [0] * (M - len(ids) + start)
            logits_V = np.array(run([window])[0, len(ids) - start - 1])
            for token in set(ids):
                logits_V[token] = logits_V[token] / penalty if logits_V[token] > 0 else logits_V[token] * penalty
            if np.argmax(logits_V) == end:
                break
            ids.append(int(np.argmax(logits_V)))
        return ids[len(prompt_ids) :]


def make(config, tokenizer=TOKENIZER, end_token=None):
    """A model of ``config`` that is ready to sample from."""
    engine = Engine(Config(model=config), tokenizer, Machine("cpu"), end_token=end_token)
    variables = engine.prepare(make_trained(config, tokenizer)[1])
    return Made(engine, variables, engine.programs.decoder_for(4096))
