"""Long documents in pieces that are tokenized one by one. Imports no jax."""

import re
from collections.abc import Iterable, Iterator

PIECE = 1 << 18
"""Characters in a piece, at most. The regular expressions of tokenizers run out of stack on longer runs of spaces."""


_SAFE = re.compile(r"[ \n](?<=\S[ \n])(?=\S)")
_STRETCH = 1 << 12
"""Characters that are searched at a time, from the end."""


def in_pieces(chunks: Iterable[str], size: int = PIECE) -> Iterator[str]:
    """One document, given in chunks of any length, in pieces of at most ``size`` + 2 characters.

    Cuts are made where byte-pair encodings divide words anyway, so the tokens of the pieces are those of the whole: at
    a single space or line end between two other characters. A stretch of ``size`` characters without such a place is
    cut at its end. The cuts depend on the text alone, not on the chunks.

    >>> list(in_pieces(["one two", " three"], size=9))
    ['one two', ' three']
    """
    held = ""
    for chunk in chunks:
        held, start = held + chunk if held else chunk, 0
        while len(held) - start > size + 2:
            cut = _last_cut(held, start, start + size)
            yield held[start:cut]
            start = cut
        if start:
            held = held[start:]
    if held:
        yield held


def _last_cut(text: str, start: int, end: int) -> int:
    """The last safe place in (start, end] to cut ``text`` at; ``end`` where there is none."""
    for stop in range(end, start, -_STRETCH):
        places = _SAFE.finditer(text, max(start + 1, stop - _STRETCH + 1), stop + 2)
        cuts = [place.start() if place[0] == " " else place.end() for place in places]
        if cuts and cuts[-1] > end:
            cuts.pop()
        if cuts:
            return cuts[-1]
    return end
