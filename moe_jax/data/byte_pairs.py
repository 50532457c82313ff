"""Byte-pair encodings, run by tiktoken. Imports no jax."""

from collections.abc import Sequence

import numpy as np
import tiktoken

from moe_jax.data.pieces import in_pieces
from moe_jax.data.tokenizer import REPLACEMENT, Delimiters, decode_bytes, spell_bytes


class BpeTokenizer:
    """Byte-pair encoding: an id below the special ones is the rank of its merge, and every byte has one."""

    unknown_id = None

    def __init__(
        self, name: str, ranks: dict[bytes, int], pattern: str, specials: dict[str, int], delimiters: Delimiters
    ):
        """``pattern``: the regular expression that divides a text into words, across which nothing is merged."""
        self.name, self.ranks, self.pattern, self.specials = name, ranks, pattern, specials
        self.spellings, self.delimiters = specials, delimiters
        self.vocab_size = max(*ranks.values(), *specials.values()) + 1
        self._encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        self._pieces: list[bytes] | None = None

    def encode(self, text: str) -> np.ndarray:
        pieces = [self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in in_pieces([text])]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.uint32), *pieces])

    def decode(self, ids: Sequence[int]) -> str:
        return decode_bytes(ids, self._all_pieces())

    def spell(self, token: int, previous: int | None) -> str:
        return spell_bytes(self._all_pieces()[token])

    def _all_pieces(self) -> list[bytes]:
        if self._pieces is None:
            # OpenAI's encodings leave some ids unused.
            pieces = [REPLACEMENT.encode()] * self.vocab_size
            for token, index in self.ranks.items():
                pieces[index] = token
            for special, index in self.specials.items():
                pieces[index] = special.encode()
            self._pieces = pieces  # once it is whole: other threads decode too
        return self._pieces

    def by_rank(self) -> list[bytes]:
        """The tokens that are not special, by rank."""
        return sorted(self.ranks, key=self.ranks.__getitem__)
