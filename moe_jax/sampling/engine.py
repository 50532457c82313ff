"""The sampling engine: a model prepared once, from a prompt to its text, alone or many at a time."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax

from moe_jax.config import Config, SampleConfig
from moe_jax.data.tokenizer import Tokenizer, document_end, document_start
from moe_jax.errors import UserError
from moe_jax.model.decoder import Variables, cast_matrices, unstack
from moe_jax.model.machine import Machine
from moe_jax.model.moe.routing import is_causal
from moe_jax.sampling.batch import STREAM_STEPS, Batch
from moe_jax.sampling.decode import Programs
from moe_jax.sampling.text import Sample, Text

_BATCH = 32
"""Texts generated together, at most."""

Dtype = Literal["float32", "bfloat16"]


class Engine:
    """A model that is ready to sample from: its compiled programs, kept from call to call."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        machine: Machine,
        dtype: Dtype | None = None,
        end_token: int | None = None,
    ):
        """``config`` of the run; ``dtype`` of activations and matrices, None: the run's.

        ``end_token`` ends a text; None: the end of a document, -1: none does.

        Raises UserError for a model that cannot be sampled from.
        """
        if not is_causal(config.model.moe):
            raise UserError(
                "a model of model.moe.router=expert_choice cannot be sampled from: its experts choose among all "
                "tokens of a text, later ones included; train one with another router"
            )
        model = dataclasses.replace(config.model, dtype=dtype or config.model.dtype)
        self.config, self.tokenizer = model, tokenizer
        self._start = document_start(tokenizer)
        self._end = document_end(tokenizer) if end_token is None else end_token
        # A window starts anywhere in a text, and so does a prompt; other rows have documents from their start.
        self._prefix = [] if config.data.mode == "windows" else [self._start]
        self.prepare = jax.jit(lambda variables: cast_matrices(unstack(variables, model), model))
        """The variables of the training decoder as all else here takes them: unstacked, matrices in ``dtype``."""
        self.programs = Programs(model, tokenizer.vocab_size, machine, self._end)

    def begin(self, prompt: str | Sequence[int], sample: SampleConfig, number: int = 0, index: int = 0) -> Text:
        """A text that continues ``prompt``, or token ids, as its sample ``number``. Raises UserError.

        ``index`` is the prompt's in its call: the draws of equal prompts are as independent as those of samples.
        """
        is_text = isinstance(prompt, str)
        ids = self.tokenizer.encode(prompt).tolist() if is_text else list(prompt)
        self._check_tokens("each token of the prompt", ids)
        self.check_stop_tokens(sample)
        # A foreign tokenizer may have no token for a prompt of spaces.
        prompt_ids = [*self._prefix, *ids] or [self._start]
        context = self.config.context_length
        if len(prompt_ids) > context:
            raise UserError(
                f"the prompt must fit the context of {context} tokens, got {len(prompt_ids)}; shorten the prompt"
            )
        return Text(
            self.tokenizer,
            prompt_ids,
            sample,
            number,
            self._end,
            prompt if is_text else "",
            index=index,
            num_prefix=len(prompt_ids) - len(ids),
        )

    def check_stop_tokens(self, sample: SampleConfig) -> None:
        """UserError unless ``sample.stop_tokens`` are tokens."""
        self._check_tokens("each of stop_tokens", sample.stop_tokens)

    def _check_tokens(self, name: str, ids: Sequence[int]) -> None:
        V = self.tokenizer.vocab_size
        wrong = next((index for index in ids if not 0 <= index < V), None)
        if wrong is not None:
            raise UserError(f"{name} must be in [0, {V - 1}], got {wrong}; take those of this model's tokenizer")

    def begin_all(self, prompts: Sequence[str], sample: SampleConfig, places: Sequence[str] = ()) -> list[Text]:
        """``sample.num_samples`` texts that continue the first prompt, then those of the next.

        Raises UserError, which begins with the prompt's own of ``places``, where they are given and it is not empty.
        """
        self.check_stop_tokens(sample)
        texts = []
        for index, prompt in enumerate(prompts):
            try:
                texts += [self.begin(prompt, sample, number, index) for number in range(sample.num_samples)]
            except UserError as error:
                where = f"{places[index]}: " if places and places[index] else ""
                raise UserError(f"{where}{error}") from None
        return texts

    def unknown_in(self, texts: Sequence[Text]) -> str | None:
        """What to tell the user of characters in the prompts that the tokenizer does not know; None: there is none."""
        unknown = self.tokenizer.unknown_id
        prompts = {text.prompt for text in texts if text.prompt and unknown in text.prompt_ids}
        if unknown is None or not prompts:
            return None
        # To other tokenizers a character by itself may be unknown that is part of a word they know.
        characters = sorted(set("".join(prompts))) if self.tokenizer.name == "char" else []
        found = [each for each in characters if unknown in self.tokenizer.encode(each)]
        what = ", ".join(map(repr, found[:20])) + (", ..." if len(found) > 20 else "") if found else "some words"
        return f"this model's tokenizer does not know {what} of the prompt and reads an unknown token"

    def finish(
        self, variables: Variables, texts: Sequence[Text], is_stopped: Callable[[], bool] = lambda: False
    ) -> list[Sample]:
        """Generates begun ``texts`` to their ends, of any lengths, many at a time.

        What is drawn for one depends on the others by nothing but rounding. ``variables`` are those of ``prepare``.
        Once ``is_stopped``, texts end where they are, and those without a token are left out.
        """
        size = min(_BATCH, 1 << (max(1, len(texts)) - 1).bit_length())
        batch, waiting = Batch(self.programs, variables, [size]), deque(texts)
        while (waiting or batch.texts) and not is_stopped():
            batch.admit([waiting.popleft() for _ in range(min(batch.num_free, len(waiting)))])
            batch.advance()
        for text in batch.texts:
            text.interrupt()
        return [text.result() for text in texts if text.finish_reason]

    def generate(self, variables: Variables, prompt: str, sample: SampleConfig) -> list[Sample]:
        """``sample.num_samples`` continuations of ``prompt``, or texts from nothing where it is empty.

        Raises UserError for a prompt longer than the context.
        """
        return self.finish(variables, self.begin_all([prompt], sample))

    def stream(self, variables: Variables, text: Text, *, keep_experts: bool = False) -> Iterator[str]:
        """``text`` of ``begin`` in pieces of whole characters, as they are drawn."""
        batch = Batch(self.programs, variables, [1], keep_experts=keep_experts)
        batch.admit([text])
        while not text.finish_reason:
            # The first token is a piece of its own, for a reader who waits for it.
            batch.advance(STREAM_STEPS if text.tokens else 1)
            yield text.take()
