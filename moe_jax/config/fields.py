"""Reading, walking and checking a section of settings: a frozen dataclass whose fields may be sections too."""

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from moe_jax.errors import UserError

T = TypeVar("T")

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
    hints = typing.get_type_hints(section)
    given = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{source}: " + unknown_name(prefix, name, list(hints)))
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
    """Yields (dotted name, type with its bounds, value) of every setting in ``section``."""
    kinds, hints = (typing.get_type_hints(type(section), include_extras=extras) for extras in (False, True))
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(kinds[item.name]) and isinstance(value, kinds[item.name]):
            yield from settings(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, hints[item.name], value


def check_fields(section: T, name_of: Callable[[str], str] = str) -> T:
    """Returns ``section``, or raises UserError where a setting is not of its type or out of its bounds.

    ``name_of`` maps a setting's dotted name to what the error calls it.
    """
    for name, expected, value in settings(section):
        check_type(name_of(name), expected, value)
    return section


def check_type(name: str, expected: Any, value: Any, or_none: str = "") -> None:
    """UserError unless ``value`` is of the annotated type ``expected``, in its bounds and finite."""
    kind, options = typing.get_origin(expected), typing.get_args(expected)
    if kind is Annotated:
        check_type(name, options[0], value, or_none)
        for bound in filter(callable, options[1:]):
            bound(name, value)
    elif kind is Literal:
        if value not in options:
            raise UserError(f"{name} must be one of {', '.join(map(str, options))}; got {value!r}")
    elif kind is tuple:
        if not isinstance(value, tuple):
            raise UserError(f"{name} must be a tuple, got {value!r} of type {type(value).__name__}")
        for item in value:
            check_type(f"each of {name}", options[0], item)
    elif kind in (types.UnionType, typing.Union):
        # A type, and single values instead of it: None, or a Literal of one.
        others = [None if option is types.NoneType else typing.get_args(option)[0] for option in options[1:]]
        if value not in others:
            check_type(name, options[0], value, " or None" if None in others else "")
    # A whole number is a float, but True is not a number.
    elif type(value) is not expected and not (expected is float and type(value) is int):
        kind = f"{expected.__name__}{or_none}"
        raise UserError(f"{name} must be of type {kind}, got {value!r} of type {type(value).__name__}")
    elif expected is float and not abs(value) <= sys.float_info.max:  # NaN is not, nor are integers of JSON beyond
        raise UserError(f"{name} must be a finite number, got {value}")
