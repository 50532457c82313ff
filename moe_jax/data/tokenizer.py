"""Tokenizers behind one small protocol, and the self-contained folder that each is kept in. Imports no jax.

``char``, ``byte`` and ``bpe:VOCAB`` (byte_pairs.py) are made here and end in the same five special tokens. ``gpt2``
and ``cl100k`` are OpenAI's; any other is a ``tokenizer.json`` of Hugging Face's library (hugging_face.py). Text is
never parsed for special tokens unless ``encode_with_specials`` is asked to: a user who types one gets its characters.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from moe_jax.errors import UserError
from moe_jax.files import atomic_write_text

FORMAT_VERSION = 2
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
UNKNOWN, PAD = "<|unknown|>", "<|pad|>"
SPECIALS = (END_OF_TEXT, IM_START, IM_END, UNKNOWN, PAD)
"""Of our own tokenizers: their last ids, in this order."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""How unknown characters and bytes that are no UTF-8 are decoded."""

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
    def is_lossless(self) -> bool:
        """Whether text without an unknown token is known to come back as it was."""
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

    def to_json(self) -> dict[str, Any]:
        """All that is needed to make it again, beside ``delimiters``."""
        ...


class CharTokenizer:
    """One token a character of the training text; any other character is unknown."""

    name, is_lossless = "char", True

    def __init__(self, characters: str, delimiters: Delimiters):
        self.characters, self.delimiters = characters, delimiters
        self.specials = self.spellings = own_specials(len(characters))
        self.unknown_id = self.specials[UNKNOWN]
        self.vocab_size = len(characters) + len(SPECIALS)
        codes = np.frombuffer(characters.encode("utf-32-le"), np.uint32)
        self._ids = np.full(int(codes.max(initial=0)) + 2, self.unknown_id, np.uint32)
        self._ids[codes] = np.arange(len(codes))

    def encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        return self._ids[np.minimum(codes, len(self._ids) - 1)]

    def decode(self, ids: Sequence[int]) -> str:
        pieces = [*self.characters, *SPECIALS]
        pieces[self.unknown_id] = REPLACEMENT
        return "".join(pieces[index] for index in ids)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "char", "characters": self.characters}


_BYTES = (*(bytes([byte]) for byte in range(256)), *(name.encode() for name in SPECIALS))


class ByteTokenizer:
    """One token a byte of UTF-8."""

    name, is_lossless = "byte", True
    unknown_id = None

    def __init__(self, delimiters: Delimiters):
        self.delimiters = delimiters
        self.specials = self.spellings = own_specials(256)
        self.vocab_size = 256 + len(SPECIALS)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        return decode_bytes(ids, _BYTES)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "byte"}


def own_specials(first: int) -> dict[str, int]:
    """The ids of the special tokens, from ``first`` on."""
    return {name: first + index for index, name in enumerate(SPECIALS)}


def decode_bytes(ids: Sequence[int], pieces: Sequence[bytes]) -> str:
    """The text of the ``pieces`` that ``ids`` name."""
    return b"".join(pieces[index] for index in ids).decode("utf-8", errors="replace")


def document_start(tokenizer: Tokenizer) -> int:
    """The id that stands before every document."""
    return tokenizer.specials[IM_START if tokenizer.delimiters == "chat" else END_OF_TEXT]


def document_end(tokenizer: Tokenizer) -> int:
    """The id that follows a document: its own last token, or the next document's first."""
    return tokenizer.specials[IM_END if tokenizer.delimiters == "chat" else END_OF_TEXT]


