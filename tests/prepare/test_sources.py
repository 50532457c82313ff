"""Text in: every format, damaged files, inputs and corpora."""

import csv
import gzip
import io
import json
import os
import re
import sys
import tracemalloc
from unittest.mock import Mock

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from moe_jax.errors import Interrupted, UserError
from moe_jax.prepare import formats, sources, tables
from moe_jax.prepare.options import Notes, ReadOptions
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
    "my.tsv.csv": table(PLAIN, ","),
    "my.csv.tsv.zst": zstandard.compress(table(PLAIN, "\t")),
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
    expected = PLAIN if name.startswith(("a.csv", "a.tsv", "my", "a.txt")) else STORIES
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


@pytest.mark.parametrize("kind", [
    pyarrow.large_string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
])  # fmt: skip
def test_every_kind_of_text_that_arrow_has(tmp_path, kind):
    column = pyarrow.array([*STORIES, None]).cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert pyarrow.parquet.read_schema(tmp_path / "a.parquet").field("text").type == kind
    assert read(tmp_path / "a.parquet") == STORIES


@pytest.mark.parametrize(("name", "content", "place"), [
    ("a.jsonl", b'{"text": "a"}\n\n{"text": null}\n{"text": null}\n{"text": "b"}', "a.jsonl, line 3"),
    ("a.parquet", parquet(["a", None, None, "b"]), "a.parquet, row 2"),
    ("hub", parquet(["a", None, None, "b"]), ", row 2"),
])  # fmt: skip
def test_nulls_are_left_out_and_counted(tmp_path, tmp_path_factory, monkeypatch, name, content, place):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    (tmp_path / ("a.parquet" if name == "hub" else name)).write_bytes(content)
    notes = Notes()
    assert read(f"hf:{tmp_path}" if name == "hub" else tmp_path / name, notes=notes) == ["a", "b"]
    assert str(notes).startswith("texts that are null, left out: 2 (")
    assert str(notes).endswith(f"{place})")


@pytest.mark.parametrize(("name", "content", "options", "words"), [
    ("a.txt", b"one\n\ntwo", {"separator": "\\n\\n"}, r"text files without the separator '\\\\n\\\\n', each one"),
    ("a.txt", b"one\n\ntwo", {"separator": "\n\n"}, ""),
    ("a.txt", b"one\n\ntwo", {}, ""),
    ("a.tsv", b'id\ttext\n1\tx\n2\t"a\n3\tb"\n4\tc\n', {}, r"rows of several lines in quotes.*: 1 .*a.tsv, line 3\)"),
    ("a.tsv", b'id\ttext\n1\t"x"\n', {}, ""),
])  # fmt: skip
def test_what_looks_like_a_mistake_is_reported(tmp_path, name, content, options, words):
    (tmp_path / name).write_bytes(content)
    notes = Notes()
    assert read(tmp_path / name, notes=notes, **options)
    assert re.match(words, str(notes)) if words else not str(notes)


@pytest.mark.parametrize(("name", "content"), [
    ("a.parquet", parquet(["a"])),
    ("a.txt.gz", gzip.compress(b"a", mtime=0)),
    ("a.jsonl.zst", zstandard.compress(b'{"text": "a"}')),
])  # fmt: skip
def test_any_name_of_a_file_will_do(tmp_path, name, content):
    file = tmp_path / os.fsdecode(b"[\xff] \\") / os.fsdecode(b"\xff?" + name.encode())
    file.parent.mkdir()
    file.write_bytes(content)
    assert read(file) == ["a"]


