"""Serve a trained model to programs that speak OpenAI's completions API.

python -m moe_jax.sampling.server --workdir runs/moe; see --help, and docs/serving.md.
"""

import importlib.util
import sys
from pathlib import Path

from moe_jax import command


def main() -> None:
    from moe_jax.command_line import parse_server
    from moe_jax.runs.layout import RunDirectory, latest_run

    arguments = parse_server(sys.argv[1:], __doc__ or "")
    if not all(map(importlib.util.find_spec, ("starlette", "uvicorn"))):
        remedy = "pip install 'moe_jax[server]', or pip install starlette uvicorn"
        raise command.UserError(f"the server needs starlette and uvicorn; {remedy}")
    if arguments.workdir is not None:
        run = RunDirectory(Path(arguments.workdir))
    else:
        run = latest_run()
        print(f"note: serving {run.path}, the run that changed last", file=sys.stderr)
    run.load_config()  # what is wrong with it is told before jax is loaded

    from moe_jax.sampling.server.serve import serve

    serve(run, arguments)


if __name__ == "__main__":
    command.run(main)
