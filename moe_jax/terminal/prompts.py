"""Where prompts come from: the command line, standard input, a text file, or a file of JSON lines. Imports no jax."""

import json
import sys
from pathlib import Path

from moe_jax.errors import UserError


def read_prompts(prompt: str | None, prompt_file: str | None) -> list[str]:
    """The prompts that sample.py is asked to continue; one empty text where there is none. Raises UserError."""
    if prompt_file is not None:
        return _from_file(Path(prompt_file))
    if prompt is None:
        return [""]
    if prompt == "-":
        return [_without_line_end(as_text(sys.stdin.buffer.read(), "--prompt -"))]
    check_text(prompt, "--prompt")
    return [prompt]


def _from_file(file: Path) -> list[str]:
    """A whole text without its last line end, or of a .jsonl file the ``prompt`` of each line."""
    try:
        text = as_text(file.read_bytes(), f"--prompt-file {file}")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"--prompt-file must be a file, got {file}; name one that is there") from None
    if file.suffix != ".jsonl":
        return [_without_line_end(text)]
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{number} is not JSON ({error}); correct the line") from None
        if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
            raise UserError(f'{file}:{number} must be an object with a text as "prompt", got {line.strip()[:80]}')
        check_text(found["prompt"], f"{file}:{number}: prompt")
        prompts.append(found["prompt"])
    if not prompts:
        raise UserError(f"--prompt-file {file} has no prompts in it; give at least one line")
    return prompts


def _without_line_end(text: str) -> str:
    """``text`` without the one that ends its last line, as echo and editors put there."""
    return text.removesuffix("\n").removesuffix("\r")


def check_text(text: str, name: str) -> None:
    """UserError unless ``text``, called ``name``, can be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # bytes of a command line that are no text arrive as lone surrogates
        raise UserError(f"{name} must be UTF-8 text, got another byte at {error.start}; give text") from error


def as_text(content: bytes, name: str) -> str:
    """``content``, called ``name``, as text. UserError unless it is UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} must be UTF-8 text, got another byte at {error.start}; give text") from error
