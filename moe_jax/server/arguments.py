"""The server's flags. Imports no jax."""

from dataclasses import dataclass
from typing import Literal

import tyro

from moe_jax.cli import check_run
from moe_jax.config.fields import MANY, check_range
from moe_jax.errors import UserError


@dataclass(frozen=True)
class ServerCommand:
    workdir: str | None = None
    """Run directory of the model; None: the run under runs/ that changed last."""
    checkpoint: Literal["best", "newest"] = "best"
    """Which checkpoint: best (lowest validation loss; the newest where none was evaluated) or newest."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of activations and matrices; None: as the run was trained."""
    name: str | None = None
    """What programs call the model; None: the name of the run directory."""
    host: str | None = None
    """Address to listen at; 0.0.0.0: all of this machine's; None: 127.0.0.1, for programs on this machine only."""
    port: int = 8000
    """Port to listen at; 0: any that is free, which is printed."""
    api_key_file: str | None = None
    """File with a key that programs must send; None: the environment variable MOE_JAX_API_KEY, or else no key."""
    max_batch: int = 16
    """Texts that are generated together; others wait."""
    max_queue: int = 256
    """Texts that may wait; a request with more is refused with status 429."""
    max_prompt_tokens: int | None = None
    """Tokens a prompt may have; None: as many as the context."""
    max_output_tokens: int = 4096
    """Tokens that may be asked for."""
    max_body_bytes: int = 2**20
    """Size of a request."""


_SERVER_RANGES = {
    "port": (0, 2**16 - 1),
    "max_batch": (1, 1024),
    "max_queue": (1, 2**20),
    "max_prompt_tokens": (1, MANY),
    "max_output_tokens": (1, 2**20),
    "max_body_bytes": (1024, 2**30),
}


def parse_server(arguments: list[str], description: str) -> ServerCommand:
    """What ``moe_jax.server``'s arguments ask for. Raises UserError."""
    command = tyro.cli(ServerCommand, args=arguments, description=description, prog="python -m moe_jax.server")
    check_run(command.workdir)
    for name, (low, high) in _SERVER_RANGES.items():
        if getattr(command, name) is not None:
            check_range("--" + name.replace("_", "-"), getattr(command, name), low, high)
    if command.name is not None and not (command.name and command.name.isprintable()):
        raise UserError(f"--name must be printable text, got {command.name!r}")
    return command
