"""Text in: every format, damaged files, inputs and corpora."""

import csv
import gzip
import io
import json
import sys
from unittest.mock import Mock

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from moe_jax.errors import Interrupted, UserError
from moe_jax.prepare import formats
from moe_jax.prepare.formats import ReadOptions
from moe_jax.prepare.settings import PrepareConfig
from moe_jax.prepare.sources import DEFAULT_CORPUS, Documents, Source, find_corpora

STORIES = ['She said "hi",\nand left.', "Second, with é and 🙂.", "A NUL \0 and a tab\t.", "x" * 5000 + " end"]
PLAIN = [STORIES[0], STORIES[1], STORIES[3]]


def jsonl(stories):
    return "".join(json.dumps({"id": index, "text": text}) + "\n\n" for index, text in enumerate(stories)).encode()


def table(stories, delimiter):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(["id", "text"])
    writer.writerows(enumerate(stories))
    return file.getvalue().encode()


def parquet(stories, **columns):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": stories, **columns}), file, row_group_size=2)
    return file.getvalue()


def long_zstd(content):
    """As ``zstd --long=28`` compresses."""
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return stream.compress(content) + stream.flush()


FILES = {
    "a.jsonl": jsonl(STORIES),
    "a.jsonl.gz": gzip.compress(jsonl(STORIES)),
    "a.jsonl.zst": zstandard.compress(jsonl(STORIES[:2])) + zstandard.compress(jsonl(STORIES[2:])),
    "long.jsonl.zst": long_zstd(jsonl(STORIES)),
    "a.parquet": parquet(STORIES),
    "a.csv": table(PLAIN, ","),
    "a.tsv": table(PLAIN, "\t"),
    "A.JSONL": jsonl(STORIES),
    "a.ndjson": jsonl(STORIES),
    "a.csv.gz": gzip.compress(table(PLAIN, ",")),
    "a.txt": b"\xef\xbb\xbf" + "<|sep|>".join(PLAIN).encode(),
}


def read(path, limit=None, **options):
    """The documents of a file or data set, from their pieces."""
    found: dict[str, str] = {}
    for piece in Documents([Source(str(path), str(path), True)], ReadOptions(**options), limit):
        found[piece.name] = found.get(piece.name, "") + piece.text
    return list(found.values())


@pytest.mark.parametrize("chunk", [1 << 20, 7])
@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_its_documents(tmp_path, monkeypatch, name, chunk):
    monkeypatch.setattr(formats, "_CHUNK", chunk << 3 if name.endswith("zst") else chunk)
    (tmp_path / name).write_bytes(FILES[name])
    expected = PLAIN if name.startswith(("a.csv", "a.tsv", "a.txt")) else STORIES
    assert read(tmp_path / name, separator="<|sep|>") == expected
    assert read(tmp_path / name, separator="<|sep|>", limit=2) == expected[:2]


def test_a_data_set_of_the_hub_by_the_name_of_a_local_one(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000.parquet").write_bytes(parquet(STORIES, story=STORIES[::-1]))
    (tmp_path / "data" / "validation-00000.parquet").write_bytes(parquet(["held out"], story=["too"]))
    name = f"hf:{tmp_path}"
    assert read(name) == STORIES
    assert read(name, text_key="story") == STORIES[::-1]
    assert read(name + ":validation") == ["held out"]
    with pytest.raises(UserError, match=r"hf:.* no column tale; prepare it with --text-key and one of text, story"):
        read(name, text_key="tale")
    with pytest.raises(UserError, match=r"the data set hf:.*none cannot be loaded .* check its name"):
        read(name + "/none")


@pytest.mark.parametrize(("error", "raised", "words"), [
    (Interrupted(130), Interrupted, "exit code 130"),
    (ValueError(), UserError, r"hf:x cannot be loaded \(ValueError\); check its name"),
])  # fmt: skip
def test_an_interruption_while_a_data_set_loads_is_one(monkeypatch, error, raised, words):
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=error))
    with pytest.raises(raised, match=words):
        read("hf:x")


