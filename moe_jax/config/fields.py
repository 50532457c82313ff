"""What holds for every section of settings: a frozen dataclass of annotated fields, some of them sections."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from moe_jax.errors import UserError

OldSettings = Mapping[tuple[str, Any], tuple[str, Any] | None]


def section_from_dict(section: type, values: Any, source: str, old: OldSettings, prefix: str = "") -> Any:
    """The ``section`` of the JSON ``values`` under the dotted ``prefix``. UserError for a name it does not have.

    ``old`` maps (dotted name, value) of older files to today's, or to None where nothing takes the setting's place.
    """
    if not isinstance(values, dict):
        raise UserError(f"{source}: {prefix.rstrip('.') or 'the file'} must be an object of settings, got {values!r}")
    values = dict(values)
    for (name, value), today in old.items():
        if name.startswith(prefix) and values.get(name.removeprefix(prefix)) == value:
            del values[name.removeprefix(prefix)]
            values |= {today[0].removeprefix(prefix): today[1]} if today else {}
    fields = {item.name: item for item in dataclasses.fields(section)}
    for name in values:
        if name not in fields:
            raise UserError(f"{source}: " + unknown_name(prefix, name, list(fields)))
    hints = typing.get_type_hints(section)
    given = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = section_from_dict(hints[name], value, source, old, f"{prefix}{name}.")
        elif typing.get_origin(hints[name]) is tuple and isinstance(value, list):  # JSON has no tuples
            value = tuple(value)
        given[name] = value
    return section(**given)


def unknown_name(prefix: str, name: str, known: list[str]) -> str:
    """The text of the error for a setting that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    remedy = f"did you mean {prefix}{near[0]}?" if near else f"choose one of {', '.join(known)}"
    return f"there is no setting {prefix}{name}; {remedy}"


def settings(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted name, type, value) of every setting in ``section``."""
    hints = typing.get_type_hints(type(section))
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(hints[item.name]) and isinstance(value, hints[item.name]):
            yield from settings(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, hints[item.name], value


def check_type(name: str, expected: Any, value: Any) -> None:
    """UserError unless ``value`` is of the annotated type ``expected``, and finite where it is a number."""
    options = typing.get_args(expected)
    if typing.get_origin(expected) is Literal:
        if value not in options:
            raise UserError(f"{name} must be one of {', '.join(map(str, options))}; got {value!r}")
        return
    if typing.get_origin(expected) is tuple:
        if not isinstance(value, tuple):
            raise UserError(f"{name} must be a tuple, got {value!r} of type {type(value).__name__}")
        for item in value:
            check_type(f"each of {name}", options[0], item)
        return
    allowed = options if isinstance(expected, types.UnionType) else (expected,)
    # A whole number is a float, but True is not a number.
    fits = any(type(value) is kind or (kind is float and type(value) is int) for kind in allowed)
    if not fits:
        kinds = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in allowed)
        raise UserError(f"{name} must be of type {kinds}, got {value!r} of type {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, got {value}")


MANY = 2**31 - 1
"""The largest index of an array: an upper bound that nobody needs to be told."""


def check_range(name: str, value: float, low: float, high: float) -> None:
    """UserError unless ``value`` is in [low, high]."""
    if not low <= value <= high:
        bounds = f"at least {low}" if high >= MANY and value < low else f"in [{low}, {high}]"
        raise UserError(f"{name} must be {bounds}, got {value}")
