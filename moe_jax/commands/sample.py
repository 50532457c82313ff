"""sample.py: parse, find the run, sample on the terminal."""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from moe_jax.cli import check_run
from moe_jax.config import SampleConfig
from moe_jax.config.rules import check_sample
from moe_jax.errors import UserError


def main() -> None:
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

    from moe_jax.terminal.prompts import read_prompts

    prompts = [] if arguments.interactive else read_prompts(arguments.prompt, arguments.prompt_file)

    from moe_jax.terminal.sampling import converse, sample_to_terminal

    if arguments.interactive:
        converse(run, arguments.checkpoint, arguments.dtype, sample)
    else:
        sample_to_terminal(run, arguments.checkpoint, arguments.dtype, prompts, sample, jsonl=arguments.jsonl)


@dataclass(frozen=True)
class SampleCommand:
    """Continue a prompt, or start from nothing, with a trained model."""

    workdir: str | None = None
    """Run directory of the model; None: the run under runs/ that changed last."""
    prompt: str | None = None
    """Text to continue; - reads it from standard input, without its last line end; None: start from nothing."""
    prompt_file: str | None = None
    """File with the text to continue, or, where its name ends in .jsonl, with an object with a "prompt" a line."""
    jsonl: bool = False
    """Print an object a line for other programs: prompt, text, tokens, logprobs, finish_reason, timing."""
    interactive: bool = False
    """A conversation: continue each line of standard input, until its end or the line exit; Ctrl-C stops a text."""
    checkpoint: Literal["best", "newest"] = "best"
    """Which checkpoint: best (lowest validation loss; the newest where none was evaluated) or newest."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of activations and matrices; None: as the run was trained."""
    sample: Annotated[SampleConfig, tyro.conf.arg(name="")] = field(default_factory=SampleConfig)


def parse_sample(arguments: list[str], defaults: SampleConfig) -> SampleCommand:
    """What ``sample.py``'s arguments ask for, where ``defaults`` stand for what they leave out. Raises UserError."""
    command = tyro.cli(SampleCommand, args=arguments, default=SampleCommand(sample=defaults))
    check_run(command.workdir)
    check_sample(command.sample, lambda name: "--" + name.replace("_", "-"))
    others = {"--prompt": command.prompt is not None, "--prompt-file": command.prompt_file is not None}
    for name in ("--prompt", "--prompt-file"):
        if command.interactive and others[name]:
            raise UserError(
                f"--interactive reads its prompts from standard input and takes no {name}; leave one of them out"
            )
    if all(others.values()):
        raise UserError("--prompt and --prompt-file both say what to continue; leave one of them out")
    if command.interactive and command.jsonl:
        raise UserError("--interactive prints texts as they are made and takes no --jsonl; leave one of them out")
    if command.interactive and command.sample.num_samples > 1:
        raise UserError(
            f"--num-samples must be 1 with --interactive, got {command.sample.num_samples}; leave one of them out"
        )
    return command