def test_white_space_is_no_document_and_long_ones_come_in_pieces(tmp_path):
    long = "word " * 200_000
    (tmp_path / "a.jsonl").write_bytes(jsonl(["", " \n", long, "end"]))
    pieces = list(Documents([Source("a.jsonl", str(tmp_path / "a.jsonl"), True)], ReadOptions(), None))
    number = len(pieces) - 1
    assert number > 2
    assert "".join(piece.text for piece in pieces[:-1]) == long
    assert [(piece.document, piece.is_first, piece.is_last) for piece in pieces] == [
        *((0, index == 0, index == number - 1) for index in range(number)),
        (1, True, True),
    ]
    blank = " " * 600_000
    (tmp_path / "a.txt").write_text(f"{blank}<|sep|>{blank}x")
    assert read(tmp_path / "a.txt", separator="<|sep|>") == [blank + "x"]
    (tmp_path / "a.jsonl").write_bytes(jsonl([blank, "end"]))
    assert read(tmp_path / "a.jsonl") == ["end"]


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.txt", b"ab\xffcd", r"a.txt is not UTF-8 text \(byte 2\); convert it, or prepare it with --errors replace"),
    ("a.txt", b"ok " * 10 + b"\xc3", r"a.txt is not UTF-8 text \(byte 30\)"),
    ("a.txt", "text".encode("utf-16"), r"not UTF-8 text \(byte 0\)"),
    ("a.txt", b"ab\0cd", r"a NUL byte at 2"),
    ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"a.jsonl, line 2 has no key text \(txt\); correct the line, or"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"line 2 is not JSON"),
    ("a.jsonl", b'{"text": "\xff"}\n', r"line 1 is not UTF-8 text \(its byte 10\)"),
    ("a.jsonl", b'{"text": 5}\n', r"line 1: text must be a string, got int"),
    ("a.jsonl", b'["text"]\n', r"line 1 has no key text \(got list\)"),
    ("a.jsonl", b'{"text": "\\ud83d"}\n', r"half of a surrogate pair at character 0"),
    ("a.jsonl.gz", gzip.compress(jsonl(STORIES))[:-20], r"a.jsonl.gz is damaged or cut short"),
    ("a.jsonl.gz", b"no gzip", r"is damaged or cut short"),
    ("a.jsonl.zst", zstandard.compress(jsonl(STORIES))[:-3], r"a.jsonl.zst is damaged or cut short"),
    ("a.jsonl.zst", b"no zstd", r"is damaged or cut short"),
    ("a.parquet", FILES["a.parquet"][:-30], r"a.parquet is not a whole parquet file"),
    ("a.parquet", parquet(STORIES)[:40] + b"\0" * 40 + parquet(STORIES)[80:], r"is not a whole parquet file"),
    ("a.parquet", parquet([1, 2]), r"the column text must hold text, got int64"),
    ("a.csv", b"id,story\n1,x\n", r"a.csv has no column text; prepare it with --text-key and one of id, story"),
    ("a.csv", b"id,text\n1,a\n1,b,c\n", r"a.csv, line 3: a row must have the header's 2 fields, got 3"),
    ("a.csv", b'id,text\n1,"a\n', r"a.csv, line 2: unexpected end of data"),
])  # fmt: skip
def test_what_is_broken_is_refused_with_its_place(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read(tmp_path / name)


def test_bytes_that_are_no_text_are_replaced_when_asked(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xffcd\0")
    assert read(tmp_path / "a.txt", errors="replace") == ["ab\N{REPLACEMENT CHARACTER}cd\0"]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\ud83db"}\n{"text": "\xff"}\n')
    assert read(tmp_path / "a.jsonl", errors="replace") == ["a\N{REPLACEMENT CHARACTER}b", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize(
    ("name", "module"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard"), ("hf:x", "datasets")]
)
def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    if name in FILES:
        (tmp_path / name).write_bytes(FILES[name])
    with pytest.raises(UserError, match=f"needs the package {module}; run pip install '{module}"):
        read(tmp_path / name if name in FILES else name)


def corpora(*inputs, **settings):
    return find_corpora(PrepareConfig(input=tuple(map(str, inputs)), **settings))


def test_files_folders_globs_and_named_corpora(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "sub/a.md", "c.jsonl.gz", "d.png", "odd"):
        (tmp_path / name).write_bytes(b"text")
    (folder,) = corpora(tmp_path)
    assert folder.name == DEFAULT_CORPUS
    assert [source.name for source in folder.train] == ["b.txt", "c.jsonl.gz", "sub/a.md"]
    (by_glob,) = corpora(tmp_path / "**" / "*.md")
    assert [source.name for source in by_glob.train] == [str(tmp_path / "sub" / "a.md")]
    # A file that is named is text, whatever its name.
    assert read(tmp_path / "odd") == ["text"]
    odd = tmp_path / "odd"
    inputs = (f"news={tmp_path / 'b.txt'}", f"verse={tmp_path / 'sub'}", f"news={odd}")
    settings = {"weights": ("news=1e-3", "verse=2.5"), "text_key": ("verse=line",), "val_input": (f"verse={odd}",)}
    news, verse = corpora(*inputs, **settings)
    assert [source.name for source in news.train] == ["b.txt", "odd"]
    assert (news.weight, verse.weight) == (0.001, 2.5)
    assert (news.options.text_key, verse.options.text_key) == ("text", "line")
    assert (news.val, [source.name for source in verse.val]) == ((), ["odd"])


@pytest.mark.parametrize(("settings", "words"), [
    ({"input": ("none.txt",)}, "the input none.txt does not exist"),
    ({"input": ("*.none",)}, "matches no file"),
    ({"input": (".",)}, "holds no file of a known format"),
    ({"input": ("a=x.text",), "weights": ("b=1",)}, "--weights names the corpus b, which --input does not"),
    ({"input": ("a=x.text", "b=x.text"), "weights": ("b=1",)}, "--weights must be NAME=NUMBER .* lacks a"),
    ({"input": ("a=x.text",), "weights": ("a=0",)}, "--weights a=0 must be a number above 0"),
    ({"input": ("a=x.text",), "weights": ("a=no",)}, "--weights a=no must be a number above 0"),
    ({"input": ("a=x.text",), "weights": ("a=inf",)}, "--weights a=inf must be a number above 0"),
    ({"input": ("x.text", "x.text")}, "two sources called x.text"),
    ({"input": ("x.text",), "text_key": ("a=b",)}, "--text-key names the corpus a"),
    ({"input": ("",)}, "an input is an empty name"),
    ({"input": ("a=",)}, "an input is an empty name"),
    ({"input": ("x.json",)}, "x.json is of no known format"),
    ({"input": ("tokenizer=x.text",)}, "a corpus cannot be called tokenizer"),
    ({"input": ("x.text",), "val_input": ("./x.text",)}, "--val-input and --input of text both name"),
])  # fmt: skip
def test_inputs_that_cannot_be_are_refused(tmp_path, monkeypatch, settings, words):
    monkeypatch.chdir(tmp_path)
    for name in ("x.text", "x.json"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=words):
        find_corpora(PrepareConfig(**settings))
