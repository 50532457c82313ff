"""The settings of a preparation: the flags of python -m moe_jax.prepare. Imports no jax."""

from dataclasses import dataclass
from typing import Literal

import tyro

from moe_jax.config.fields import MANY, check_range
from moe_jax.config.rules import RANGES, check_folder, check_input, check_tokenizer
from moe_jax.errors import UserError


@dataclass(frozen=True)
class PrepareConfig:
    input: tuple[str, ...]
    """Files, folders, globs or hf:DATASET[@CONFIG][:SPLIT]; NAME=PATH puts one into a corpus of that name."""
    out: str = ""
    """Folder to write, which data.path then names."""
    val_input: tuple[str, ...] = ()
    """Inputs to validate on, as in input; empty: a part of input is held out."""
    text_key: tuple[str, ...] = ("text",)
    """Column or key that holds a document, or NAME=KEY for each corpus."""
    separator: str | None = None
    """Text that divides a text file into documents, such as <|endoftext|>; None: a text file is one document."""
    tokenizer: str = "bpe:2048"
    """char, byte, bpe:VOCAB, gpt2, cl100k, or a tokenizer.json (or its folder) of this package or Hugging Face's."""
    delimiters: Literal["endoftext", "chat"] = "endoftext"
    """<|endoftext|> before each document, or <|im_start|> before and <|im_end|> after it."""
    parse_specials: bool = False
    """Whether names of special tokens in the text stand for those tokens."""
    tokenizer_sample: int = 2**26
    """Characters that bpe:VOCAB is trained on, at most; spread evenly over the training documents."""
    weights: tuple[str, ...] = ()
    """NAME=NUMBER for each corpus, its share in training; empty: by their numbers of tokens."""
    max_documents: int | None = None
    """Documents taken from each corpus, at most; None: all."""
    val_fraction: float = 0.05
    """Share of each corpus held out, as whole documents, or as the end of a single one."""
    val_documents: int | None = None
    """Documents held out of each corpus, or taken from val_input at most; None: val_fraction counts."""
    errors: Literal["strict", "replace"] = "strict"
    """What bytes that are no text do: end the preparation, or become U+FFFD."""
    seed: int = 0
    """Seed of which documents are held out."""
    shard_tokens: int = 100_000_000
    """Tokens in one file."""
    processes: int | None = None
    """Processes that tokenize; None: one a processor core. The result does not depend on it."""


def validate_prepare(config: PrepareConfig) -> PrepareConfig:
    """Returns ``config``, or raises UserError; its settings are the flags of moe_jax.prepare.folder."""
    if not config.input:
        raise UserError("--input is required: name files, folders, globs or hf:DATASET")
    if not config.out:
        raise UserError("--out is required: name the folder to write")
    check_folder("--out", config.out, "mount the bucket, or copy the folder there afterwards")
    for name, paths in (("--input", config.input), ("--val-input", config.val_input)):
        for path in paths:
            check_input(name, path)
    for name in ("max_documents", "val_documents", "shard_tokens", "processes", "tokenizer_sample"):
        value = getattr(config, name)
        if value is not None:
            check_range("--" + name.replace("_", "-"), value, 1, MANY)
    check_range("--seed", config.seed, 0, 2**32 - 1)
    check_range("--val-fraction", config.val_fraction, *RANGES["data.val_fraction"])
    if config.separator == "":
        raise UserError("--separator must have at least one character, got none; leave it out")
    check_tokenizer("--tokenizer", config.tokenizer)
    return config


def parse_prepare(arguments: list[str], description: str) -> PrepareConfig:
    """The validated settings that ``moe_jax.prepare.folder``'s arguments ask for. Raises UserError."""
    config = tyro.cli(
        PrepareConfig,
        args=arguments,
        default=PrepareConfig(input=()),
        description=description,
        prog="python -m moe_jax.prepare",
    )
    return validate_prepare(config)