def test_a_large_parquet_file_is_decoded_a_few_texts_at_a_time(tmp_path, monkeypatch):
    sizes, real = [], pyarrow.parquet.ParquetFile.iter_batches

    def counted(table, *arguments):
        for batch in real(table, *arguments):
            sizes.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", counted)
    monkeypatch.setattr(tables, "_BATCH", 4000)
    texts = [str(index) * 1000 for index in range(10)] + ["x"] * 300
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=10)
    assert read(tmp_path / "a.parquet") == texts
    assert max(sizes) <= 4000


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
    ("a.parquet.gz", gzip.compress(FILES["a.parquet"]), r"a.parquet.gz is a parquet file within another format"),
    ("a.parquet", parquet([1, 2]), r"the column text must hold text, got int64"),
    ("a.csv", b"id,story\n1,x\n", r"a.csv has no column text; prepare it with --text-key and one of id, story"),
    ("a.csv", b"id,text\n1,a\n1,b,c\n", r"a.csv, line 3: a row must have the header's 2 fields, got 3"),
    ("a.csv", b'id,text\n1,"a\nb\nc\n', r"a.csv, line 2: unexpected end of data"),
    ("a.tsv", b'id\ttext\n1\ta\n2\t"a\n3\tb\n', r"a.tsv, line 3: unexpected end of data"),
])  # fmt: skip
def test_what_is_broken_is_refused_with_its_place(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read(tmp_path / name)


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.jsonl", b'{"text": "a"}\n' + b"x" * 99 + b"\n", r"a.jsonl, line 2: a line must have at most 60 bytes"),
    ("a.csv", b"id,text\n1,a\n2," + b"x" * 99, r"a.csv, line 3: a line must have at most 60 bytes; divide it"),
    ("a.csv", b'id,text\n1,a\n2,"' + b"x\n" * 40 + b'"', r"a.csv, line 3: field larger than field limit \(60\)"),
])  # fmt: skip
def test_what_has_to_be_read_whole_has_a_bound(tmp_path, monkeypatch, name, content, words):
    monkeypatch.setattr(formats, "_CHUNK", 16)
    monkeypatch.setattr(formats, "_LONGEST", 60)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read(tmp_path / name)


