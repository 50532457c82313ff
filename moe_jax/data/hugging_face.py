"""Any tokenizer of Hugging Face's library ``tokenizers`` (the extra ``huggingface``). Imports no jax."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.data.tokenizer import END_OF_TEXT, IM_END, IM_START, PAD, UNKNOWN, Delimiters
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
        """Raises UserError where ``content``, read from ``source``, is no tokenizer or names no end of text."""
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
        self._content, self.delimiters = content, delimiters
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
        model = json.loads(content)["model"]
        # Unigram models name the id, the others the token.
        self.unknown_id: int | None = model.get("unk_id", vocabulary.get(model.get("unk_token") or ""))

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=False)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "huggingface", "json": self._content}
