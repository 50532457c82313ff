"""Bounds of one setting, written into its type: ``batch_size: Annotated[int, Range(1, MANY)]``. Imports no jax.

A bound is called with the setting's name and value and raises UserError; ``fields.check_type`` calls it. The parser of
the command line ignores it.
"""

import math
import os
import re
from dataclasses import dataclass
from typing import Annotated

from moe_jax.errors import UserError

MANY = 2**31 - 1
"""The largest index of an array: an upper bound that nobody needs to read."""


@dataclass(frozen=True)
class Range:
    low: float
    high: float

    def __call__(self, name: str, value: float) -> None:
        if not self.low <= value <= self.high:
            is_obvious = self.high >= MANY and value < self.low
            bounds = f"at least {self.low}" if is_obvious else f"in [{self.low}, {self.high}]"
            raise UserError(f"{name} must be {bounds}, got {value}")


Count = Annotated[int, Range(1, MANY)]
Positive = Annotated[float, Range(1e-12, math.inf)]
NotNegative = Annotated[float, Range(0, math.inf)]
Fraction = Annotated[float, Range(0.0, 1.0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
ValidationFraction = Annotated[float, Range(0.0001, 0.9)]


def _not_empty(name: str, text: str) -> None:
    if not text:
        raise UserError(f"{name} must have at least one character, got an empty text; leave it out")


Text = Annotated[str, _not_empty]


def few(name: str, values: tuple[object, ...]) -> None:
    if len(values) > 1024:
        raise UserError(f"{name} must have at most 1,024 values, got {len(values):,}; leave some out")


def _utf8(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # bytes of a command line that are no text arrive as lone surrogates
        raise UserError(f"{name} must be UTF-8 text, got another byte at {error.start}; give text") from None


Utf8 = Annotated[str, _utf8]


def _no_tilde(name: str, path: str) -> None:
    # A shell leaves it as it is after "=", and Python everywhere: the path would begin with a folder called ~.
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded != path:
        raise UserError(f"{name} must be a path without ~, got {path}; write {expanded}, or ./{path} if it is a name")


LocalPath = Annotated[str, _no_tilde]


def _tokenizer(name: str, spec: str) -> None:
    _no_tilde(name, spec)
    size = spec.removeprefix("bpe:")
    if size != spec and not (re.fullmatch(r"\d{1,6}", size) and 300 <= int(size) <= 262144):
        raise UserError(f"{name} bpe:VOCAB needs VOCAB in [300, 262144], got {size}; change it")
    if not spec.strip():
        raise UserError(f"{name} must name a tokenizer, got {spec!r}; name one, such as bpe:2048, or leave it out")


TokenizerSpec = Annotated[str, _tokenizer]
"""Whether a file that it names exists is checked where it is read."""

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class LocalFolder:
    remedy: str
    """What to do instead of naming an address."""

    def __call__(self, name: str, folder: str) -> None:
        if not folder.strip():
            raise UserError(f"{name} must name a folder, got {folder!r}, as of a variable that is not set; name one")
        if _ADDRESS.match(folder):  # a path of that spelling would be a folder called "gs:" in the working folder
            raise UserError(f"{name} must be a folder of this machine, got {folder}; {self.remedy}")
        _no_tilde(name, folder)


RunFolder = Annotated[str, LocalFolder("mount the bucket, or copy the run directory here first")]


def _local_input(name: str, path: str) -> None:
    place = re.sub(r"^[A-Za-z][\w-]*=", "", path)
    _no_tilde(name, place)
    if _ADDRESS.match(place):
        raise UserError(
            f"{name} must be a file or folder of this machine, got {path}; download it, or mount the bucket, "
            "and name the copy"
        )


LocalInput = Annotated[str, _local_input]
"""PATH or CORPUS=PATH."""
