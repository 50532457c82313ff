"""Tokenizers of Hugging Face's library ``tokenizers`` (the extra ``text``), and ours in its format. Imports no jax."""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.data.byte_pairs import BpeTokenizer
from moe_jax.data.tokenizer import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    PAD,
    REPLACEMENT,
    UNKNOWN,
    Delimiters,
    spell_bytes,
)
from moe_jax.errors import UserError

# What other people's tokenizers call them; the first that is there counts.
_NAMES = {
    END_OF_TEXT: (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "[SEP]"),
    IM_START: (IM_START,),
    IM_END: (IM_END,),
    UNKNOWN: (UNKNOWN, "<unk>", "[UNK]"),
    PAD: (PAD, "<pad>", "[PAD]"),
}


class HuggingFaceTokenizer:
    """As its ``tokenizer.json`` says, without the special tokens that a post-processor would add.

    Text that it normalises (lower case, say) does not come back as it was.
    """

    name = "huggingface"
    is_lossless = False  # normalizers and vocabularies without all bytes lose text, and no flag of the file says so

    def __init__(self, content: str, delimiters: Delimiters, source: str):
        """Raises UserError where ``content``, read from ``source``, is not a tokenizer or has no end of text."""
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"{source} needs the package tokenizers; run pip install 'tokenizers>=0.23'") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception for whatever is wrong with the file
            raise UserError(f"{source} is not a tokenizer of Hugging Face's library: {error}; name one") from None
        # The names of special tokens in a text are text.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.content, self.delimiters = content, delimiters
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.specials: dict[str, int] = {}
        for name, candidates in _NAMES.items():
            found = [vocabulary[candidate] for candidate in candidates if candidate in vocabulary]
            if found:
                self.specials[name] = found[0]
        if END_OF_TEXT not in self.specials:
            raise UserError(
                f"{source} has none of the tokens {', '.join(_NAMES[END_OF_TEXT])}, one of which ends a text; "
                "add one to its added_tokens, or use another tokenizer"
            )
        added = self._tokenizer.get_added_tokens_decoder()
        self.spellings = {token.content: index for index, token in added.items() if token.special}
        self.spellings = self.spellings or dict(self.specials)
        values = json.loads(content)
        self._is_byte_level = '"ByteLevel"' in json.dumps(values.get("decoder"))
        model = values["model"]
        # Unigram models name the id, the others the token.
        self.unknown_id: int | None = model.get("unk_id", vocabulary.get(model.get("unk_token") or ""))

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=False)

    def spell(self, token: int, previous: int | None) -> str:
        # Decoders look at a token's neighbour: at the start of a text many drop a space.
        before = [] if previous is None else [previous]
        start, text = self.decode(before), self.decode([*before, token])
        if REPLACEMENT in start + text:  # one of the two is part of a character
            content = self._tokenizer.id_to_token(token) or ""
            if re.fullmatch("<0x[0-9A-F]{2}>", content):  # byte fallback
                return spell_bytes(bytes.fromhex(content[3:5]))
            if self._is_byte_level and set(content) <= _BYTE_OF.keys():
                return spell_bytes(bytes(_BYTE_OF[character] for character in content))
        return text[len(start) :]


def to_hugging_face(tokenizer: BpeTokenizer) -> dict[str, Any]:
    """``tokenizer`` as the content of a ``tokenizer.json`` of Hugging Face's library, which gives the same ids.

    tiktoken merges any two neighbours whose joint bytes have a rank, lowest rank first; Hugging Face's merges are
    pairs in order. So each token's every division into two tokens is a merge, in the order of the tokens' ranks.
    """
    ranks, text_of = tokenizer.ranks, _visible_bytes()

    def visible(token: bytes) -> str:
        return "".join(text_of[byte] for byte in token)

    merges = []
    for token in tokenizer.by_rank():
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [half for half in halves if half[0] in ranks and half[1] in ranks]
        known.sort(key=lambda half: (ranks[half[0]], ranks[half[1]]))
        merges += [[visible(first), visible(second)] for first, second in known]
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    as_it_is = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        # tiktoken, too, takes a word that is a token as it is.
        "ignore_merges": True,
        "vocab": {visible(token): rank for token, rank in ranks.items()},
        "merges": merges,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": name} | as_it_is for name, index in tokenizer.specials.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }


def _visible_bytes() -> list[str]:
    """The character that stands for each byte in GPT-2's vocabulary files: itself, or one from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


_BYTE_OF = {character: byte for byte, character in enumerate(_visible_bytes())}
