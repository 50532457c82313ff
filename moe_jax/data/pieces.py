"""Long documents in pieces that are tokenized one by one. Imports no jax."""

from collections.abc import Iterable, Iterator

PIECE = 1 << 18
"""Characters in a piece, at most. The regular expressions of tokenizers run out of stack on longer runs of spaces."""


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
    place = end + 1
    while place > start + 1:
        space, line_end = text.rfind(" ", start + 1, place), text.rfind("\n", start + 1, place)
        place = max(space, line_end)
        if place < 0:
            return end
        cut = place if place == space else place + 1
        if cut <= end and not text[place - 1].isspace() and not text[place + 1].isspace():
            return cut
    return end
