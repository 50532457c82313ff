"""What a tokenizer is, and two small ones: a token a character, a token a byte. Imports no jax.

Byte pairs (byte_pairs.py) and those of Hugging Face's library (hugging_face.py) are the others. Text is never parsed
for special tokens unless a preparation is told to (``split_specials``): a user who types one gets its characters.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
UNKNOWN, PAD = "<|unknown|>", "<|pad|>"
SPECIALS = (END_OF_TEXT, IM_START, IM_END, UNKNOWN, PAD)
"""Of our own tokenizers: their last ids, in this order."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What unknown characters and invalid UTF-8 decode to."""

Delimiters = Literal["endoftext", "chat"]


class Tokenizer(Protocol):
    @property
    def name(self) -> str:
        """As in data.tokenizer, such as bpe:2048."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def specials(self) -> Mapping[str, int]:
        """Ids of special tokens, by the names above; a foreign tokenizer may lack some."""
        ...

    @property
    def spellings(self) -> Mapping[str, int]:
        """Ids of special tokens, by what stands for them in a text that is parsed for them."""
        ...

    @property
    def unknown_id(self) -> int | None:
        """The id that stands for text it cannot represent; None where it has none."""
        ...

    @property
    def delimiters(self) -> Delimiters:
        """What surrounds a document: <|endoftext|> before it, or <|im_start|> before and <|im_end|> after it."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """The ids [tokens] of ``text``, in some integer type."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD, and special tokens their own names."""
        ...

    def spell(self, token: int, previous: int | None) -> str:
        """What ``token`` adds to a text after ``previous``, None: at its start; parts of characters as ``\\xNN``."""
        ...


class CharTokenizer:
    """One token a character of the training text; any other character is unknown."""

    name = "char"

    def __init__(self, characters: str, delimiters: Delimiters):
        self.characters, self.delimiters = characters, delimiters
        self.specials = self.spellings = own_specials(len(characters))
        self.unknown_id = self.specials[UNKNOWN]
        self.vocab_size = len(characters) + len(SPECIALS)
        codes = np.frombuffer(characters.encode("utf-32-le"), np.uint32)
        self._ids = np.full(int(codes.max(initial=0)) + 2, self.unknown_id, np.uint32)
        self._ids[codes] = np.arange(len(codes))
        self._pieces = [*characters, *SPECIALS]
        self._pieces[self.unknown_id] = REPLACEMENT

    def encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        return self._ids[np.minimum(codes, len(self._ids) - 1)]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join([self._pieces[index] for index in ids])

    def spell(self, token: int, previous: int | None) -> str:
        return self._pieces[token]


_BYTES = (*(bytes([byte]) for byte in range(256)), *(name.encode() for name in SPECIALS))


class ByteTokenizer:
    """One token a byte of UTF-8."""

    name = "byte"
    unknown_id = None

    def __init__(self, delimiters: Delimiters):
        self.delimiters = delimiters
        self.specials = self.spellings = own_specials(256)
        self.vocab_size = 256 + len(SPECIALS)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        return decode_bytes(ids, _BYTES)

    def spell(self, token: int, previous: int | None) -> str:
        return spell_bytes(_BYTES[token])


def own_specials(first: int) -> dict[str, int]:
    """The ids of the special tokens, from ``first`` on."""
    return {name: first + index for index, name in enumerate(SPECIALS)}


def decode_bytes(ids: Sequence[int], pieces: Sequence[bytes]) -> str:
    """The text of the ``pieces`` that ``ids`` name."""
    return b"".join(pieces[index] for index in ids).decode("utf-8", errors="replace")


def spell_bytes(piece: bytes) -> str:
    """``piece`` with those of its bytes that are no characters as ``\\xNN``, so that different ones look different."""
    return piece.decode("utf-8", errors="backslashreplace")


def document_start(tokenizer: Tokenizer) -> int:
    """The id that stands before every document."""
    return tokenizer.specials[IM_START if tokenizer.delimiters == "chat" else END_OF_TEXT]


def document_end(tokenizer: Tokenizer) -> int:
    """The id that follows a document: its own last token, or the next document's first."""
    return tokenizer.specials[IM_END if tokenizer.delimiters == "chat" else END_OF_TEXT]


def split_specials(tokenizer: Tokenizer, text: str) -> list[str]:
    """The parts of ``text`` between the spellings of special tokens, with each of those between its neighbours.

    >>> split_specials(ByteTokenizer("chat"), "hi<|im_end|>")
    ['hi', '<|im_end|>', '']
    """
    return re.split("(" + "|".join(map(re.escape, sorted(tokenizer.spellings, key=len, reverse=True))) + ")", text)
