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
        if getattr(self._tokenizer.model, "dropout", None):  # of merges, in training: another result each time
            self._tokenizer.model.dropout = None
        self.content, self.delimiters = content, delimiters
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.specials: dict[str, int] = {}
        self.spellings: dict[str, int] = {}
        for name, candidates in _NAMES.items():
            found = next((candidate for candidate in candidates if candidate in vocabulary), None)
            if found is not None:
                self.specials[name] = self.spellings[found] = vocabulary[found]
        if END_OF_TEXT not in self.specials:
            raise UserError(
                f"{source} has none of the tokens {', '.join(_NAMES[END_OF_TEXT])}, one of which ends a text; "
                "add one to its added_tokens, or use another tokenizer"
            )
        added = self._tokenizer.get_added_tokens_decoder()
        for index in {*self.specials.values()} & added.keys():
            if not added[index].special:  # it would be found in texts, as a word of its own
                added[index].special = True
                self._tokenizer.add_special_tokens([added[index]])
        self.spellings |= {token.content: index for index, token in added.items() if token.special}
        values = json.loads(content)
        self._is_byte_level = '"ByteLevel"' in json.dumps(values.get("decoder"))
        model = values["model"]
        # Unigram models name the id, the others the token.
        self.unknown_id: int | None = model.get("unk_id", vocabulary.get(model.get("unk_token") or ""))
        self._reserved = set(self.spellings.values()) - {self.unknown_id}

    def encode(self, text: str) -> np.ndarray:
        return self._as_text(self._encoding(text).ids)

    def encode_within(self, before: str, text: str, after: str) -> tuple[np.ndarray, bool]:
        """The ids of ``text`` as those of its document have them, and whether it would come back as it was.

        ``before`` and ``after`` are text of the same document around it: what a tokenizer adds to or takes from the
        ends of a text, it does not do here. A token belongs to the part in which it begins.
        """
        around = before + text + after
        encoding = self._encoding(around)
        ids = self._as_text(encoding.ids)
        comes_back = self.decode(ids.tolist()) == around
        if before or after:
            place = range(len(before), len(before) + len(text))
            starts = [start for start, _ in encoding.offsets]
            ids = self._as_text([index for index, at in zip(encoding.ids, starts, strict=True) if at in place])
        return ids, comes_back

    def is_local(self, before: str, after: str) -> bool:
        """Whether the tokens of ``after`` are the same wherever the text before it begins: not in long runs."""
        found = []
        for text in (before, before[1:]):
            encoding, place = self._encoding(text + after), len(text)
            tokens = zip(encoding.ids, encoding.offsets, strict=True)
            found.append([(index, start - place) for index, (start, _) in tokens if start >= place])
        return found[0] == found[1]

    def _encoding(self, text: str) -> Any:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception, as where it has no unknown token
            raise UserError(f"the tokenizer cannot encode a text ({error}); use another tokenizer") from None

    def _as_text(self, ids: list[int]) -> np.ndarray:
        """``ids`` of a text, in which a model has a special token only because the text has its spelling."""
        if not self._reserved.isdisjoint(ids):
            ids = [index for each in ids for index in (self._spelled(each) if each in self._reserved else [each])]
        return np.asarray(ids, np.uint32)

    def _spelled(self, special: int) -> list[int]:
        """The ids that the model has for the characters of a special token; perhaps none."""
        name = self._tokenizer.id_to_token(special) or ""
        ids = [token.id for part in (name[:1], name[1:]) if part for token in self._tokenizer.model.tokenize(part)]
        return [index for index in ids if index not in self._reserved]

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

    merges, lengths = [], set(map(len, ranks))
    for token in tokenizer.by_rank():
        # Tokens of long runs of one character have tens of thousands of divisions, nearly all into no tokens.
        cuts = [cut for cut in lengths if len(token) - cut in lengths]
        known = [(token[:cut], token[cut:]) for cut in cuts if token[:cut] in ranks and token[cut:] in ranks]
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
