"""Tokenizers: characters, bytes, and byte-pair encoding trained by rustbpe and run by tiktoken. Imports no jax.

Each has one special token, ``<|endoftext|>``, which stands before every document. Text is never parsed for it: a user
who types it gets its characters.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from moe_jax.command import UserError

FORMAT_VERSION = 1
END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""How an unknown character is decoded."""

# Words with their leading space, numbers of at most two digits, punctuation, line ends (the pattern of GPT-4's
# tokenizer, with numbers cut shorter as suits a small vocabulary).
_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


class Tokenizer(Protocol):
    @property
    def name(self) -> str:
        """As in data.tokenizer, such as bpe:2048."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def endoftext_id(self) -> int: ...

    @property
    def unknown_id(self) -> int | None:
        """The id of unknown characters; None where there are none."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD, and ``<|endoftext|>`` its own name."""
        ...

    def to_json(self) -> dict[str, Any]:
        """All that is needed to make it again."""
        ...


class CharTokenizer:
    """One token a character of the training text; any other character is unknown."""

    name = "char"

    def __init__(self, characters: str):
        self.characters = characters
        self._ids = {character: index for index, character in enumerate(characters)}
        self.endoftext_id, self.unknown_id = len(characters), len(characters) + 1
        self.vocab_size = len(characters) + 2

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(character, self.unknown_id) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        pieces = [*self.characters, END_OF_TEXT, UNKNOWN]
        return "".join(pieces[index] for index in ids)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "char", "characters": self.characters}


class ByteTokenizer:
    """One token a byte of UTF-8."""

    name = "byte"
    vocab_size, endoftext_id, unknown_id = 257, 256, None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return _decode_bytes(ids, [bytes([byte]) for byte in range(256)] + [END_OF_TEXT.encode()])

    def to_json(self) -> dict[str, Any]:
        return {"kind": "byte"}


class BpeTokenizer:
    """Byte-pair encoding; ids below ``endoftext_id`` are merge ranks, and every byte is one of them."""

    unknown_id = None

    def __init__(self, name: str, ranks: dict[bytes, int], pattern: str):
        import tiktoken

        self.name = name
        self._ranks, self._pattern = ranks, pattern
        self.endoftext_id = len(ranks)
        self.vocab_size = len(ranks) + 1
        self._encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.endoftext_id}
        )

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(list(ids), errors="replace")

    def to_json(self) -> dict[str, Any]:
        ranks = [
            base64.b64encode(token).decode() for token, _ in sorted(self._ranks.items(), key=lambda item: item[1])
        ]
        return {"kind": "bpe", "name": self.name, "pattern": self._pattern, "ranks": ranks}


def build_tokenizer(spec: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of ``data.tokenizer``, built from ``texts``; a validated ``spec``.

    A text too small for as many merges as bpe:VOCAB asks for gives a smaller vocabulary.
    """
    if spec == "char":
        return CharTokenizer("".join(sorted(set().union(*map(set, texts)))))
    if spec == "byte":
        return ByteTokenizer()
    import rustbpe

    trainer = rustbpe.Tokenizer()  # pyrefly: ignore[missing-attribute]
    trainer.train_from_iterator(iter(texts), int(spec.removeprefix("bpe:")) - 1, pattern=_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    return BpeTokenizer(spec, ranks, _PATTERN)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the folder that ``load_tokenizer`` reads: one JSON file that needs nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "tokenizer.json.tmp"
    beside.write_text(_canonical(tokenizer), encoding="utf-8")
    beside.replace(folder / "tokenizer.json")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that ``save_tokenizer`` wrote. UserError where it is missing, damaged or of another version."""
    file = folder / "tokenizer.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        version, kind = values["version"], values["kind"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"{file} has format version {version}, this program reads {FORMAT_VERSION}; "
                "use the version of moe_jax that wrote it"
            )
        if kind == "char":
            return CharTokenizer(values["characters"])
        if kind == "bpe":
            ranks = {base64.b64decode(token): rank for rank, token in enumerate(values["ranks"])}
            return BpeTokenizer(values["name"], ranks, values["pattern"])
        if kind == "byte":
            return ByteTokenizer()
    except FileNotFoundError:
        raise UserError(f"no tokenizer at {file}; train the model again, or put a copy of the file back") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is corrupt ({error}); put a copy of it back, or train the model again") from None
    raise UserError(f"{file} names the unknown kind {kind!r}; put a copy of the file back, or train the model again")


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of all that decides which ids a text becomes."""
    return hashlib.sha256(_canonical(tokenizer).encode()).hexdigest()


def _canonical(tokenizer: Tokenizer) -> str:
    return json.dumps({"version": FORMAT_VERSION, **tokenizer.to_json()}, sort_keys=True)


def _decode_bytes(ids: Sequence[int], pieces: list[bytes]) -> str:
    return b"".join(pieces[index] for index in ids).decode("utf-8", errors="replace")
