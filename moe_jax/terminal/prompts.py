"""Where prompts come from: the command line, standard input, a text file, or a file of JSON lines. Imports no jax."""

import sys
from pathlib import Path

import msgspec

from moe_jax.errors import UserError
from moe_jax.files import decode_json


def read_prompts(prompt: str | None, prompt_file: str | None) -> dict[str, str]:
    """The prompts that sample.py is asked to continue; one empty text where there is none. Raises UserError.

    Each by the place that an error about it names: FILE:LINE, or nothing where it is the only one.
    """
    if prompt_file is not None:
        return _from_file(Path(prompt_file))
    if prompt == "-":
        return {"": _without_line_end(as_text(sys.stdin.buffer.read(), "--prompt -"))}
    return {"": (prompt or "").removeprefix(BYTE_ORDER_MARK)}


BYTE_ORDER_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"
"""What some editors and shells put before a text; preparation leaves it out too, so no model knows it."""


class _Line(msgspec.Struct):
    prompt: str


def _from_file(file: Path) -> dict[str, str]:
    """A whole text without its last line end, or of a .jsonl file the ``prompt`` of each line."""
    try:
        text = as_text(file.read_bytes(), f"--prompt-file {file}")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"--prompt-file must be a file, got {file}; name one that exists") from None
    if file.suffix != ".jsonl":
        return {"": _without_line_end(text)}
    prompts = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                # sample.py --jsonl, too, writes log-probabilities that are not finite.
                prompt = decode_json(line.encode(), _Line, is_lenient=True).prompt
                prompt.encode()  # \ud800 is JSON, but not text
                prompts[f"{file}:{number}"] = prompt
            except ValueError as error:
                raise UserError(
                    f'{file}:{number} must be a JSON object with a text as "prompt" ({error}); correct the line'
                ) from None
    if not prompts:
        raise UserError(f"--prompt-file {file} has no prompts in it; give at least one line")
    return prompts


def _without_line_end(text: str) -> str:
    """``text`` without the line end that echo and editors put at its end."""
    return text.removesuffix("\n").removesuffix("\r")


def as_text(content: bytes, name: str) -> str:
    """``content``, called ``name``, as text without a byte order mark. UserError unless it is UTF-8."""
    try:
        return content.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise UserError(f"{name} must be UTF-8 text, got another byte at {error.start}; give text") from None
