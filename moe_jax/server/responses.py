"""The objects that answer a completion, as OpenAI's API has them, from what its call has received."""

import functools
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from moe_jax.data.tokenizer import Tokenizer
from moe_jax.sampling.text import TextStream
from moe_jax.server.requests import CompletionRequest, Prompt
from moe_jax.server.worker import Call, Ticket

_LEAST = -9999.0
"""Stands for a log-probability that JSON has no number for, as in other servers."""


def event(content: dict) -> bytes:
    """A server-sent event. JSON has no line ends outside of its texts, and there they are escaped."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


DONE = b"data: [DONE]\n\n"


class Spellings:
    """What tokens look like in a text, the last ones kept: some tokenizers take long over a single one."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.of = functools.lru_cache(2**16)(tokenizer.spell)


class Completion:
    """The answer to one request, whole or in chunks."""

    def __init__(self, wanted: CompletionRequest, call: Call, spellings: Spellings, model: str):
        self._wanted, self._call = wanted, call
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        n = wanted.sample.num_samples
        self._choices = [
            _Choice(index, ticket, wanted.prompts[index // n], wanted, spellings)
            for index, ticket in enumerate(call.tickets)
        ]

    def whole(self) -> dict:
        """The answer once the call is done."""
        return self._object([choice.take() for choice in self._choices]) | {"usage": self._usage()}

    def chunks(self) -> Iterator[dict]:
        """What has been received since the last time, a chunk for each text that has gained something."""
        usage = {"usage": None} if self._wanted.include_usage else {}
        for choice in self._choices:
            if choice.has_gained():
                yield self._object([choice.take()]) | usage

    def last_chunks(self) -> Iterator[dict]:
        """What follows the last text."""
        if self._wanted.include_usage:
            yield self._object([]) | {"usage": self._usage()}

    def _object(self, choices: Sequence[dict]) -> dict:
        return self._head | {"choices": choices}

    def _usage(self) -> dict:
        """A prompt counts once, whatever n is."""
        tickets, n = self._call.tickets, self._wanted.sample.num_samples
        prompt = sum(len(ticket.text.prompt_ids) for ticket in tickets[::n])
        completion = sum(ticket.num_tokens for ticket in tickets)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class _Choice:
    """One text of an answer, and how much of it has been taken."""

    def __init__(self, index: int, ticket: Ticket, prompt: Prompt, wanted: CompletionRequest, spellings: Spellings):
        self._index, self._ticket, self._spellings = index, ticket, spellings
        self._num_logprobs = wanted.logprobs
        self._has_ended = False
        self._num_tokens = 0
        own_ids = ticket.text.own_prompt_ids
        self._echoed, self._echoed_ids = "", own_ids if wanted.echo else []
        if wanted.echo:
            self._echoed = prompt if isinstance(prompt, str) else spellings.tokenizer.decode(prompt)
        self._shows_end = wanted.echo
        before = own_ids if wanted.logprobs is not None and not wanted.echo else []
        self._previous = before[-1] if before else None
        # How many characters are certain before a token is where it begins.
        self._offset, self._stream = 0, TextStream(spellings.tokenizer, before)

    def has_gained(self) -> bool:
        ticket = self._ticket
        gains_tokens = self._num_logprobs is not None and ticket.num_tokens > self._num_tokens
        ends = ticket.finish_reason is not None and not self._has_ended
        return bool(ticket.pieces or (self._echoed and ticket.has_begun) or gains_tokens or ends)

    def take(self) -> dict[str, Any]:
        ticket = self._ticket
        text, self._echoed = self._echoed + "".join(ticket.pieces), ""
        ticket.pieces.clear()
        self._has_ended = ticket.finish_reason is not None
        logprobs = None if self._num_logprobs is None else self._logprobs(self._num_logprobs)
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": ticket.finish_reason}

    def _logprobs(self, num_top: int) -> dict[str, list]:
        """Of the tokens that have come since the last time; offsets are into the whole text of this choice."""
        found: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, logprob, tops in self._new_tokens():
            name = self._spellings.of(token, self._previous)
            shown: dict[str, float] = {}
            for other, value in [*tops[:num_top], (token, logprob)] if logprob is not None else []:
                spelling = self._spellings.of(other, self._previous)
                if other != token and (spelling == name or spelling in shown):
                    spelling = f"token_id:{other}"  # as other servers name a token by its id
                shown.setdefault(spelling, _number(value))
            found["tokens"].append(name)
            found["token_logprobs"].append(None if logprob is None else _number(logprob))
            found["top_logprobs"].append(None if logprob is None else shown)
            found["text_offset"].append(self._offset)
            self._offset += len(self._stream.add([token]))
            self._previous = token
        return found

    def _new_tokens(self) -> Iterator[tuple[int, float | None, Sequence[tuple[int, float]]]]:
        """Each with its log-probability and the most likely ones; of an echoed prompt the first token has neither.

        After an echo the token that ended the text comes too: who scores a prompt looks for one token after it.
        """
        ticket, text = self._ticket, self._ticket.text
        yield from zip(self._echoed_ids, [None, *text.prompt_logprobs], [[], *text.prompt_top_logprobs], strict=False)
        self._echoed_ids = []
        for place in range(self._num_tokens, ticket.num_tokens):
            yield text.tokens[place], text.logprobs[place], text.top_logprobs[place]
        self._num_tokens = ticket.num_tokens
        if self._shows_end and ticket.finish_reason is not None and text.end is not None:
            self._shows_end = False
            yield text.end


def _number(logprob: float) -> float:
    return logprob if logprob >= _LEAST else _LEAST  # that of NaN too
