"""From the command line to a validated configuration. Imports no jax."""

import importlib.util
import os
import re
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from moe_jax.command import UserError
from moe_jax.config import Config, PrepareConfig, SampleConfig
from moe_jax.sections import MANY, check_range, check_type, settings, unknown_name
from moe_jax.validation import check_folder, check_input, validate, validate_prepare, validate_sample


@dataclass(frozen=True)
class TrainCommand:
    """Train a model; run the same command again to go on where it stopped.

    Together with --config, --help shows the recipe's values.
    """

    config: str
    """Recipe to start from: a file with get_config(), such as configs/moe.py; the flags below change it."""
    workdir: str | None = None
    """Run directory; None: runs/ and the recipe's name."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def parse_train(arguments: list[str]) -> tuple[Config, Path]:
    """The validated configuration and the run directory that ``train.py``'s arguments ask for. Raises UserError."""
    recipe = _config_argument(arguments)
    if not recipe and not {"-h", "--help"} & set(arguments):
        raise UserError("--config is required: name a recipe, such as --config configs/moe.py")
    base = load_recipe(Path(recipe)) if recipe else Config()
    command = tyro.cli(
        TrainCommand, args=arguments, default=TrainCommand(config=recipe or tyro.MISSING, settings=base)
    )
    workdir = Path("runs") / Path(command.config).stem
    if command.workdir is not None:
        check_folder("--workdir", command.workdir, "mount the bucket, or copy the run directory there afterwards")
        workdir = Path(command.workdir)
    return validate(command.settings), workdir


def _config_argument(arguments: list[str]) -> str | None:
    """The value of --config, the last one where there are several, as for every other flag."""
    found = None
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            found = arguments[index + 1]
        if argument.startswith("--config="):
            found = argument.removeprefix("--config=")
    return found


def load_recipe(path: Path) -> Config:
    """Runs the recipe's ``get_config()``. Raises UserError with the recipe's own line on any fault in it."""
    if not path.is_file():
        known = sorted(str(item) for item in Path("configs").glob("*.py"))
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"--config {path} {what}; recipes here: {', '.join(known) or 'none'}")
    spec = importlib.util.spec_from_file_location("recipe", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config {path} is not a Python file; a recipe ends in .py and has get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (Exception, SystemExit) as error:  # it is the user's own code: whatever it raises is told with its line
        raise UserError(f"{path}{_line_in(path, error)}: {_explain(error)}") from error
    if not isinstance(config, Config):
        raise UserError(f"{path}: get_config() must return a moe_jax.config.Config, got {type(config).__name__}")
    try:
        for name, expected, value in settings(config):
            check_type(name, expected, value)  # before the parser, which puts a default in place of what it cannot use
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def _line_in(path: Path, error: BaseException) -> str:
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "", error.lineno))
    # Python makes the path of a module absolute.
    lines = [line for file, line in places if line and os.path.realpath(file) == os.path.realpath(path)]
    return f":{lines[-1]}" if lines else ""


def _explain(error: BaseException) -> str:
    match = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if match:
        sections = {"Config": Config(), **_sections(Config())}
        section = sections.get(match.group(1))
        if section is not None:
            names = list(dict.fromkeys(name.split(".")[0] for name, _, _ in settings(section)))
            return unknown_name(f"{match.group(1)}.", match.group(2), names)
    if isinstance(error, AttributeError) and "get_config" in str(error):
        return "a recipe needs a function get_config() that returns a moe_jax.config.Config"
    if isinstance(error, SystemExit):
        return f"a recipe must return its settings, but ends the program (SystemExit: {error}); take that out"
    return f"{type(error).__name__}: {error}"


def _sections(config: Config) -> dict[str, object]:
    found = [config.model, config.model.moe, config.data, config.optimizer, config.mesh, config.train, config.sample]
    return {type(section).__name__: section for section in found}


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
    _check_run(command.workdir)
    validate_sample(command.sample, lambda name: "--" + name.replace("_", "-"))
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


def _check_run(workdir: str | None) -> None:
    """UserError where ``workdir`` cannot be the folder of a run that is read."""
    if workdir is not None:
        check_folder("--workdir", workdir, "mount the bucket, or copy the run directory here first")


@dataclass(frozen=True)
class EvaluateCommand:
    workdir: str | None = None
    """Run directory of the model; None: the run under runs/ that changed last."""
    data: str | None = None
    """Text or prepared folder to score instead of the run's own; a text is tokenized and split as the run's was."""
    split: Literal["val", "train", "all"] = "val"
    """Which part of it: the held-out one, the one to train on, or both, as for a text that was not trained on."""
    checkpoint: Literal["best", "newest"] = "best"
    """Which checkpoint: best (lowest validation loss; the newest where none was evaluated) or newest."""


def parse_evaluate(arguments: list[str], description: str) -> EvaluateCommand:
    """What ``moe_jax.evaluate``'s arguments ask for. Raises UserError."""
    command = tyro.cli(EvaluateCommand, args=arguments, description=description, prog="python -m moe_jax.evaluate")
    _check_run(command.workdir)
    if command.data is not None:
        check_input("--data", command.data)
    return command


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
    """What ``moe_jax.sampling.server``'s arguments ask for. Raises UserError."""
    command = tyro.cli(
        ServerCommand, args=arguments, description=description, prog="python -m moe_jax.sampling.server"
    )
    _check_run(command.workdir)
    for name, (low, high) in _SERVER_RANGES.items():
        if getattr(command, name) is not None:
            check_range("--" + name.replace("_", "-"), getattr(command, name), low, high)
    if command.name is not None and not (command.name and command.name.isprintable()):
        raise UserError(f"--name must be printable text, got {command.name!r}")
    return command


def parse_prepare(arguments: list[str], description: str) -> PrepareConfig:
    """The validated settings that ``moe_jax.data.prepare``'s arguments ask for. Raises UserError."""
    config = tyro.cli(
        PrepareConfig,
        args=arguments,
        default=PrepareConfig(input=()),
        description=description,
        prog="python -m moe_jax.data.prepare",
    )
    return validate_prepare(config)
