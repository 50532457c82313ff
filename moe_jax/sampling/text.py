"""A text in the making, as the host knows it: its tokens, its whole characters, and when it ends."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_jax.axes import Array
from moe_jax.config import SampleConfig
from moe_jax.data.tokenizer import REPLACEMENT, Tokenizer
from moe_jax.sampling.decode import Drawn

_LONGEST_HALF = 3
"""Bytes of an unfinished UTF-8 character; a tokenizer may show each as one U+FFFD."""


class TextStream:
    """The text of one growing list of tokens, in pieces that together are what ``decode`` makes of the whole list.

    The bytes of one character may be spread over several tokens: they are held back until it is whole, or the text
    ends. A foreign tokenizer that changes earlier text when more follows is streamed as the text first stood.
    ``before`` are tokens that the text continues, and whose own text is not given again.

    >>> from moe_jax.data.tokenizer import ByteTokenizer
    >>> stream = TextStream(ByteTokenizer("endoftext"))
    >>> [stream.add([token]) for token in "né".encode()]
    ['n', '', 'é']
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        self._tokenizer = tokenizer
        # Decoded together: the last tokens of what was given, since some tokenizers decode a first token differently,
        # and those that came after them.
        self._window = list(before)
        self._given = tokenizer.decode(self._window) if before else ""
        # The last bytes of ``before`` may be the first ones of a character, which is given once it is whole.
        self._num_half = len(self._given) - len(self._given.rstrip(REPLACEMENT))
        # The window's tokens since the text was last whole.
        self._new = list(before) if self._num_half else []

    def add(self, tokens: Sequence[int]) -> str:
        """The text that has become certain with ``tokens``; maybe empty."""
        text = self._tokenizer.decode([*self._window, *tokens])
        if len(tokens) > 1 and text.endswith(REPLACEMENT):
            return "".join([self.add([token]) for token in tokens])
        self._window += tokens
        self._new += tokens
        if text[: len(self._given)].count(REPLACEMENT) > self._given.count(REPLACEMENT):
            # Some tokenizers decode a run of bytes as a whole, of which nothing is a text while its end is not.
            self._window, self._given = list(self._new), ""
            text = self._tokenizer.decode(self._window)
        while self._num_half and text[len(self._given) - 1 : len(self._given)] != REPLACEMENT:
            self._given, self._num_half = self._given[:-1], self._num_half - 1
        # More than an unfinished character has of them are bytes, or characters, that are no others.
        end = max(len(text.rstrip(REPLACEMENT)), len(text) - _LONGEST_HALF)
        piece = text[len(self._given) : end]
        if piece:
            self._given, self._num_half = text[:end], 0
        if tokens and end == len(text):
            self._window, self._new = self._new, []
            self._given = self._tokenizer.decode(self._window)
        return piece

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        piece = self._tokenizer.decode(self._window)[len(self._given) :]
        self._window, self._given, self._new, self._num_half = [], "", [], 0
        return piece


