"""The documents in a file of each format, read in constant memory. Imports no jax.

A reader yields parts (text, whether a document ends with it); a document may come in many parts.
"""

import codecs
import csv
import gzip
import itertools
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError
from moe_jax.prepare.options import Part, ReadOptions, column_index
from moe_jax.prepare.plays import render_play
from moe_jax.prepare.tables import read_parquet

_CHUNK = 1 << 20
"""Bytes read at a time."""
_LONGEST = 1 << 27
"""Bytes of a line of JSON, or characters of a line or field of CSV, at most: they are read whole."""
_COMPRESSED = (".gz", ".zst")


def read_text(file: Path, options: ReadOptions) -> Iterator[Part]:
    """A text file: one document, or as many as ``separator`` divides it into."""
    held, separator, is_one = "", options.separator, True
    for chunk in _texts(file, options):
        held += chunk
        safe = len(held)
        if separator is not None:
            *documents, held = held.split(separator)
            is_one = is_one and not documents
            yield from ((document, True) for document in documents)
            # What may be the start of a separator is held back.
            safe = max(0, len(held) - len(separator) + 1)
        yield held[:safe], False
        held = held[safe:]
    yield held, True
    if separator is not None and is_one:
        options.notes.add(f"text files without the separator {separator!r}, each one document", str(file))


def read_play(file: Path, options: ReadOptions) -> Iterator[Part]:
    """A play in Markdown, rendered as plain text."""
    yield render_play(file.read_text(encoding="utf-8")), True


def read_csv(file: Path, options: ReadOptions) -> Iterator[Part]:
    """Column ``text_key`` of comma- or tab-separated rows under a header; a quoted field may hold line ends."""
    csv.field_size_limit(_LONGEST)
    is_tsv = format_of(file) == ".tsv"
    rows = csv.reader(_lines(_texts(file, options), "\n", file), delimiter="\t" if is_tsv else ",", strict=True)
    end = 0  # of the row before
    try:
        header = next(rows, [])
        column = column_index(header, options.text_key, str(file))
        end = rows.line_num
        for row in rows:
            place = f"{file}, line {end + 1}"
            if row and len(row) != len(header):
                raise UserError(
                    f"{place}: a row must have the header's {len(header)} fields, got {len(row)}; correct the row"
                )
            if is_tsv and row and rows.line_num > end + 1:
                options.notes.add("rows of several lines in quotes, as a lone quote makes them of several rows", place)
            end = rows.line_num
            if row:
                yield row[column], True
    except csv.Error as error:
        raise UserError(
            f"{file}, line {end + 1}: {error}; correct the file, or quote its fields as CSV demands"
        ) from None


def read_jsonl(file: Path, options: ReadOptions) -> Iterator[Part]:
    """The string under ``text_key`` of each line, a JSON object; blank lines and nulls are passed over."""
    for number, line in enumerate(_lines(_chunks(file), b"\n", file), start=1):
        if line.strip():
            place = f"{file}, line {number}"
            text = _text_of_line(line, place, options)
            if text is None:
                options.leave_out_null(place)
            else:
                yield text, True


READERS: dict[str, Callable[[Path, ReadOptions], Iterator[Part]]] = {
    ".txt": read_text,
    ".md": read_text,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
}
"""By the suffix of a file's name, before ``.gz`` or ``.zst``."""


def format_of(file: Path) -> str:
    """The last suffix of the file's name, in lower case, before ``.gz`` or ``.zst``."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return "".join(suffixes[-1:])


def reader_of(file: Path) -> Callable[[Path, ReadOptions], Iterator[Part]] | None:
    """The reader of the file's format; None where its name says none that is known."""
    return READERS.get(format_of(file))


def _chunks(file: Path) -> Iterator[bytes]:
    """The uncompressed bytes of ``file``. UserError where a compressed one is damaged."""
    suffix = file.suffix.lower()
    try:
        if suffix == ".zst":
            yield from _zstd_chunks(file)
        else:
            with gzip.open(file) if suffix == ".gz" else open(file, "rb") as stream:
                yield from iter(lambda: stream.read(_CHUNK), b"")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file} is damaged or cut short ({error}); copy or download it again") from None


