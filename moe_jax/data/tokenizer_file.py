"""A tokenizer as a self-contained ``tokenizer.json``, and its fingerprint. Imports no jax."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec

from moe_jax.data.byte_pairs import BpeTokenizer
from moe_jax.data.hugging_face import HuggingFaceTokenizer, to_hugging_face
from moe_jax.data.tokenizer import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    ByteTokenizer,
    CharTokenizer,
    Delimiters,
    Tokenizer,
)
from moe_jax.errors import UserError
from moe_jax.files import MOST_BYTES_OF_MANY, atomic_write_text, read_json, refuse_link

FORMAT_VERSION = 2
_REMEDY = "put a copy of it back, or train the model again"


class _Version(msgspec.Struct):
    version: int


class _Stored(msgspec.Struct, tag_field="kind"):
    version: int
    delimiters: Delimiters


class _Char(_Stored, tag="char"):
    characters: str


class _Byte(_Stored, tag="byte"):
    pass


class _BytePairs(_Stored, tag="bpe"):
    name: str
    pattern: str
    ranks: list[bytes]
    """Tokens by rank; base64 in the file."""
    specials: dict[str, int]


class _HuggingFace(_Stored, tag="huggingface"):
    json: str
    """The content of the library's own ``tokenizer.json``."""


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the folder that ``load_tokenizer`` reads: ``tokenizer.json``, which needs nothing else.

    For a byte-pair encoding of ours also ``huggingface/tokenizer.json``, the same in the format of Hugging Face's
    library, for other programs.
    """
    refuse_link(folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / "tokenizer.json", _canonical(tokenizer))
    if isinstance(tokenizer, BpeTokenizer) and tokenizer.name.startswith("bpe:"):
        (folder / "huggingface").mkdir(exist_ok=True)
        exported = json.dumps(to_hugging_face(tokenizer), ensure_ascii=False)
        atomic_write_text(folder / "huggingface" / "tokenizer.json", exported)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that ``save_tokenizer`` wrote. UserError where it is missing, damaged or of another version."""
    file = folder / "tokenizer.json"
    try:
        return read_tokenizer(file)
    except FileNotFoundError:
        raise UserError(f"no tokenizer at {file}; train the model again, or put a copy of the file back") from None


def read_tokenizer(file: Path, delimiters: Delimiters | None = None) -> Tokenizer:
    """The tokenizer in ``file``, under ``delimiters`` where they are given.

    Raises FileNotFoundError, and UserError where the file is damaged or of another version.
    """
    read = functools.partial(read_json, file, remedy=_REMEDY, most_bytes=MOST_BYTES_OF_MANY)
    version = read(_Version).version
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file} has format version {version}, this program reads {FORMAT_VERSION}; "
            "use the version of moe_jax that wrote it"
        )
    kinds: Any = _Char | _Byte | _BytePairs | _HuggingFace
    stored = read(kinds)
    delimiters = delimiters or stored.delimiters
    match stored:
        case _Char():
            return CharTokenizer(stored.characters, delimiters)
        case _Byte():
            return ByteTokenizer(delimiters)
        case _HuggingFace():
            return HuggingFaceTokenizer(stored.json, delimiters, str(file))
    ranks = {token: rank for rank, token in enumerate(stored.ranks)}
    try:
        _check_ranks(stored, delimiters)
        return BpeTokenizer(stored.name, ranks, stored.pattern, stored.specials, delimiters)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{file} is corrupt ({error}); {_REMEDY}") from None


def _check_ranks(stored: _BytePairs, delimiters: Delimiters) -> None:
    """ValueError for what tiktoken would end the process for, or later code would not find."""
    ranks, specials = set(stored.ranks), stored.specials
    if b"" in ranks or len(ranks) < len(stored.ranks) or not {bytes([byte]) for byte in range(256)} <= ranks:
        raise ValueError("its ranks must be distinct tokens, each byte among them")
    if not all(0 <= index - len(ranks) < len(ranks) for index in specials.values()):
        raise ValueError("the ids of its special tokens must follow its ranks")
    if not {IM_START, IM_END} <= specials.keys() if delimiters == "chat" else END_OF_TEXT not in specials:
        raise ValueError(f"it has no special tokens for the delimiters {delimiters}")


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of all that decides which ids a text becomes."""
    return hashlib.sha256(_canonical(tokenizer).encode()).hexdigest()


def _canonical(tokenizer: Tokenizer) -> str:
    return json.dumps(msgspec.to_builtins(_stored(tokenizer)), sort_keys=True)


def _stored(tokenizer: Tokenizer) -> _Stored:
    version, delimiters = FORMAT_VERSION, tokenizer.delimiters
    match tokenizer:
        case CharTokenizer():
            return _Char(version, delimiters, tokenizer.characters)
        case ByteTokenizer():
            return _Byte(version, delimiters)
        case BpeTokenizer():
            ranks, specials = tokenizer.by_rank(), tokenizer.specials
            return _BytePairs(version, delimiters, tokenizer.name, tokenizer.pattern, ranks, specials)
        case HuggingFaceTokenizer():
            return _HuggingFace(version, delimiters, tokenizer.content)
    raise TypeError(f"{type(tokenizer).__name__} cannot be saved")