def test_a_small_file_that_becomes_a_large_text_takes_little_memory(tmp_path):
    content = zstandard.compress(b" " * (1 << 27)) + zstandard.compress(b"end")
    (tmp_path / "a.txt.zst").write_bytes(content)
    assert len(content) < 10_000
    tracemalloc.start()
    sizes = sum(len(text) for text, _ in formats.read_text(tmp_path / "a.txt.zst", ReadOptions()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (sizes, peak < 100e6) == ((1 << 27) + 3, True)


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


@pytest.fixture
def tangle(tmp_path, monkeypatch):
    """A folder with links to itself, to another folder, to a file of it and to nothing, and with hidden names."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "d/a.txt",
        "d/val.txt",
        "d/sub/c.txt",
        "d/.git/x.txt",
        "d/__MACOSX/x.txt",
        "d/._a.txt",
        "other/o.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    for link, target in (("loop", "."), ("too", "."), ("more", "../other"), ("z.txt", "a.txt"), ("n.txt", "none")):
        (tmp_path / "d" / link).symlink_to(target)
    (tmp_path / "d" / "hard.txt").hardlink_to(tmp_path / "d" / "val.txt")


@pytest.mark.parametrize("pattern", ["d", "d/**/*.txt", "d/**"])
def test_loops_end_and_each_file_counts_once(tangle, pattern):
    (corpus,) = corpora(pattern)
    files = [source.path for source in corpus.train]
    assert files == ["d/a.txt", "d/hard.txt", "d/more/o.txt", "d/sub/c.txt"]
    notes = str(corpus.options.notes)
    assert "hidden names left out: 3 (d/._a.txt)" in notes
    assert f"links followed: {2 if pattern == 'd' else 1} (d/more)" in notes
    assert "files under a second name, counted once: 2 (d/val.txt)" in notes
    assert ("no regular files, left out: 1 (d/n.txt)" in notes) == (pattern == "d")


def test_a_glob_of_one_level_leaves_hidden_names_out(tangle):
    (corpus,) = corpora("d/*/*.txt")
    assert "d/__MACOSX/x.txt" not in [source.path for source in corpus.train]
    assert "hidden names left out: 1 (d/__MACOSX/x.txt)" in str(corpus.options.notes)
    (named,) = corpora("d/__MACOSX/*.txt")
    assert len(named.train) == 1


@pytest.mark.parametrize(("pattern", "chosen"), [
    ("d", ["a.txt"]),
    ("d/**/*.txt", ["a.txt"]),
    ("d/*/*.txt", None),
    ("d/r*/g*", None),
    ("d/run", ["generated_text.txt", "metrics.jsonl"]),
    ("d/run/*.txt", ["generated_text.txt"]),
])  # fmt: skip
def test_a_run_in_a_folder_of_text_is_none(tmp_path, monkeypatch, pattern, chosen):
    monkeypatch.chdir(tmp_path)
    texts = ("a.txt", "run/generated_text.txt", "run/metrics.jsonl", "mlflow-artifacts/0/1/sample/1.txt")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / ".lock").touch()  # of another program: what is beside it is text
    for name in (*texts, "run/.lock", "run/train.log", "mlflow.db"):
        (tmp_path / "d" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "d" / name).write_text(name)
    if chosen is None:
        with pytest.raises(UserError, match="matches no file"):
            corpora(pattern)
        return
    (corpus,) = corpora(pattern)
    assert [source.path.rpartition("/")[2] for source in corpus.train] == chosen
    told = "in run directories or prepared folders, left out: 2 (d/" in str(corpus.options.notes)
    assert told == ("run" not in pattern)


@pytest.mark.parametrize("val_input", ["d/val.txt", "d/loop/hard.txt", "d/v*.txt"])
@pytest.mark.parametrize("pattern", ["d", "d/*.txt"])
def test_what_is_validated_on_is_left_out_of_training(tangle, pattern, val_input):
    (corpus,) = corpora(pattern, val_input=(val_input,))
    (held,) = corpus.val
    assert {"d/val.txt", "d/hard.txt"}.isdisjoint(source.path for source in corpus.train)
    assert held.path == ("d/val.txt" if "*" in val_input else val_input)
    assert "files that are validated on, left out of training: 1 (d/hard.txt)" in str(corpus.options.notes)


def test_one_corpus_is_not_trained_on_what_another_validates_on(tangle):
    inputs = ("x=d", "y=other", "x=d/sub")
    with pytest.raises(UserError, match=r"the corpora x and y both have other/o.txt"):
        corpora(*inputs)
    (x, _) = corpora("x=d", "y=d/a.txt", val_input=("y=d/val.txt",), text_key=("y=other",))
    assert "d/hard.txt" in [source.path for source in x.train], "another key is another text"
    (x, _) = corpora("x=d/sub", "x=d/val.txt", "x=d/._a.txt", "y=other", val_input=("y=d/s*/c.txt",))
    assert [source.path for source in x.train] == ["d/val.txt", "d/._a.txt"]


def test_names_that_look_like_data_sets_are_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("hf:x.txt", "plays:y.txt"):
        (tmp_path / name).write_text(f"*{name}*")
    for pattern in (".", "*.txt", "**/*.txt"):
        (corpus,) = corpora(pattern)
        texts = [piece.text for piece in Documents(corpus.train, corpus.options, None)]
        assert texts == ["*hf:x.txt*", "*plays:y.txt*"]
    (named,) = corpora("./hf:x.txt")
    assert [piece.text for piece in Documents(named.train, named.options, None)] == ["*hf:x.txt*"]


def test_many_files_are_listed_without_comparing_each_with_each(monkeypatch):
    compared = []

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            compared.append(self)
            return str(self) == str(other)

    found = [Source(Name(index), f"hf:{index}", False) for index in range(500)]
    monkeypatch.setattr(sources, "_find", lambda *_: found)
    (corpus,) = corpora("x.txt")
    assert len(corpus.train) == len(found)
    assert len(compared) < 10 * len(found)


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
    ({"input": ("x.json.gz",)}, "x.json.gz is of no known format"),
    ({"input": ("fifo",)}, "fifo is a pipe or a device, which cannot be read twice; write it to a file"),
    ({"input": ("/dev/null",)}, "/dev/null is a pipe or a device"),
    ({"input": ("tokenizer=x.text",)}, "a corpus cannot be called tokenizer"),
    ({"input": ("x.text",), "val_input": ("./x.text",)}, "--val-input and --input of text both name"),
    ({"input": ("x.text",), "val_input": ("link",)}, "--val-input and --input of text both name"),
    ({"input": ("x.*t",), "val_input": ("x.text",)}, "--val-input and --input of text both name"),
    ({"input": ("hf:x",), "val_input": ("hf:x:train",)}, "--val-input and --input of text both name hf:x:train"),
    ({"input": ("a=x.text", "b=link")}, "the corpora a and b both have"),
])  # fmt: skip
def test_inputs_that_cannot_be_are_refused(tmp_path, monkeypatch, settings, words):
    monkeypatch.chdir(tmp_path)
    for name in ("x.text", "x.json", "x.json.gz"):
        (tmp_path / name).write_text("x")
    (tmp_path / "link").symlink_to("x.text")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match=words):
        find_corpora(PrepareConfig(**settings))
