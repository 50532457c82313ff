"""From the command line to a checked configuration. Imports no jax."""

import dataclasses
import os
import re
import runpy
import shlex
import traceback
from pathlib import Path
from typing import Any, TypeVar, cast

import tyro

from moe_jax import config as sections
from moe_jax.config import Config
from moe_jax.config.fields import check_fields, unknown_name
from moe_jax.errors import UserError

Command = TypeVar("Command")


def parse(command: type[Command], arguments: list[str], prog: str | None = None) -> Command:
    """The flags of a ``command`` that ``arguments`` set, each in its bounds. Raises UserError.

    Exits with the parser's box where a flag does not exist or cannot be read.
    """
    given_flags(arguments)
    flags = tyro.cli(command, args=arguments, prog=prog)
    return check_fields(flags, lambda name: "--" + name.split(".")[-1].replace("_", "-"))


def parse_on_recipe(command: type[Command], arguments: list[str], prog: str | None = None) -> Command:
    """As ``parse``, of a command with the flag --config, whose recipe's values are the defaults of its ``settings``.

    Raises UserError. The settings are not yet checked with each other.
    """
    flag, *values = given_flags(arguments).get("--config", [""])
    recipe = flag.partition("=")[2] or "".join(values[:1])
    if not recipe and not {"-h", "--help"} & set(arguments):
        raise UserError("--config is required: name a recipe, such as --config configs/moe.py")
    settings = load_recipe(Path(recipe)) if recipe else Config()
    default = cast(Any, command)(config=recipe or tyro.MISSING, settings=settings)
    return tyro.cli(command, args=arguments, default=default, prog=prog)


def given_flags(arguments: list[str]) -> dict[str, list[str]]:
    """Each flag by its name, with its values, as it is written. UserError for one that is given twice.

    The parser would keep the last, and lose what the first one named.
    """
    given: list[list[str]] = []
    for argument in arguments:
        # The parser takes what begins so as a flag too, except behind an =.
        if re.match(r"--[A-Za-z]", argument):
            given.append([argument])
        elif given:
            given[-1].append(argument)
    found: dict[str, list[str]] = {}
    for flag in given:
        # --train.keep_epochs, --train.keep-epochs and --train.no-keep-epochs are one.
        name = re.sub(r"(--|\.)no-", r"\1", flag[0].partition("=")[0].replace("_", "-"))
        if name in found:
            both = " and ".join(map(shlex.join, (found[name], flag)))
            raise UserError(f"{name} is given twice, as {both}; give it once, with all its values")
        found[name] = flag
    return found


def load_recipe(path: Path) -> Config:
    """Runs the recipe's ``get_config()``. Raises UserError with the recipe's own line on any fault in it."""
    if not path.is_file():
        known = sorted(str(item) for item in Path("configs").glob("*.py"))
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"--config {path} {what}; recipes here: {', '.join(known) or 'none'}")
    if path.suffix != ".py":
        raise UserError(f"--config {path} is not a Python file; a recipe ends in .py and has get_config()")
    try:
        config = runpy.run_path(str(path))["get_config"]()
    except (Exception, SystemExit) as error:  # the user's own code: whatever it raises is reported with its line
        raise UserError(f"{path}{_line_in(path, error)}: {_explain(error)}") from error
    if not isinstance(config, Config):
        raise UserError(f"{path}: get_config() must return a moe_jax.config.Config, got {type(config).__name__}")
    try:
        return check_fields(config)  # before the parser, which puts a default in place of what it cannot use
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _line_in(path: Path, error: BaseException) -> str:
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "", error.lineno))
    # Python makes the path of a module absolute.
    lines = [line for file, line in places if line and os.path.realpath(file) == os.path.realpath(path)]
    return f":{lines[-1]}" if lines else ""


def _explain(error: BaseException) -> str:
    match = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    section = getattr(sections, match[1], None) if match else None
    if match and dataclasses.is_dataclass(section):
        return unknown_name(f"{match[1]}.", match[2], [item.name for item in dataclasses.fields(section)])
    if isinstance(error, KeyError) and error.args == ("get_config",):
        return "a recipe needs a function get_config() that returns a moe_jax.config.Config"
    if isinstance(error, SystemExit):
        return f"a recipe must return its settings, but ends the program (SystemExit: {error}); take that out"
    return f"{type(error).__name__}: {error}"
