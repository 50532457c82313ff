"""The server's flags. Imports no jax."""

from dataclasses import dataclass
from typing import Annotated, Literal

from moe_jax.config.bounds import Count, Range, RunFolder
from moe_jax.errors import UserError


def _printable(name: str, text: str) -> None:
    if not (text and text.isprintable()):
        raise UserError(f"{name} must be printable text, got {text!r}")


@dataclass(frozen=True)
class ServerCommand:
    """Serve a trained model to programs that speak OpenAI's completions API (docs/serving.md)."""

    workdir: RunFolder | None = None
    """Run directory of the model; None: the run under runs/ that changed last."""
    checkpoint: Literal["best", "newest"] = "best"
    """Which checkpoint: best (lowest validation loss; the newest where none was evaluated) or newest."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of activations and matrices; None: as the run was trained."""
    name: Annotated[str, _printable] | None = None
    """What programs call the model; None: the name of the run directory."""
    host: str | None = None
    """Address to listen at; 0.0.0.0: all of this machine's; None: 127.0.0.1, for programs on this machine only."""
    port: Annotated[int, Range(0, 2**16 - 1)] = 8000
    """Port to listen at; 0: any that is free, which is printed."""
    api_key_file: str | None = None
    """File with a key that programs must send; None: the environment variable MOE_JAX_API_KEY, or else no key."""
    max_batch: Annotated[int, Range(1, 1024)] = 16
    """Texts that are generated together; others wait."""
    max_queue: Annotated[int, Range(1, 2**20)] = 256
    """Texts that may wait; a request with more is refused with status 429."""
    max_prompt_tokens: Count | None = None
    """Tokens a prompt may have; None: as many as the context."""
    max_output_tokens: Annotated[int, Range(1, 2**20)] = 4096
    """Tokens that may be asked for."""
    max_body_bytes: Annotated[int, Range(1024, 2**30)] = 2**20
    """Size of a request."""
