"""Files that may be anybody's: read in bounds, and never written through a link."""

import math
import os
import socket

import pytest

from moe_jax.errors import UserError
from moe_jax.files import GrowingFile, decode_json, locked_folder, read_bytes, read_json, refuse_locked_folder


@pytest.fixture
def file(tmp_path):
    """A place for a file; the working folder is its folder, for the names of sockets are short."""
    return tmp_path / "a.json"


def sparse(file):
    with open(file, "wb") as opened:
        opened.truncate(1 << 40)


def listen(file):
    with socket.socket(socket.AF_UNIX) as opened:
        here = os.getcwd()
        os.chdir(file.parent)
        opened.bind(file.name)
        os.chdir(here)


@pytest.mark.parametrize(("make", "words"), [
    (lambda file: os.mkfifo(file), "must be a regular file, got a FIFO; put a file there"),
    (lambda file: file.symlink_to("/dev/zero"), "must be a regular file, got a device"),
    (lambda file: file.symlink_to("/dev/stdin"), "must be a regular file, got"),
    (lambda file: file.mkdir(), "must be a regular file, got a folder"),
    (listen, "must be a regular file, got a socket"),
    (sparse, "must have at most 4,194,304 bytes, got 1,099,511,627,776; put another there"),
    (lambda file: file.write_bytes(b'"%s"' % (b"x" * (4 << 20))), "must have at most 4,194,304 bytes, got 4,194,306"),
])  # fmt: skip
def test_what_may_never_end_or_fill_the_memory_is_refused_at_once(file, make, words):
    make(file)
    with pytest.raises(UserError, match=f"a.json {words}"):
        read_json(file, dict, "do something")


def test_a_link_to_a_regular_file_is_read_and_one_to_nothing_is_missing(file, tmp_path):
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        read_json(file, dict, "do something")
    (tmp_path / "elsewhere").write_text('{"a": 1}')
    assert read_json(file, dict[str, int], "do something") == {"a": 1}
    assert read_bytes(file, 8) == b'{"a": 1}'


NESTED = b'{"a":' * 63 + b"[]" + b"}" * 63


@pytest.mark.parametrize("is_lenient", [False, True])
def test_json_may_be_nested_to_a_bound_and_begin_with_a_byte_order_mark(file, is_lenient):
    assert decode_json(NESTED, dict, is_lenient=is_lenient)
    file.write_bytes(b"\xef\xbb\xbf" + NESTED)
    assert read_json(file, dict, "do something", is_lenient=is_lenient)
    for content in (b"[%s]" % NESTED, b"[" * 100_000, b'{"a":' * 500 + b"0" + b"}" * 500):
        with pytest.raises(ValueError, match="it is more than 64 levels deep"):
            decode_json(content, dict | list, is_lenient=is_lenient)


@pytest.mark.parametrize("is_lenient", [False, True])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'{"a": "1"}', b'{"a": 1.5}', b'{"a": null}', b"{}{}"]
)
def test_what_is_of_another_type_is_corrupt(file, content, is_lenient):
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"a.json is corrupt \(.*\); do something"):
        read_json(file, dict[str, int], "do something", is_lenient=is_lenient)


def test_only_who_asks_for_it_gets_what_python_alone_writes():
    content = b'{"sum": NaN, "name": "caf\\udce9"}'
    with pytest.raises(ValueError, match="malformed"):
        decode_json(content, dict)
    values = decode_json(content, dict, is_lenient=True)
    assert math.isnan(values["sum"])
    assert values["name"] == "caf\udce9"


@pytest.mark.parametrize("make", [lambda link, mine: link.symlink_to(mine), lambda link, _: os.mkfifo(link)])
def test_nothing_is_written_through_a_link_or_into_a_fifo(tmp_path, make):
    mine, run = tmp_path / "mine", tmp_path / "run"
    mine.write_text("mine")
    run.mkdir()
    for name in (".lock", "log"):
        make(run / name, mine)
    with pytest.raises(UserError, match=r"log is a .*, through which nothing is written; remove it"):
        GrowingFile(run / "log", print)
    with pytest.raises(UserError, match=r"\.lock is a .*; remove it"), locked_folder(run, "--workdir", "training in"):
        pass
    with pytest.raises(UserError, match=r"\.lock is a .*; remove it"):
        refuse_locked_folder(run, "--workdir", "training in")
    assert mine.read_text() == "mine"
