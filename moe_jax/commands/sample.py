"""sample.py: parse the flags, open the run, sample on the terminal."""

import dataclasses
import sys
import time
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from moe_jax.cli import parse
from moe_jax.commands.startup import check_limits
from moe_jax.config import SampleConfig
from moe_jax.config.bounds import LocalPath, RunFolder, Utf8
from moe_jax.errors import UserError, naming_what_helps


def main() -> None:
    command = parse_sample(sys.argv[1:])
    check_limits()

    from moe_jax.runs.opened import open_run
    from moe_jax.terminal.prompts import read_prompts

    opened = open_run(None if command.workdir is None else Path(command.workdir), command.checkpoint)
    if opened.is_latest:
        print(f"note: sampling from {opened.directory.path}, the run that changed last", file=sys.stderr)
    sample = command.sample_config(opened.config.sample)
    command.note_what_takes_long(sample)
    prompts = {} if command.interactive else read_prompts(command.prompt, command.prompt_file)

    from moe_jax.sampling.api import load_engine
    from moe_jax.sharding.startup import start_jax
    from moe_jax.terminal.sampling import converse, print_samples

    start = time.perf_counter()
    start_jax(compile_cache=opened.config.train.compile_cache)
    file = opened.directory.generated_text
    with naming_what_helps("give --dtype bfloat16, fewer samples or prompts, or leave a GPU with JAX_PLATFORMS=cpu"):
        engine, variables = load_engine(opened, command.dtype)
        if command.interactive:
            converse(engine, variables, sample, file)
        else:
            load_seconds = time.perf_counter() - start if command.jsonl else None
            print_samples(engine, variables, prompts, sample, file, load_seconds=load_seconds)


SampleFlags: type[SampleConfig] = dataclasses.make_dataclass(
    "SampleFlags",
    [
        (name, hint | Literal["run"], "run")
        for name, hint in typing.get_type_hints(SampleConfig, include_extras=True).items()
    ],
    bases=(SampleConfig,),
    frozen=True,
)
"""The settings of sampling as flags, where the default "run" stands for the run's own setting."""


@dataclass(frozen=True)
class SampleCommand:
    """Continue a prompt, or start from nothing, with a trained model.

    The default "run" stands for what the run's recipe says.
    """

    workdir: RunFolder | None = None
    """Run directory of the model; None: the run under runs/ that changed last."""
    prompt: Utf8 | None = None
    """Text to continue; - reads it from standard input, without its last line end; None: start from nothing."""
    prompt_file: LocalPath | None = None
    """File with the text to continue, or, where its name ends in .jsonl, with an object with a "prompt" a line."""
    jsonl: bool = False
    """Print an object a line for other programs: prompt, text, tokens, logprobs, finish_reason, timing."""
    interactive: bool = False
    """A conversation: continue each line of standard input, until its end or the line exit; Ctrl-C stops a text."""
    checkpoint: Literal["best", "newest"] = "best"
    """Which checkpoint: best (lowest validation loss; the newest where none was evaluated) or newest."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of activations and matrices; None: as the run was trained."""
    flags: Annotated[SampleConfig, tyro.conf.arg(name="", constructor=SampleFlags)] = field(
        default_factory=SampleFlags
    )

    def sample_config(self, of_run: SampleConfig) -> SampleConfig:
        """The settings of sampling: those of the flags, and ``of_run`` where there is no flag."""
        given = {name: value for name, value in vars(self.flags).items() if value != "run"}
        if self.interactive:
            given["num_samples"] = 1  # a conversation has one text at a time
        return dataclasses.replace(of_run, **given)

    def note_what_takes_long(self, sample: SampleConfig) -> None:
        """Prints how many samples ``sample`` asks for, where they are many and no flag asks for them."""
        if self.flags.num_samples != sample.num_samples > 16:
            print(
                f"note: {sample.num_samples:,} samples of a prompt, as the run's settings say; --num-samples 1 makes "
                "one",
                file=sys.stderr,
            )


def parse_sample(arguments: list[str]) -> SampleCommand:
    """What ``sample.py``'s arguments ask for. Raises UserError."""
    command = parse(SampleCommand, arguments)
    if command.prompt is not None and command.prompt_file is not None:
        raise UserError("--prompt and --prompt-file both say what to continue; leave one of them out")
    if command.interactive:
        for name, value in (("--prompt", command.prompt), ("--prompt-file", command.prompt_file)):
            if value is not None:
                raise UserError(
                    f"--interactive reads its prompts from standard input and takes no {name}; leave one of them out"
                )
        if command.jsonl:
            raise UserError("--interactive prints texts as they are made and takes no --jsonl; leave one of them out")
        if command.flags.num_samples not in ("run", 1):
            raise UserError(
                f"--num-samples must be 1 with --interactive, got {command.flags.num_samples}; leave one of them out"
            )
    return command