def encode_with_specials(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The ids of ``text``, where the spellings of the tokenizer's special tokens stand for those tokens."""
    parts = [
        np.array([tokenizer.spellings[part]]) if index % 2 else tokenizer.encode(part)
        for index, part in enumerate(re.split(_any_special(tokenizer), text))
    ]
    return np.concatenate([part.astype(np.uint32) for part in parts])


def without_specials(tokenizer: Tokenizer, text: str) -> str:
    """What of ``text`` is no spelling of a special token."""
    return re.sub(_any_special(tokenizer), "", text)


def _any_special(tokenizer: Tokenizer) -> str:
    return "(" + "|".join(re.escape(name) for name in sorted(tokenizer.spellings, key=len, reverse=True)) + ")"


def build_tokenizer(spec: str, texts: Iterable[str], delimiters: Delimiters = "endoftext") -> Tokenizer:
    """The tokenizer of ``data.tokenizer``, a validated ``spec``; char and bpe:VOCAB are made from ``texts``.

    A text too small for as many merges as bpe:VOCAB asks for gives a smaller vocabulary. UserError where ``spec``
    needs what is not installed, or has no token for the ``delimiters``.
    """
    if spec == "char":
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return CharTokenizer("".join(sorted(characters)), delimiters)
    if spec == "byte":
        return ByteTokenizer(delimiters)
    if spec.startswith("bpe:"):
        from moe_jax.data.byte_pairs import train_bpe

        return train_bpe(spec, texts, delimiters)
    if spec in ("gpt2", "cl100k"):
        from moe_jax.data.byte_pairs import published_bpe

        return _with_delimiters(published_bpe(spec, delimiters), spec)
    file = file_of_spec(spec)
    assert file is not None
    return _with_delimiters(_read_tokenizer(file, delimiters), spec)


def file_of_spec(spec: str) -> Path | None:
    """The file that ``spec`` names; None for a name of ours, whatever lies in the working folder."""
    if needs_texts(spec) or spec in ("byte", "gpt2", "cl100k"):
        return None
    return Path(spec) / "tokenizer.json" if Path(spec).is_dir() else Path(spec)


def spec_by_content(spec: str) -> str:
    """``spec``, or the SHA-256 of the file that it names."""
    file = file_of_spec(spec)
    try:
        return spec if file is None else f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    except FileNotFoundError:
        raise _no_tokenizer(file) from None


def _no_tokenizer(file: Path | None) -> UserError:
    return UserError(
        f"there is no tokenizer at {file}; name a tokenizer.json, a folder that has one, "
        "or char, byte, bpe:VOCAB (such as bpe:2048), gpt2 or cl100k"
    )


def needs_texts(spec: str) -> bool:
    """Whether ``build_tokenizer`` reads its ``texts``."""
    return spec == "char" or spec.startswith("bpe:")


def _with_delimiters(tokenizer: Tokenizer, spec: str) -> Tokenizer:
    for name in (IM_START, IM_END) if tokenizer.delimiters == "chat" else (END_OF_TEXT,):
        if name not in tokenizer.specials:
            raise UserError(
                f"the tokenizer {spec} has no special token {name}, which --delimiters {tokenizer.delimiters} puts "
                "around documents; choose other delimiters or another tokenizer, such as bpe:2048"
            )
    return tokenizer


def _read_tokenizer(file: Path, delimiters: Delimiters) -> Tokenizer:
    """The tokenizer in a ``tokenizer.json`` of ours or of Hugging Face's library."""
    try:
        content = file.read_text(encoding="utf-8")
        values = json.loads(content)
    except FileNotFoundError:
        raise _no_tokenizer(file) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not a tokenizer.json ({error}); name one") from None
    if isinstance(values, dict) and "model" in values and "kind" not in values:
        from moe_jax.data.hugging_face import HuggingFaceTokenizer

        return HuggingFaceTokenizer(content, delimiters, str(file))
    return from_json(values | {"delimiters": delimiters} if isinstance(values, dict) else values, file)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the folder that ``load_tokenizer`` reads: ``tokenizer.json``, which needs nothing else.

    For a byte-pair encoding of ours also ``huggingface/tokenizer.json``, the same in the format of Hugging Face's
    library, for other programs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / "tokenizer.json", _canonical(tokenizer))
    if tokenizer.name.startswith("bpe:"):
        from moe_jax.data.byte_pairs import BpeTokenizer, to_hugging_face

        assert isinstance(tokenizer, BpeTokenizer)
        (folder / "huggingface").mkdir(exist_ok=True)
        exported = json.dumps(to_hugging_face(tokenizer), ensure_ascii=False)
        atomic_write_text(folder / "huggingface" / "tokenizer.json", exported)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that ``save_tokenizer`` wrote. UserError where it is missing, damaged or of another version."""
    file = folder / "tokenizer.json"
    try:
        return from_json(json.loads(file.read_text(encoding="utf-8")), file)
    except FileNotFoundError:
        raise UserError(f"no tokenizer at {file}; train the model again, or put a copy of the file back") from None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is corrupt ({error}); put a copy of it back, or train the model again") from None


def from_json(values: Any, file: Path) -> Tokenizer:
    """The inverse of ``to_json``, of what was read from ``file``. UserError for anything else."""
    try:
        version, kind = values["version"], values["kind"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"{file} has format version {version}, this program reads {FORMAT_VERSION}; "
                "use the version of moe_jax that wrote it"
            )
        delimiters = values["delimiters"]
        if kind == "char":
            return CharTokenizer(values["characters"], delimiters)
        if kind == "byte":
            return ByteTokenizer(delimiters)
        if kind == "bpe":
            from moe_jax.data.byte_pairs import BpeTokenizer

            return BpeTokenizer.from_json(values, delimiters)
        if kind == "huggingface":
            from moe_jax.data.hugging_face import HuggingFaceTokenizer

            return HuggingFaceTokenizer(values["json"], delimiters, str(file))
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{file} is corrupt ({reason}); put a copy of it back, or train the model again") from None
    raise UserError(f"{file} names the unknown kind {kind!r}; put a copy of the file back, or train the model again")


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of all that decides which ids a text becomes."""
    return hashlib.sha256(_canonical(tokenizer).encode()).hexdigest()


def to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """All that is needed to make ``tokenizer`` again."""
    return {"version": FORMAT_VERSION, "delimiters": tokenizer.delimiters} | tokenizer.to_json()


def _canonical(tokenizer: Tokenizer) -> str:
    return json.dumps(to_json(tokenizer), sort_keys=True)
