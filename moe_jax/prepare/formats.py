"""The documents in a file of each format, read in constant memory. Imports no jax.

A reader yields parts (text, whether a document ends with it); a document may come in many parts.
"""

import codecs
import csv
import gzip
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_jax.errors import Interrupted, UserError
from moe_jax.prepare.plays import render_play

Part = tuple[str, bool]

_CHUNK = 1 << 20
"""Bytes read at a time."""


@dataclass(frozen=True)
class ReadOptions:
    text_key: str = "text"
    """Column or key that holds a document."""
    separator: str | None = None
    """Text between two documents of one text file; None: a text file is one document."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8 and the like: raise UserError, or put U+FFFD in their place."""


def read_text(file: Path, options: ReadOptions) -> Iterator[Part]:
    """A text file: one document, or as many as ``separator`` divides it into."""
    held, separator = "", options.separator
    for chunk in _texts(file, options):
        held += chunk
        safe = len(held)
        if separator is not None:
            *documents, held = held.split(separator)
            yield from ((document, True) for document in documents)
            # What may be the start of a separator is held back.
            safe = max(0, len(held) - len(separator) + 1)
        yield held[:safe], False
        held = held[safe:]
    yield held, True


def read_play(file: Path, options: ReadOptions) -> Iterator[Part]:
    """A play in Markdown, rendered as plain text."""
    yield render_play(file.read_text(encoding="utf-8")), True


def read_csv(file: Path, options: ReadOptions) -> Iterator[Part]:
    """Column ``text_key`` of comma- or tab-separated rows under a header; a quoted field may hold line ends."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    delimiter = "\t" if ".tsv" in file.name.lower() else ","
    rows = csv.reader(_lines(_texts(file, options), "\n"), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        column = _column(header, options.text_key, str(file))
        for row in filter(None, rows):
            if len(row) != len(header):
                raise UserError(
                    f"{file}, line {rows.line_num}: a row must have the header's {len(header)} fields, "
                    f"got {len(row)}; correct the row"
                )
            yield row[column], True
    except csv.Error as error:
        raise UserError(
            f"{file}, line {rows.line_num}: {error}; correct the file, or quote its fields as CSV demands"
        ) from None


def read_jsonl(file: Path, options: ReadOptions) -> Iterator[Part]:
    """The string under ``text_key`` of each line, a JSON object; blank lines are passed over."""
    for number, line in enumerate(_lines(_chunks(file), b"\n"), start=1):
        if line.strip():
            yield _text_of_line(line, f"{file}, line {number}", options), True


def read_parquet(file: Path, options: ReadOptions) -> Iterator[Part]:
    """The string column ``text_key``, of which a null is an empty document."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file} needs the package pyarrow; run pip install 'pyarrow>=20'") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            schema = table.schema_arrow
            kind = schema.field(_column(schema.names, options.text_key, str(file))).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise _no_text(str(file), options.text_key, kind)
            for batch in table.iter_batches(batch_size=1024, columns=[options.text_key]):
                yield from ((value or "", True) for value in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        # Arrow raises OSError without a number for damaged pages; with one it is the machine's fault.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{file} is not a whole parquet file ({error}); copy or download it again") from None


def read_hub(name: str, options: ReadOptions) -> Iterator[Part]:
    """Column ``text_key`` of a data set NAME, NAME@CONFIG or either with :SPLIT, from the Hugging Face hub."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"hf:{name} needs the package datasets; run pip install 'datasets>=4'") from None
    path, _, split = name.partition(":")
    path, _, subset = path.partition("@")
    datasets.disable_progress_bars()
    try:
        data: Any = datasets.load_dataset(path, subset or None, split=split or "train")
    except Interrupted:
        raise
    except Exception as error:  # noqa: BLE001 - the library lets through whatever its readers and the network raise
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise UserError(
            f"the data set hf:{name} cannot be loaded ({reason}); check "
            "its name, its split and the network, or download its parquet files and name them"
        ) from None
    _column(data.column_names, options.text_key, f"hf:{name}")
    for batch in data.select_columns([options.text_key]).iter(batch_size=1024):
        for value in batch[options.text_key]:
            if not isinstance(value, str | None):
                raise _no_text(f"hf:{name}", options.text_key, type(value).__name__)
            yield value or "", True


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


def reader_of(file: Path) -> Callable[[Path, ReadOptions], Iterator[Part]] | None:
    """The reader of the file's format; None where its name says none that is known."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
        if suffixes[-1:] == [".parquet"]:
            return None
    return READERS.get("".join(suffixes[-1:]))


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
            while data:
                frame = frame or frames.decompressobj()
                try:
                    content = frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise zlib.error(str(error)) from None
                yield from (content[start : start + _CHUNK] for start in range(0, len(content), _CHUNK))
                data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
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


def _lines(chunks: Iterator[Any], end: Any) -> Iterator[Any]:
    """The lines of text or bytes that come in chunks, each with its ``end``."""
    parts = []  # of a line that goes on, joined only once: it may be longer than many chunks
    for chunk in chunks:
        first, *others = chunk.split(end)
        parts.append(first)
        if others:
            yield end[:0].join(parts) + end
            yield from (line + end for line in others[:-1])
            parts = others[-1:]
    if last := end[:0].join(parts):
        yield last


def _column(names: list[str], key: str, where: str) -> int:
    if not names:
        raise UserError(
            f"{where} has no column {key}, it has none at all; give it a first line that names its columns"
        )
    if key not in names:
        raise UserError(
            f"{where} has no column {key}; prepare it with --text-key and one of {', '.join(map(str, names))}"
        )
    return names.index(key)


def _no_text(where: str, key: str, kind: object) -> UserError:
    return UserError(f"{where}: the column {key} must hold text, got {kind}; set --text-key")


def _text_of_line(line: bytes, place: str, options: ReadOptions) -> str:
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
        keys = ", ".join(value) if isinstance(value, dict) else f"got {type(value).__name__}"
        raise UserError(f"{place} has no key {key} ({keys}); correct the line, or prepare it with another --text-key")
    text = value[key]
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