def _zstd_chunks(file: Path) -> Iterator[bytes]:
    """The content of all frames; EOFError where the last one is cut short.

    By hand, because the library's own stream passes over a last frame without an end, and pyarrow's refuses frames of
    a window over 128 MB, as ``zstd --long=31`` makes them.
    """
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{file} needs the package zstandard; run pip install 'zstandard>=0.23'") from None
    frames, frame = zstandard.ZstdDecompressor(max_window_size=2**31), None
    with open(file, "rb") as stream:
        for data in iter(lambda: stream.read(_CHUNK >> 3), b""):
            # A frame may grow by a factor of 32,000, and comes out of each call in one piece.
            parts = deque(data[start : start + 1024] for start in range(0, len(data), 1024))
            while parts:
                frame = frame or frames.decompressobj()
                try:
                    content = frame.decompress(parts.popleft())
                except zstandard.ZstdError as error:
                    raise zlib.error(str(error)) from None
                yield from (content[start : start + _CHUNK] for start in range(0, len(content), _CHUNK))
                if frame.eof:
                    parts.extendleft(filter(None, [frame.unused_data]))
                    frame = None
    if frame is not None:
        raise EOFError("the last frame has no end")


def _texts(file: Path, options: ReadOptions) -> Iterator[str]:
    """The text of ``file`` in chunks, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")(options.errors)
    place, is_first = 0, True
    for chunk in itertools.chain(filter(None, _chunks(file)), [b""]):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file} is not UTF-8 text (byte {place - pending + error.start}); convert it, or prepare it with "
                "--errors replace"
            ) from None
        if "\0" in text and options.errors == "strict":
            raise UserError(
                f"{file} is not text (a NUL byte at {place + chunk.index(0)}); name a text file, or prepare "
                "it with --errors replace"
            )
        yield text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}") if is_first else text
        place, is_first = place + len(chunk), is_first and not text


def _lines(chunks: Iterator[Any], end: Any, file: Path) -> Iterator[Any]:
    """The lines of text or bytes that come in chunks, each with its ``end``. UserError where one is too long."""
    parts, size, number = [], 0, 1  # of a line that goes on, joined only once: it may be longer than many chunks
    for chunk in chunks:
        first, *others = chunk.split(end)
        parts.append(first)
        size += len(first)
        if size > _LONGEST:
            raise UserError(f"{file}, line {number}: a line must have at most {_LONGEST:,} bytes; divide it")
        if others:
            yield end[:0].join(parts) + end
            yield from (line + end for line in others[:-1])
            parts, size, number = others[-1:], len(others[-1]), number + len(others)
    if last := end[:0].join(parts):
        yield last


def _text_of_line(line: bytes, place: str, options: ReadOptions) -> str | None:
    # Python's json, not msgspec: it reads what Python writes, NaN and halves of surrogate pairs too.
    key = options.text_key
    try:
        value = json.loads(line.decode("utf-8", options.errors).removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place} is not UTF-8 text (its byte {error.start}); convert it, or prepare it with --errors replace"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({error}); every line must be one object") from None
    if not isinstance(value, dict) or key not in value:
        keys = ", ".join(itertools.islice(value, 20)) if isinstance(value, dict) else f"got {type(value).__name__}"
        raise UserError(f"{place} has no key {key} ({keys}); correct the line, or prepare it with another --text-key")
    text = value[key]
    if text is None:
        return None
    if not isinstance(text, str):
        raise UserError(f"{place}: {key} must be a string, got {type(text).__name__}; correct the line")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        if options.errors == "strict":
            raise UserError(
                f"{place}: {key} has half of a surrogate pair at character {error.start}; correct it, or prepare "
                "it with --errors replace"
            ) from None
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
