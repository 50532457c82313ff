"""Serve a trained model to programs that speak OpenAI's completions API.

python -m moe_jax.server --workdir runs/moe; see --help, and docs/serving.md.
"""

import importlib.util
import sys
from pathlib import Path

from moe_jax import errors


def main() -> None:
    from moe_jax.cli import parse
    from moe_jax.runs.layout import RunDirectory, latest_run
    from moe_jax.server.arguments import ServerCommand

    arguments = parse(ServerCommand, sys.argv[1:], "python -m moe_jax.server")
    if not all(map(importlib.util.find_spec, ("starlette", "uvicorn"))):
        remedy = "pip install 'moe_jax[server]', or pip install starlette uvicorn"
        raise errors.UserError(f"the server needs starlette and uvicorn; {remedy}")
    if arguments.workdir is not None:
        run = RunDirectory(Path(arguments.workdir))
    else:
        run = latest_run()
        print(f"note: serving {run.path}, the run that changed last", file=sys.stderr)
    run.load_config()  # what is wrong with it is told before jax is loaded

    from moe_jax.server.serve import serve

    serve(run, arguments)


if __name__ == "__main__":
    errors.run(main)
