"""The front end of sampling: text in, text out."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from moe_jax.command import UserError
from moe_jax.config import Config, ModelConfig, SampleConfig
from moe_jax.data.tokenizer import Tokenizer, document_end, document_start, load_tokenizer
from moe_jax.model.decoder import Decoder, Variables, initial_expert_bias, unstack
from moe_jax.model.moe.choice import on_this_machine
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.restore import restore_items
from moe_jax.sampling.decode import CHUNK, Rows, Settings, decode, prefill
from moe_jax.sampling.text_stream import StopStream, TextStream, stop_in

_BATCH = 32
"""Texts that are generated together, at most."""


@dataclass(frozen=True)
class Sample:
    prompt: str
    text: str
    """What was generated after the prompt."""
    tokens: list[int]
    """The generated tokens, without the one that ended them."""
    logprobs: list[float]
    """Of each token, the natural logarithm of its probability under the model, before temperature and what follows."""
    finish_reason: str
    """"stop": the end of a document, or a stop; "length": max_new_tokens; "context": no position was left."""


class Plan(NamedTuple):
    """What is to be done for one text."""

    prompt_ids: list[int]
    num_tokens: int
    """To draw after them."""


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
        self.config = model = on_this_machine(model)
        self.tokenizer = tokenizer
        self._start, self._end = document_start(tokenizer), document_end(tokenizer)
        # A window starts anywhere in a text, and so does a prompt; other rows have documents from their start.
        self._prefix = [] if config.data.mode == "windows" else [self._start]
        decoder = Decoder(model, tokenizer.vocab_size, unstacked=True)
        self._unstack = jax.jit(lambda variables: unstack(variables, model))
        self._prefill = jax.jit(functools.partial(prefill, decoder), static_argnames="keep_seen")
        # The state is given up to the call, so that its caches are changed in place.
        self._decode = jax.jit(functools.partial(decode, decoder, end_token=self._end), donate_argnames="state")

    def generate(self, variables: Variables, prompt: str, sample: SampleConfig) -> list[Sample]:
        """``sample.num_samples`` continuations of ``prompt``, or texts from nothing where it is empty.

        ``variables`` are those of the training decoder. Raises UserError for a prompt longer than the context.
        """
        return self.generate_all(variables, [prompt], sample)

    def generate_all(self, variables: Variables, prompts: Sequence[str], sample: SampleConfig) -> list[Sample]:
        """``sample.num_samples`` continuations of the first prompt, then of the next, of any lengths, many at a time.

        What is drawn for a prompt depends on the others by nothing but rounding. Raises UserError before any work.
        """
        jobs = [
            (prompt, number, plan)
            for prompt in prompts
            for plan in [self._plan(prompt, sample)]
            for number in range(sample.num_samples)
        ]
        found = []
        for start in range(0, len(jobs), _BATCH):
            of_rows, numbers, plans = zip(*jobs[start : start + _BATCH], strict=True)
            chunks = []
            for chunk in self._chunks(variables, plans, numbers, sample):
                chunks.append(chunk)
                rows = np.concatenate([tokens_BS for tokens_BS, _ in chunks], axis=1).tolist() if sample.stop else []
                if rows and all(self._has_ended(row, sample.stop) for row in rows):
                    break
            tokens_BS, logprobs_BS = (np.concatenate(parts, axis=1).tolist() for parts in zip(*chunks, strict=True))
            found += map(self._sample, of_rows, tokens_BS, logprobs_BS, plans, [sample] * len(plans))
        return found

    def stream(self, variables: Variables, prompt: str, sample: SampleConfig) -> Iterator[str]:
        """The text of the first of ``generate``'s samples in pieces of whole characters, as they are drawn.

        Raises UserError as ``generate`` does, before the first piece.
        """
        plan = self._plan(prompt, sample)
        text, shown = TextStream(self.tokenizer), StopStream(sample.stop)
        for tokens_BS, _ in self._chunks(variables, [plan], [0], sample):
            yield shown.add(text.add(self._before_end(tokens_BS[0].tolist())))
            if shown.is_stopped:
                return
        yield shown.add(text.finish()) + shown.finish()

    def _plan(self, prompt: str, sample: SampleConfig) -> Plan:
        """The prompt's ids, and how many tokens to draw after them. Raises UserError."""
        # A foreign tokenizer may have no token for a prompt of spaces.
        prompt_ids = [*self._prefix, *self.tokenizer.encode(prompt).tolist()] or [self._start]
        context = self.config.context_length
        if len(prompt_ids) > context:
            raise UserError(
                f"the prompt must fit the context of {context} tokens, got {len(prompt_ids)}; shorten the prompt"
            )
        # Learned positions end with the context; the last token drawn needs no position of its own.
        room = context - len(prompt_ids) + 1 if self.config.positions == "learned" else sample.max_new_tokens
        return Plan(prompt_ids, min(sample.max_new_tokens, room))

    def _chunks(
        self, variables: Variables, plans: Sequence[Plan], samples: Sequence[int], sample: SampleConfig
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens, log-probabilities) [B, S] of one chunk after another, as ``decode`` gives them."""
        longest = max(len(plan.prompt_ids) for plan in plans)
        padded_BL = np.zeros((len(plans), min(self.config.context_length, _power_of_two(longest))), np.int32)
        for row, plan in enumerate(plans):
            padded_BL[row, : len(plan.prompt_ids)] = plan.prompt_ids
        rows = Rows(
            prompt_length_B=jnp.asarray([len(plan.prompt_ids) for plan in plans], jnp.int32),
            sample_B=jnp.asarray(samples, jnp.int32),
            num_tokens_B=jnp.asarray([plan.num_tokens for plan in plans], jnp.int32),
        )
        settings = _settings(sample, self.tokenizer.vocab_size)
        unstacked = self._unstack(variables)
        state = self._prefill(unstacked, padded_BL, rows, keep_seen=settings.has_penalty)
        index, last, all_ended = 0, max(plan.num_tokens for plan in plans), False
        while index < last and not all_ended:
            # The first token is a chunk of its own, for a reader who waits for it.
            stop = min(last, index + CHUNK) if index else 1
            drawn, state = self._decode(unstacked, state, rows, settings, jnp.asarray(stop, jnp.int32))
            all_ended = bool(np.all(state.ended_B))
            yield np.asarray(drawn.tokens_BS)[:, : stop - index], np.asarray(drawn.logprobs_BS)[:, : stop - index]
            index = stop

    def _sample(self, prompt: str, row: list[int], logprobs: list[float], plan: Plan, sample: SampleConfig) -> Sample:
        # A row is filled up once it has its own number of tokens.
        row = row[: plan.num_tokens]
        tokens = self._before_end(row)
        unfinished = "length" if plan.num_tokens == sample.max_new_tokens else "context"
        reason = "stop" if self._end in row else unfinished
        if sample.stop and self._stops_in(tokens, sample.stop):
            # The tokens up to the one that completes the first stop.
            size = next(n for n in range(1, len(tokens) + 1) if self._stops_in(tokens[:n], sample.stop))
            tokens, reason = tokens[:size], "stop"
        text = self.tokenizer.decode(tokens)
        return Sample(prompt, text[: stop_in(text, sample.stop)], tokens, logprobs[: len(tokens)], reason)

    def _stops_in(self, tokens: list[int], stops: Sequence[str]) -> bool:
        return stop_in(self.tokenizer.decode(tokens), stops) is not None

    def _has_ended(self, row: list[int], stops: Sequence[str]) -> bool:
        return self._end in row or self._stops_in(row, stops)

    def _before_end(self, row: list[int]) -> list[int]:
        return row[: row.index(self._end)] if self._end in row else row


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
        min_p=jnp.asarray(sample.min_p, jnp.float32),
        repetition_penalty=jnp.asarray(sample.repetition_penalty, jnp.float32),
        is_greedy=sample.temperature == 0,
        has_penalty=sample.repetition_penalty != 1,
    )


def _power_of_two(length: int) -> int:
    """Shapes are rounded up, so that prompts of many lengths share a few compiled programs."""
    return 1 << (length - 1).bit_length()
