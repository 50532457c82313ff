"""The front end of sampling: text in, text out."""

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from moe_jax.axes import Array
from moe_jax.config import Config, ModelConfig, SampleConfig
from moe_jax.data.tokenizer import Tokenizer, document_end, document_start, load_tokenizer
from moe_jax.errors import UserError
from moe_jax.model.decoder import Decoder, Tokens, Variables, cast_matrices, initial_expert_bias, unstack
from moe_jax.model.moe.backends import this_machine, with_dispatch
from moe_jax.model.moe.routing import ROUTERS
from moe_jax.runs.checkpoint.restore import restore_items
from moe_jax.runs.layout import RunDirectory
from moe_jax.sampling.batch import STREAM_STEPS, Batch
from moe_jax.sampling.decode import DecodeState, Drawn, Rows, decode, empty_state, prefill, take_rows
from moe_jax.sampling.text import Text

_BATCH = 32
"""Texts that are generated together, at most."""

Dtype = Literal["float32", "bfloat16"]


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
    """"stop": the end of a document, or a stop; "length": max_new_tokens."""


class Generator:
    """A model ready to sample: compiled functions for its shapes, kept from call to call."""

    def __init__(self, config: Config, tokenizer: Tokenizer, dtype: Dtype | None = None, end_token: int | None = None):
        """``config`` of the run; ``dtype`` of activations and matrices, None: the run's.

        ``end_token`` ends a text; None: the end of a document, -1: none does.

        Raises UserError for a model that cannot be sampled from.
        """
        model = config.model
        if not is_causal(model):
            raise UserError(
                "a model of model.moe.router=expert_choice cannot be sampled from: its experts choose among all "
                "tokens of a text, later ones included; train one with another router"
            )
        self.config = model = dataclasses.replace(model, dtype=dtype or model.dtype)
        self.tokenizer = tokenizer
        self._start = document_start(tokenizer)
        self._end = document_end(tokenizer) if end_token is None else end_token
        # A window starts anywhere in a text, and so does a prompt; other rows have documents from their start.
        self._prefix = [] if config.data.mode == "windows" else [self._start]
        machine = this_machine()

        def decoder_for(num_tokens: int) -> Decoder:
            here = with_dispatch(model, num_tokens, train=False, machine=machine, as_set=False)
            return Decoder(here, tokenizer.vocab_size, unstacked=True)

        def read(variables: Variables, state: DecodeState, text_PL: Array, *inputs: Array) -> DecodeState:
            return prefill(decoder_for(text_PL.size), variables, state, text_PL, *inputs)

        def draw(
            variables: Variables, state: DecodeState, rows: Rows, *inputs: Array, num_top: int, keep_experts: bool
        ) -> tuple[Drawn, DecodeState]:
            decoder = decoder_for(state.position_B.size)
            told = {"num_top": num_top, "keep_experts": keep_experts}
            return decode(decoder, variables, state, rows, *inputs, end_token=self._end, **told)

        self.prepare = jax.jit(lambda variables: cast_matrices(unstack(variables, model), model))
        """The variables of the training decoder as all else here takes them: unstacked, matrices in ``dtype``."""
        # It takes the variables to be where they are, or the first call of each function would be compiled twice.
        self.empty_state = jax.jit(
            lambda batch_size, variables: empty_state(decoder_for(batch_size), batch_size),
            static_argnums=0,
            keep_unused=True,
        )
        # The state is given up to each call, so that its caches are changed in place.
        self.prefill = jax.jit(read, donate_argnums=1)
        self.decode = jax.jit(draw, donate_argnums=1, static_argnames=("num_top", "keep_experts"))
        self.take_rows = jax.jit(take_rows)

    def begin(self, prompt: str | Sequence[int], sample: SampleConfig, number: int = 0) -> Text:
        """A text that is to continue ``prompt``, or token ids, as its sample ``number``. Raises UserError."""
        ids = self.tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else list(prompt)
        self._check_tokens("each token of the prompt", ids)
        self.check_stop_tokens(sample)
        # A foreign tokenizer may have no token for a prompt of spaces.
        prompt_ids = [*self._prefix, *ids] or [self._start]
        context = self.config.context_length
        if len(prompt_ids) > context:
            raise UserError(
                f"the prompt must fit the context of {context} tokens, got {len(prompt_ids)}; shorten the prompt"
            )
        return Text(self.tokenizer, prompt_ids, sample, number, self._end)

    def check_stop_tokens(self, sample: SampleConfig) -> None:
        """UserError unless ``sample.stop_tokens`` are tokens."""
        self._check_tokens("each of stop_tokens", sample.stop_tokens)

    def _check_tokens(self, name: str, ids: Sequence[int]) -> None:
        V = self.tokenizer.vocab_size
        wrong = next((index for index in ids if not 0 <= index < V), None)
        if wrong is not None:
            raise UserError(f"{name} must be in [0, {V - 1}], got {wrong}; take those of this model's tokenizer")

    def generate(self, variables: Variables, prompt: str, sample: SampleConfig) -> list[Sample]:
        """``sample.num_samples`` continuations of ``prompt``, or texts from nothing where it is empty.

        ``variables`` are those of ``prepare``. Raises UserError for a prompt longer than the context.
        """
        return self.generate_all(variables, [prompt], sample)

    def generate_all(self, variables: Variables, prompts: Sequence[str], sample: SampleConfig) -> list[Sample]:
        """``sample.num_samples`` continuations of the first prompt, then of the next, of any lengths, many at a time.

        What is drawn for a prompt depends on the others by nothing but rounding. Raises UserError before any work.
        """
        begun = [(prompt, number) for prompt in prompts for number in range(sample.num_samples)]
        texts = [self.begin(prompt, sample, number) for prompt, number in begun]
        self.finish(variables, texts)
        return [sample_of(prompt, text) for (prompt, _), text in zip(begun, texts, strict=True)]

    def finish(self, variables: Variables, texts: Sequence[Text]) -> None:
        """Makes ``texts`` of ``begin`` to their ends, many at a time."""
        if not texts:
            return
        size = min(_BATCH, 1 << (len(texts) - 1).bit_length())
        batch, waiting = Batch(self, variables, [size]), deque(texts)
        while waiting or batch.texts:
            batch.admit([waiting.popleft() for _ in range(min(batch.num_free, len(waiting)))])
            batch.advance()

    def stream(self, variables: Variables, text: Text, *, keep_experts: bool = False) -> Iterator[str]:
        """``text`` of ``begin`` in pieces of whole characters, as they are drawn."""
        batch = Batch(self, variables, [1], keep_experts=keep_experts)
        batch.admit([text])
        while not text.finish_reason:
            # The first token is a piece of its own, for a reader who waits for it.
            batch.advance(STREAM_STEPS if text.tokens else 1)
            yield text.take()


