"""What readers of formats are given: where a document is, what may be wrong, what to report. Imports no jax."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from moe_jax.errors import UserError

Part = tuple[str, bool]
"""Text, and whether a document ends with it."""


class Notes:
    """What was left out or looks like a mistake, by kind: how often, and where first."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, place: str) -> None:
        number, first = self._found.get(kind, (0, place))
        self._found[kind] = number + 1, first

    def __str__(self) -> str:
        """One line; empty where there is nothing to say."""
        return "; ".join(f"{kind}: {number:,} ({first})" for kind, (number, first) in self._found.items())


@dataclass(frozen=True)
class ReadOptions:
    text_key: str = "text"
    """Column or key that holds a document."""
    separator: str | None = None
    """Text between two documents of one text file; None: a text file is one document."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8 and the like: raise UserError, or put U+FFFD in their place."""
    notes: Notes = dataclasses.field(default_factory=Notes, compare=False)
    """Gets what was left out or looks like a mistake."""

    def leave_out_null(self, place: str) -> None:
        self.notes.add("texts that are null, left out", place)


def column_index(names: list[str], key: str, where: str) -> int:
    if not names:
        raise UserError(
            f"{where} has no column {key}, it has none at all; give it a first line that names its columns"
        )
    if key not in names:
        raise UserError(
            f"{where} has no column {key}; prepare it with --text-key and one of {', '.join(map(str, names))}"
        )
    return names.index(key)
