"""The documents in a file of each format, read in constant memory. Imports no jax.

A reader yields parts (text, whether a document ends with it); a document may come in many parts.
"""

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

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
    with _open(file) as stream:
        chunks = _decode(stream, file, options)
        if options.separator is None:
            yield from ((chunk, False) for chunk in chunks)
            yield "", True
            return
        held, separator = "", options.separator
        for chunk in chunks:
            *documents, held = (held + chunk).split(separator)
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
    with _open(file) as stream:
        rows = csv.reader(_Lines(_decode(stream, file, options)), delimiter=delimiter, strict=True)
        try:
            header = next(rows, [])
            column = _column(header, options.text_key, file)
            for row in rows:
                if not row:
                    continue
                if len(row) != len(header):
                    raise UserError(
                        f"{file}, line {rows.line_num}: a row must have the header's {len(header)} fields, "
                        f"got {len(row)}; mend the row"
                    )
                yield row[column], True
        except csv.Error as error:
            raise UserError(
                f"{file}, line {rows.line_num}: {error}; mend the file, or quote its fields as CSV demands"
            ) from None


def read_jsonl(file: Path, options: ReadOptions) -> Iterator[Part]:
    """The string under ``text_key`` of each line, a JSON object; blank lines are passed over."""
    with _open(file) as stream:
        for number, line in enumerate(_guarded(stream, file), start=1):
            if not line.strip():
                continue
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
            kind = schema.field(_column(schema.names, options.text_key, file)).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"{file}: the column {options.text_key} must hold text, got {kind}; set --text-key")
            for batch in table.iter_batches(batch_size=1024, columns=[options.text_key]):
                for value in batch.column(0).to_pylist():
                    yield value or "", True
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        # Arrow raises OSError without a number for damaged pages; with one it is the machine's fault.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{file} is no whole parquet file ({error}); copy or download it again") from None


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
    _column(data.column_names, options.text_key, Path(f"hf:{name}"))
    for batch in data.select_columns([options.text_key]).iter(batch_size=1024):
        for value in batch[options.text_key]:
            if not isinstance(value, str | None):
                kind = type(value).__name__
                raise UserError(f"hf:{name}: the column {options.text_key} must hold text, got {kind}; set --text-key")
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

_COMPRESSIONS = (".gz", ".zst")


def reader_of(file: Path) -> Callable[[Path, ReadOptions], Iterator[Part]] | None:
    """The reader of the file's format; None where its name says none that is known."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        return None if suffixes[-2:-1] == [".parquet"] else READERS.get("".join(suffixes[-2:-1]))
    return READERS.get(file.suffix.lower())


def _open(file: Path) -> io.BufferedIOBase:
    """The uncompressed bytes of ``file``."""
    if file.suffix.lower() == ".gz":
        return gzip.GzipFile(file)
    if file.suffix.lower() != ".zst":
        return open(file, "rb")
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{file} needs the package zstandard; run pip install 'zstandard>=0.23'") from None
    return io.BufferedReader(_ZstdFile(open(file, "rb"), zstandard.ZstdDecompressor(max_window_size=2**31)), _CHUNK)


class _ZstdFile(io.RawIOBase):
    """The content of all frames of a zstd file; EOFError where the last one is cut short, which the library passes."""

    def __init__(self, file: IO[bytes], decompressor: Any):
        self._file, self._decompressor, self._frame = file, decompressor, None
        self._error, self._held = sys.modules["zstandard"].ZstdError, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            compressed = b""
            if self._frame is not None and self._frame.eof:
                compressed, self._frame = self._frame.unused_data, None
            compressed = compressed or self._file.read(_CHUNK >> 3)
            if not compressed:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._held = self._frame.decompress(compressed)
            except self._error as error:
                raise zlib.error(str(error)) from None
        size = min(len(buffer), len(self._held))
        buffer[:size], self._held = self._held[:size], self._held[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _guarded(items: Iterable[bytes], file: Path) -> Iterator[bytes]:
    """``items``, with what damaged compressed files raise as a UserError."""
    try:
        yield from items
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file} is damaged or cut short ({error}); copy or download it again") from None


def _decode(stream: io.BufferedIOBase, file: Path, options: ReadOptions) -> Iterator[str]:
    """The text of ``stream`` in chunks, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")(options.errors)
    place, first = 0, True
    for chunk in _guarded(iter(lambda: stream.read(_CHUNK), b""), file):
        pending = len(decoder.getstate()[0])
        text = _decode_chunk(decoder, chunk, file, place - pending)
        if "\0" in text and options.errors == "strict":
            raise UserError(
                f"{file} is not text (a NUL byte at {place + chunk.index(0)}); name a text file, or prepare "
                "it with --errors replace"
            )
        place += len(chunk)
        yield text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}") if first else text
        first = False
    yield _decode_chunk(decoder, b"", file, place - len(decoder.getstate()[0]), final=True)


def _decode_chunk(
    decoder: codecs.IncrementalDecoder, chunk: bytes, file: Path, place: int, *, final: bool = False
) -> str:
    try:
        return decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 text (byte {place + error.start}); convert it, or prepare it with --errors replace"
        ) from None


class _Lines:
    """The lines of text that comes in chunks, each with its line end."""

    def __init__(self, chunks: Iterator[str]):
        self._chunks = chunks

    def __iter__(self) -> Iterator[str]:
        held = ""
        for chunk in self._chunks:
            *lines, held = (held + chunk).split("\n")
            yield from (line + "\n" for line in lines)
        if held:
            yield held


def _column(names: list[str], key: str, file: Path) -> int:
    if not names:
        raise UserError(f"{file} has no column {key}, it has none at all; give it a first line that names its columns")
    if key not in names:
        raise UserError(
            f"{file} has no column {key}; prepare it with --text-key and one of {', '.join(map(str, names))}"
        )
    return names.index(key)


def _text_of_line(line: bytes, place: str, options: ReadOptions) -> str:
    key = options.text_key
    try:
        text = line.decode("utf-8", options.errors)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place} is not UTF-8 text (its byte {error.start}); convert it, or prepare it with --errors replace"
        ) from None
    try:
        value = json.loads(text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({error}); every line must be one object") from None
    if not isinstance(value, dict) or key not in value:
        keys = ", ".join(value) if isinstance(value, dict) else f"got {type(value).__name__}"
        raise UserError(f"{place} has no key {key} ({keys}); mend the line, or prepare it with another --text-key")
    if not isinstance(value[key], str):
        raise UserError(f"{place}: {key} must be a string, got {type(value[key]).__name__}; mend the line")
    try:
        value[key].encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        if options.errors == "strict":
            raise UserError(
                f"{place}: {key} has half of a surrogate pair at character {error.start}; mend it, or prepare "
                "it with --errors replace"
            ) from None
        return value[key].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value[key]