def stop_in(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop begins that is whole first, and of those the longest; None where there is none in ``text``.

    >>> stop_in("no END here", ["END", "here"])
    3
    """
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return min(found)[1] if found else None


class StopStream:
    """A growing text up to the first of some texts, which may be spread over its pieces.

    What could be the beginning of one is held back until it is certain that it is none.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""
        self.is_stopped = False

    def add(self, piece: str) -> str:
        """What has become certain with ``piece``; nothing once the text has stopped."""
        if self.is_stopped:
            return ""
        text = self._held + piece
        end = stop_in(text, self._stops)
        if end is not None:
            self.is_stopped, self._held = True, ""
            return text[:end]
        longest = max(map(len, self._stops), default=1) - 1
        starts = range(max(0, len(text) - longest), len(text))
        # Where what is left could be the beginning of a stop.
        end = next(
            (start for start in starts if any(stop.startswith(text[start:]) for stop in self._stops)), len(text)
        )
        self._held = text[end:]
        return text[:end]

    def finish(self) -> str:
        """What was held back, once nothing more comes."""
        held, self._held = self._held, ""
        return held


def tops(token_SK: Array, logprob_SK: Array) -> list[list[tuple[int, float]]]:
    """(token, log-probability) of each place's most likely tokens."""
    places = zip(token_SK.tolist(), logprob_SK.tolist(), strict=True)
    return [list(zip(*place, strict=True)) for place in places]


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
    """"stop": the end of a document, or a stop; "length": max_new_tokens; "interrupted": a signal, in sample.py."""


class Text:
    """A prompt and what has been drawn after it. It ends at the end of a document, at a stop, or at its length."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        sample: SampleConfig,
        number: int,
        end_token: int,
        prompt: str = "",
        *,
        index: int = 0,
        num_prefix: int = 0,
    ):
        """``number`` says which sample of its prompt it is, ``index`` which prompt of its call that is.

        ``prompt`` is the text that ``prompt_ids`` were made of, but for the ``num_prefix`` first ones, which the model
        reads before the text.
        """
        self.prompt, self.prompt_ids, self.num_prefix = prompt, list(prompt_ids), num_prefix
        self.sample = sample
        self.number, self.index = number, index
        self.tokens: list[int] = []
        """Drawn so far, without the one that ended the text."""
        self.logprobs: list[float] = []
        """Of each token, the natural logarithm of its probability under the model itself."""
        self.top_logprobs: list[list[tuple[int, float]]] = []
        """The most likely tokens in each one's place and their log-probabilities, where the batch reports them."""
        self.scores_prompt = False
        """Whether the batch is to give the two that follow."""
        self.prompt_logprobs: list[float] = []
        """Of each token of the prompt after its first one."""
        self.prompt_top_logprobs: list[list[tuple[int, float]]] = []
        self.end: tuple[int, float, list[tuple[int, float]]] | None = None
        """The token that ended the text, its log-probability and the most likely tokens in its place."""
        self.experts: list[np.ndarray] = []
        """[MoE layers, E] bool for each token, where the batch reports them."""
        self.finish_reason: str | None = None
        """None while the text goes on, then as ``Sample.finish_reason``."""
        self.num_read = 0
        """Tokens that the model had read, prompt included, when it drew the last one."""
        self.window_start = 0
        """The place in the text of the model's position 0: moves on where learned positions are used up."""
        self._ends = {end_token, *sample.stop_tokens}
        self._text, self._shown = TextStream(tokenizer, self.own_prompt_ids), StopStream(sample.stop)
        self._pieces: list[str] = []

    @property
    def own_prompt_ids(self) -> list[int]:
        """Those that are part of the text."""
        return self.prompt_ids[self.num_prefix :]

    @property
    def length(self) -> int:
        """Tokens so far, prompt included."""
        return len(self.prompt_ids) + len(self.tokens)

    @property
    def num_left(self) -> int:
        """Tokens still to draw, at most."""
        return 0 if self.finish_reason else self.sample.max_new_tokens - len(self.tokens)

    def add(self, drawn: Drawn, row: int, steps: int) -> None:
        """Appends what the first ``steps`` turns drew in ``row``, up to where the text ends."""
        tokens = drawn.tokens_BS[row, : min(steps, self.num_left)].tolist()
        size = next((index for index, token in enumerate(tokens) if token in self._ends), len(tokens))
        has_ended = size < len(tokens)
        self.num_read = self.length + size - (not has_ended)
        # A stop may end the text at any token; without one, all of them make one piece.
        parts = [[token] for token in tokens[:size]] if self.sample.stop else [tokens[:size]]
        kept = 0
        for part in parts:
            self._pieces.append(self._shown.add(self._text.add(part)))
            kept += len(part)
            if self._shown.is_stopped:
                has_ended = True
                break
        self.tokens += tokens[:kept]
        self.logprobs += drawn.logprobs_BS[row, :kept].tolist()
        if drawn.top_tokens_BSK.shape[-1]:
            new = tops(drawn.top_tokens_BSK[row, : size + 1], drawn.top_logprobs_BSK[row, : size + 1])
            self.top_logprobs += new[:kept]
            if size < len(tokens) and kept == size:
                self.end = tokens[size], float(drawn.logprobs_BS[row, size]), new[size]
        if drawn.chosen_BSNE is not None:
            self.experts += list(np.asarray(drawn.chosen_BSNE[row, :kept]))
        if has_ended or not self.num_left:
            self._pieces.append(self._shown.add(self._text.finish()))
            has_ended = has_ended or self._shown.is_stopped
            self._pieces.append(self._shown.finish())
            self.finish_reason = "stop" if has_ended else "length"

    def interrupt(self) -> None:
        """Ends the text where it is."""
        self._pieces += [self._shown.add(self._text.finish()), self._shown.finish()]
        self.finish_reason = "interrupted"

    def take(self) -> str:
        """The text that has become certain since the last call: whole characters, before any stop."""
        taken, self._pieces = "".join(self._pieces), []
        return taken

    def result(self) -> Sample:
        """What has become of the text, which has ended; its pieces must not have been taken yet."""
        assert self.finish_reason is not None
        return Sample(self.prompt, self.take(), self.tokens, self.logprobs, self.finish_reason)
