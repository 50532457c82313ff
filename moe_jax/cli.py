"""From the command line to a validated configuration. Imports no jax."""

import importlib.util
import os
import re
import traceback
from pathlib import Path

from moe_jax.config import Config
from moe_jax.config.fields import check_type, settings, unknown_name
from moe_jax.config.rules import check_folder
from moe_jax.errors import UserError


def config_argument(arguments: list[str]) -> str | None:
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


def check_run(workdir: str | None) -> None:
    """UserError where ``workdir`` cannot be the folder of a run that is read."""
    if workdir is not None:
        check_folder("--workdir", workdir, "mount the bucket, or copy the run directory here first")
