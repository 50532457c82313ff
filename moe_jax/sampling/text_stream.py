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
