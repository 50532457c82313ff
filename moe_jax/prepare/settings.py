"""The settings of a preparation: the flags of python -m moe_jax.prepare. Imports no jax."""

from dataclasses import dataclass
from typing import Literal

from moe_jax.cli import parse
from moe_jax.config.bounds import Count, LocalFolder, LocalInput, Seed, Text, TokenizerSpec, ValidationFraction
from moe_jax.errors import UserError


@dataclass(frozen=True)
class PrepareConfig:
    """Turn text of any kind into token streams on disk, in constant memory."""

    input: tuple[LocalInput, ...] = ()
    """Files, folders, globs or hf:DATASET[@CONFIG][:SPLIT]; NAME=PATH puts one into a corpus of that name."""
    out: str = ""
    """Folder to write, which data.path then names."""
    val_input: tuple[LocalInput, ...] = ()
    """Inputs to validate on, as in input; empty: a part of input is held out."""
    text_key: tuple[str, ...] = ("text",)
    """Column or key that holds a document, or NAME=KEY for each corpus."""
    separator: Text | None = None
    """Text that divides a text file into documents, such as <|endoftext|>; None: a text file is one document."""
    tokenizer: TokenizerSpec = "bpe:2048"
    """char, byte, bpe:VOCAB, gpt2, cl100k, or a tokenizer.json (or its folder) of this package or Hugging Face's."""
    delimiters: Literal["endoftext", "chat"] = "endoftext"
    """<|endoftext|> before each document, or <|im_start|> before and <|im_end|> after it."""
    parse_specials: bool = False
    """Whether names of special tokens in the text stand for those tokens."""
    tokenizer_sample: Count = 2**26
    """Characters that bpe:VOCAB is trained on, at most; spread evenly over the training documents."""
    weights: tuple[str, ...] = ()
    """NAME=NUMBER for each corpus, its share in training; empty: by their numbers of tokens."""
    max_documents: Count | None = None
    """Documents taken from each corpus, at most; None: all."""
    val_fraction: ValidationFraction = 0.05
    """Share of each corpus held out, as whole documents, or as the end of a single one."""
    val_documents: Count | None = None
    """Documents held out of each corpus, or taken from val_input at most; None: val_fraction counts."""
    errors: Literal["strict", "replace"] = "strict"
    """What bytes that are not text do: end the preparation, or become U+FFFD."""
    seed: Seed = 0
    """Seed of which documents are held out."""
    shard_tokens: Count = 100_000_000
    """Tokens in one file."""
    processes: Count | None = None
    """Processes that tokenize; None: one a CPU core. The result does not depend on it."""


def parse_prepare(arguments: list[str]) -> PrepareConfig:
    """The settings that ``python -m moe_jax.prepare``'s arguments ask for. Raises UserError."""
    config = parse(PrepareConfig, arguments, "python -m moe_jax.prepare")
    if not config.input:
        raise UserError("--input is required: name files, folders, globs or hf:DATASET")
    if not config.out:
        raise UserError("--out is required: name the folder to write")
    LocalFolder("mount the bucket, or copy the folder there afterwards")("--out", config.out)
    return config
