"""python -m moe_jax.server: parse, find the run, load its model, answer requests until a signal."""

import importlib.util
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from moe_jax.cli import parse
from moe_jax.commands.startup import check_limits
from moe_jax.config.bounds import Count, LocalPath, Range, RunFolder
from moe_jax.errors import UserError, naming_what_helps, show


def _printable(name: str, text: str) -> None:
    if not (text and text.isprintable()):
        raise UserError(f"{name} must be printable text, got {text!r}")


@dataclass(frozen=True)
class ServerCommand:
    """Serve a trained model to programs that speak OpenAI's completions API; see docs/serving.md."""

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
    """Port to listen at; 0: any free one, which is printed."""
    api_key_file: LocalPath | None = None
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


def main() -> None:
    command = parse(ServerCommand, sys.argv[1:], "python -m moe_jax.server")
    packages = ("starlette", "uvicorn", "prometheus_client")
    if not all(map(importlib.util.find_spec, packages)):
        remedy = f"pip install 'moe_jax[server]', or pip install {' '.join(packages)}"
        raise UserError(f"the server needs {', '.join(packages)}; {remedy}")
    # There is nothing to finish yet, and a process that ends while it loads or compiles in other threads may crash.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    show("stdout")
    check_limits()
    serve(command)


def serve(command: ServerCommand) -> None:
    """Answers requests until SIGTERM or SIGINT. Raises UserError or EnvironmentFault before the first."""
    from moe_jax.runs.opened import open_run

    opened = open_run(None if command.workdir is None else Path(command.workdir), command.checkpoint)
    if opened.is_latest:
        print(f"note: serving {opened.directory.path}, the run that changed last", file=sys.stderr)

    from moe_jax.sampling.api import load_engine
    from moe_jax.server.app import Service
    from moe_jax.server.requests import Limits
    from moe_jax.server.serve import KEY_VARIABLE, Server, listen, own_names, read_key
    from moe_jax.server.worker import Worker
    from moe_jax.sharding.startup import start_jax

    api_key = read_key(command.api_key_file)
    listener = listen(command.host or "127.0.0.1", command.port)
    host, port = listener.getsockname()[:2]
    names = own_names(command.host, host)
    if api_key is None and names is None:
        what = f"anyone who reaches {host} may use this server"
        print(f"warning: {what}; give --api-key-file, or {KEY_VARIABLE} in the environment", file=sys.stderr)
    start_jax(compile_cache=opened.config.train.compile_cache)
    with naming_what_helps("lower --max-batch, give --dtype bfloat16, or leave a GPU with JAX_PLATFORMS=cpu"):
        engine, variables = load_engine(opened, command.dtype)
        worker = Worker(engine, variables, batch_sizes(command.max_batch), command.max_queue)
        worker.start()
    limits = Limits(
        model=command.name or opened.directory.name,
        vocab_size=opened.tokenizer.vocab_size,
        max_prompt_tokens=command.max_prompt_tokens or opened.config.model.context_length,
        max_output_tokens=command.max_output_tokens,
        max_texts=command.max_queue,
        max_body_bytes=command.max_body_bytes,
    )
    shown = f"[{host}]" if ":" in host else host
    greeting = f"serving {opened.directory.path} as {limits.model} at http://{shown}:{port}"
    try:
        Server(Service(engine, worker, limits, api_key), names, greeting).run(sockets=[listener])
    finally:
        worker.stop()


def batch_sizes(largest: int) -> tuple[int, ...]:
    """Powers of two up to ``largest``, and that."""
    return (*(1 << power for power in range((largest - 1).bit_length())), largest)
