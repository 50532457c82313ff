"""The settings of a preparation: the flags of python -m moe_jax.prepare. Imports no jax."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from moe_jax.cli import parse
from moe_jax.config.bounds import Count, LocalFolder, LocalInput, Seed, Text, TokenizerSpec, ValidationFraction
from moe_jax.errors import UserError
from moe_jax.prepare.tokenizer import needs_texts


def _part(name: str, part: str) -> None:
    number, _, total = part.partition("/")
    if not all(re.fullmatch("[1-9][0-9]{0,4}", each) for each in (number, total)) or int(number) > int(total):
        raise UserError(f"{name} must be I/N with I in [1, N], such as 3/64, got {part}; number the parts from 1")


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
    part: Annotated[str, _part] | None = None
    """I/N: prepare only the I-th of N parts of the input, as one of N jobs; None: all of it."""
    join: bool = False
    """Make the folder of what all jobs with part prepared: the one that a single process would make."""

    @property
    def folder(self) -> Path:
        """The folder that is written: ``out``, or that of the part in it."""
        return parts_folder(Path(self.out)) / self.part.replace("/", "-of-") if self.part else Path(self.out)


def parts_folder(out: Path) -> Path:
    """What holds the parts of ``out`` until they are joined. It is hidden: no corpus has such a name."""
    return out / ".parts"


def parse_prepare(arguments: list[str]) -> PrepareConfig:
    """The settings that ``python -m moe_jax.prepare``'s arguments ask for. Raises UserError."""
    config = parse(PrepareConfig, arguments, "python -m moe_jax.prepare")
    if not config.input:
        raise UserError("--input is required: name files, folders, globs or hf:DATASET")
    if not config.out:
        raise UserError("--out is required: name the folder to write")
    if config.part is not None and config.join:
        raise UserError("--join comes once all parts are done, got --part with it; leave one of them out")
    if config.part is not None or config.join:
        flag = "--join" if config.join else "--part"
        if needs_texts(config.tokenizer):
            raise UserError(
                f"{flag} needs a tokenizer that is ready, got {config.tokenizer}, which is made from all text; "
                "prepare a sample of the text, and give the folder tokenizer in it as --tokenizer"
            )
        if config.max_documents is not None or (config.val_input and config.val_documents is not None):
            raise UserError(
                f"{flag} takes all documents of the files, as no part knows how many come before them; leave out "
                "--max-documents, and --val-documents beside --val-input"
            )
    LocalFolder("mount the bucket, or copy the folder there afterwards")("--out", config.out)
    return config
