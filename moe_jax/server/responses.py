"""The objects that answer a completion, as OpenAI's API has them, from what its call has received."""

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


class Spellings(dict[int, str]):
    """What each token looks like by itself, decoded once: some tokenizers take long over a single one."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        text = self[token] = self.tokenizer.decode([token])
        return text


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
        self._echoed = ""
        if wanted.echo:
            self._echoed = prompt if isinstance(prompt, str) else spellings.tokenizer.decode(prompt)
        # How many characters are certain before a token is where it begins.
        self._offset, self._stream = len(self._echoed), TextStream(spellings.tokenizer)

    def has_gained(self) -> bool:
        ticket = self._ticket
        gains_tokens = self._num_logprobs is not None and ticket.num_tokens > self._num_tokens
        ends = ticket.finish_reason is not None and not self._has_ended
        return bool(ticket.pieces or self._echoed or gains_tokens or ends)

    def take(self) -> dict[str, Any]:
        ticket = self._ticket
        text, self._echoed = self._echoed + "".join(ticket.pieces), ""
        ticket.pieces.clear()
        self._has_ended = ticket.finish_reason is not None
        logprobs = None if self._num_logprobs is None else self._logprobs(self._num_logprobs)
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": ticket.finish_reason}

    def _logprobs(self, num_top: int) -> dict[str, list]:
        """Of the tokens that have come since the last time; offsets are into the whole text of this choice."""
        text, new = self._ticket.text, range(self._num_tokens, self._ticket.num_tokens)
        found: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for place in new:
            token, logprob = text.tokens[place], text.logprobs[place]
            shown: dict[str, float] = {}
            for other, value in [*text.top_logprobs[place][:num_top], (token, logprob)]:
                # Two tokens may look the same; the likelier one comes first.
                shown.setdefault(self._spellings[other], _number(value))
            found["tokens"].append(self._spellings[token])
            found["token_logprobs"].append(_number(logprob))
            found["top_logprobs"].append(shown)
            found["text_offset"].append(self._offset)
            self._offset += len(self._stream.add([token]))
        self._num_tokens = new.stop
        return found


def _number(logprob: float) -> float:
    return logprob if logprob >= _LEAST else _LEAST  # that of NaN too