def sample_of(prompt: str, text: Text) -> Sample:
    """What ``text``, which has ended, has become after ``prompt``; takes what it has not given yet."""
    assert text.finish_reason is not None
    return Sample(prompt, text.take(), text.tokens, text.logprobs, text.finish_reason)


def is_causal(config: ModelConfig) -> bool:
    """Whether the logits after a token depend on it and earlier ones only, as sampling needs."""
    return not config.moe.num_experts or ROUTERS[config.moe.router].is_causal


def load_generator(
    run: RunDirectory, which: Literal["best", "newest"], dtype: Dtype | None = None
) -> tuple[Generator, Variables]:
    """The generator of a finished or running training run and its "best" or "newest" variables, prepared for it.

    Raises UserError.
    """
    generator = Generator(run.load_config(), load_tokenizer(run.tokenizer), dtype)
    return generator, generator.prepare(load_variables(run, which))


def load_variables(run: RunDirectory, which: Literal["best", "newest"]) -> Variables:
    """The "best" or "newest" variables of a training run, those of its decoder. Raises UserError."""
    model = with_dispatch(run.load_config().model, 1, train=False, machine=this_machine(), as_set=False)
    decoder = Decoder(model, load_tokenizer(run.tokenizer).vocab_size)
    shapes = jax.eval_shape(lambda: _initial_variables(decoder).to_items())
    device = SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)
    return Variables.from_items(restore_items(run.checkpoints, which, abstract))


def _initial_variables(decoder: Decoder) -> Variables:
    boxed = decoder.init(jax.random.key(0), Tokens(jnp.zeros((1, 2), jnp.int32)))["params"]
    return Variables(nn.unbox(boxed), initial_expert_bias(decoder.config))
