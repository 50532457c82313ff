"""Sample text from a trained model: python sample.py [--workdir runs/moe] [--prompt "..."]; see --help."""

import dataclasses
import sys
from pathlib import Path

from moe_jax import command


def main() -> None:
    from moe_jax.command_line import parse_sample
    from moe_jax.config import SampleConfig
    from moe_jax.runs.layout import RunDirectory, latest_run

    arguments = parse_sample(sys.argv[1:], SampleConfig())
    if arguments.workdir is not None:
        run = RunDirectory(Path(arguments.workdir))
    else:
        run = latest_run()
        print(f"note: sampling from {run.path}, the run that changed last", file=sys.stderr)
    # What the command line leaves out is as the run was configured; a conversation has one text at a time.
    defaults = run.load_config().sample
    if arguments.interactive:
        defaults = dataclasses.replace(defaults, num_samples=1)
    sample = parse_sample(sys.argv[1:], defaults).sample

    from moe_jax.sampling.prompts import read_prompts

    prompts = [] if arguments.interactive else read_prompts(arguments.prompt, arguments.prompt_file)

    from moe_jax.sampling.front_end import converse, sample_to_terminal

    if arguments.interactive:
        converse(run, arguments.checkpoint, arguments.dtype, sample)
    else:
        sample_to_terminal(run, arguments.checkpoint, arguments.dtype, prompts, sample, jsonl=arguments.jsonl)


if __name__ == "__main__":
    command.run(main)
