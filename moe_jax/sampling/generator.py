"""The front end of sampling: text in, text out."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from moe_jax.command import UserError
from moe_jax.config import Config, ModelConfig, SampleConfig
from moe_jax.data.tokenizer import Tokenizer, document_end, document_start, load_tokenizer
from moe_jax.model.decoder import Decoder, Variables, initial_expert_bias, unstack
from moe_jax.runs.checkpoint import restore_items
from moe_jax.runs.layout import RunDirectory
from moe_jax.sampling.decode import Settings, decode, prefill


@dataclass(frozen=True)
class Sample:
    prompt: str
    text: str
    """What was generated after the prompt."""
    tokens: list[int]
    """The generated tokens, without the one that ended them."""
    finish_reason: str
    """"stop": what ends a document was drawn; "length": max_new_tokens reached; "context": no position was left."""


class Generator:
    """A model ready to sample: compiled functions for its shapes, kept from call to call."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        """``config`` of the run. Raises UserError for a model that cannot be sampled from."""
        model = config.model
        if not is_causal(model):
            raise UserError(
                "a model of model.moe.router=expert_choice cannot be sampled from: its experts choose among all "
                "tokens of a text, later ones included; train one with another router"
            )
        # How rows move is a matter of this machine and of few rows, not of the one that trained and of many.
        moe = dataclasses.replace(model.moe, dispatch="auto", grouped_matmul="auto")
        self.config = model = dataclasses.replace(model, moe=moe)
        self.tokenizer = tokenizer
        self._start, self._end = document_start(tokenizer), document_end(tokenizer)
        # A window starts anywhere in a text, and so does a prompt; other rows have documents from their start.
        self._prefix = [] if config.data.mode == "windows" else [self._start]
        decoder = Decoder(model, tokenizer.vocab_size, unstacked=True)
        self._unstack = jax.jit(lambda variables: unstack(variables, model))
        self._prefill = jax.jit(functools.partial(prefill, decoder))
        self._decode = jax.jit(
            functools.partial(decode, decoder, end_token=self._end),
            static_argnames="buffer_length",
        )

    def generate(self, variables: Variables, prompt: str, sample: SampleConfig) -> list[Sample]:
        """``sample.num_samples`` continuations of ``prompt``, or texts from nothing where it is empty.

        ``variables`` are those of the training decoder. Raises UserError for a prompt longer than the context.
        """
        # A foreign tokenizer may have no token for a prompt of spaces.
        prompt_ids = [*self._prefix, *self.tokenizer.encode(prompt)] or [self._start]
        context = self.config.context_length
        if len(prompt_ids) > context:
            raise UserError(
                f"the prompt must fit the context of {context} tokens, got {len(prompt_ids)}; shorten the prompt"
            )
        num_tokens = sample.max_new_tokens
        # Learned positions end with the context; the last token drawn needs no position of its own.
        if self.config.positions == "learned":
            num_tokens = min(num_tokens, context - len(prompt_ids) + 1)
        padded = np.zeros((sample.num_samples, min(context, _power_of_two(len(prompt_ids)))), np.int32)
        padded[:, : len(prompt_ids)] = prompt_ids
        length = jnp.asarray(len(prompt_ids), jnp.int32)
        unstacked = self._unstack(variables)
        logits_BV, caches = self._prefill(unstacked, padded, length)
        drawn_BS = self._decode(
            unstacked,
            logits_BV,
            caches,
            length,
            _settings(sample, self.tokenizer.vocab_size),
            jnp.asarray(num_tokens, jnp.int32),
            buffer_length=_power_of_two(num_tokens),
        )
        rows = np.asarray(drawn_BS)[:, :num_tokens].tolist()
        return [
            self._sample(prompt, row, "length" if num_tokens == sample.max_new_tokens else "context") for row in rows
        ]

    def _sample(self, prompt: str, row: list[int], unfinished: str) -> Sample:
        tokens = row[: row.index(self._end)] if self._end in row else row
        return Sample(prompt, self.tokenizer.decode(tokens), tokens, "stop" if self._end in row else unfinished)


def is_causal(config: ModelConfig) -> bool:
    """Whether the logits after a token depend on it and earlier ones only, as sampling needs."""
    return not config.moe.num_experts or config.moe.router != "expert_choice"


def load_generator(run: RunDirectory, which: Literal["best", "newest"]) -> tuple[Generator, Variables]:
    """The generator of a finished or running training run and its "best" or "newest" variables. Raises UserError."""
    config = run.load_config()
    tokenizer = load_tokenizer(run.tokenizer)
    generator = Generator(config, tokenizer)
    decoder = Decoder(generator.config, tokenizer.vocab_size)
    shapes = jax.eval_shape(lambda: _initial_variables(decoder).to_items())
    device = SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)
    return generator, Variables.from_items(restore_items(run.checkpoints, which, abstract))


def _initial_variables(decoder: Decoder) -> Variables:
    boxed = decoder.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return Variables(nn.unbox(boxed), initial_expert_bias(decoder.config))


def _settings(sample: SampleConfig, vocab_size: int) -> Settings:
    return Settings(
        seed=jnp.asarray(sample.seed, jnp.uint32),
        temperature=jnp.asarray(sample.temperature or 1.0, jnp.float32),
        top_k=jnp.asarray(sample.top_k or vocab_size, jnp.int32),
        top_p=jnp.asarray(sample.top_p, jnp.float32),
        is_greedy=sample.temperature == 0,
    )


def _power_of_two(length: int) -> int:
    """Shapes are rounded up, so that prompts and budgets of many lengths share a few compiled programs."""
    return 1 << (length - 1).bit_length()
