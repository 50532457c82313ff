"""Sample text from a trained model: python sample.py [--workdir runs/moe] [--prompt "..."]; see --help."""

import sys
from pathlib import Path

from moe_jax import command


def main() -> None:
    from moe_jax.command_line import parse_sample
    from moe_jax.config import SampleConfig
    from moe_jax.runs.layout import RunDirectory, latest_run

    arguments = parse_sample(sys.argv[1:], SampleConfig())
    if arguments.workdir:
        run = RunDirectory(Path(arguments.workdir))
    else:
        run = latest_run()
        print(f"note: sampling from {run.path}, the run that changed last", file=sys.stderr)
    # What the command line leaves out is as the run was configured.
    sample = parse_sample(sys.argv[1:], run.load_config().sample).sample

    from moe_jax.sampling.front_end import sample_to_terminal

    sample_to_terminal(run, arguments.checkpoint, arguments.prompt, sample)


if __name__ == "__main__":
    command.run(main)
