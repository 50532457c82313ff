"""What sample.py does on a terminal."""

import sys
from typing import Literal

from moe_jax.command import UserError
from moe_jax.config import SampleConfig
from moe_jax.files import atomic_write_text
from moe_jax.parallel.startup import enable_compile_cache
from moe_jax.runs.layout import RunDirectory
from moe_jax.sampling.generator import load_generator


def sample_to_terminal(
    run: RunDirectory, which: Literal["best", "newest"], prompt: str | None, sample: SampleConfig
) -> None:
    """Prints continuations of ``prompt`` ("-": standard input; None: from nothing) and writes generated_text.txt."""
    if prompt == "-":
        prompt = _read_prompt()
    elif prompt is not None:
        _check_encodable(prompt)
    if run.load_config().train.compile_cache:
        enable_compile_cache()
    generator, variables = load_generator(run, which)
    samples = generator.generate(variables, prompt or "", sample)
    text = "\n\n---\n\n".join(item.prompt + item.text for item in samples) + "\n"
    sys.stdout.write(text)
    sys.stdout.flush()
    atomic_write_text(run.generated_text, text)
    if any(item.finish_reason == "context" for item in samples):
        context = generator.config.context_length
        print(f"note: learned positions end at the context of {context} tokens, so the text does", file=sys.stderr)


def _check_encodable(prompt: str) -> None:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:  # bytes of the command line that are no text arrive as lone surrogates
        raise UserError(f"--prompt must be UTF-8 text, got another byte at {error.start}; give text") from error


def _read_prompt() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt - needs UTF-8 text on standard input, got another byte at {error.start}") from error
