"""From tokens that come bit by bit to text in whole characters. Imports no jax."""

from collections.abc import Sequence

from moe_jax.data.tokenizer import REPLACEMENT, Tokenizer

_LONGEST_HALF = 3
"""Bytes of an unfinished UTF-8 character; a tokenizer may show each as one U+FFFD."""


class TextStream:
    """The text of one growing list of tokens, in pieces that together are what ``decode`` makes of the whole list.

    The bytes of one character may be spread over several tokens: they are held back until it is whole, or the text
    ends. A foreign tokenizer that changes earlier text when more follows is streamed as the text first stood.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # Decoded together: the last tokens of what was given, since some tokenizers decode a first token differently,
        # and those that came after them.
        self._window: list[int] = []
        self._given = 0

    def add(self, tokens: Sequence[int]) -> str:
        """The text that has become certain with ``tokens``; maybe empty."""
        self._window += tokens
        text = self._tokenizer.decode(self._window)
        whole = text.rstrip(REPLACEMENT)
        # More than an unfinished character has of them are bytes, or characters, that are no others.
        end = max(len(whole), len(text) - _LONGEST_HALF)
        piece, self._given = text[self._given : end], max(self._given, end)
        if tokens and end == len(text):
            self._window = list(tokens)
            self._given = len(self._tokenizer.decode(self._window))
        return piece

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        piece, self._given = self._tokenizer.decode(self._window)[self._given :], 0
        self._window = []
        return piece


def stop_in(text: str, stops: Sequence[str]) -> int | None:
    """Where the stop begins that is whole first, and of those the longest; None where there is none in ``text``."""
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
        half = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - half :]
        return text[: len(text) - half]

    def finish(self) -> str:
        """What was held back, once nothing more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that ``stop`` may begin with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
