"""Text in: the rendered plays, files, folders and their split."""

import re

import pytest

from moe_jax.command import UserError
from moe_jax.data.sources import Document, load_documents, render_play, split_documents

MARKDOWN = """# The Little Play

## ACT I

### SCENE I. A street.

_Enter ADA and
BEN, running_

**ADA**  
Good morrow, Ben. _\\[Aside]_ He's late.  
Why \\--so slow?

**BEN &amp; ADA**  
__\\[Singing]_  
*Heigh* ho!

_Exeunt_
"""  # noqa: W291 - two spaces at the end of a line are Markdown's line break

PLAIN = """The Little Play

ACT I

SCENE I. A street.

[Enter ADA and
BEN, running]

ADA:
Good morrow, Ben. [Aside] He's late.
Why --so slow?

BEN & ADA:
[Singing]
Heigh ho!

[Exeunt]
"""


@pytest.fixture(scope="module")
def plays():
    return load_documents(None)


def test_a_play_is_rendered_as_plain_text():
    assert render_play(MARKDOWN) == PLAIN


def test_the_embedded_plays_are_plain_play_text(plays):
    assert len(plays) == 38
    text = "".join(play.text for play in plays)
    assert 4_900_000 < len(text) < 5_200_000
    assert not re.search(r"[*_\\#<>|`]|&[a-z]+;|  $", text, re.M)
    assert "\nHAMLET:\nTo be, or not to be: that is the question:\n" in text
    assert len(re.findall(r"^[A-Z][A-Za-z' &]+:$", text, re.M)) > 30_000


def test_whole_plays_are_held_out(plays):
    train, val = split_documents(plays, 0.05)
    assert {play.name for play in train} | {play.name for play in val} == {play.name for play in plays}
    assert not {play.name for play in train} & {play.name for play in val}
    share = sum(len(play.text) for play in val) / sum(len(play.text) for play in plays)
    assert 0.03 < share < 0.07
    assert split_documents(plays[::-1], 0.05)[1] == val[::-1], "the order of the files must not matter"


def test_a_single_document_is_cut_at_its_end():
    train, val = split_documents([Document("a", "0123456789")], 0.2)
    assert (train[0].text, val[0].text) == ("01234567", "89")


def lengths(documents):
    return {document.name: len(document.text) for document in documents}


@pytest.mark.parametrize(
    ("sizes", "fraction", "train", "val"),
    [
        # 10 of 1,010 is nearly one in a hundred.
        ({"a": 10, "b": 1000}, 0.01, {"b": 1000}, {"a": 10}),
        # Whole documents would be far too much, or far too little.
        ({"a": 10, "b": 1000}, 0.1, {"a": 10, "b": 899}, {"b": 101}),
        ({"a": 1000, "b": 1000}, 0.05, {"a": 1000, "b": 900}, {"b": 100}),
        # Never all of them.
        ({"a": 100, "b": 100}, 0.9, {"a": 100}, {"b": 100}),
    ],
)
def test_how_much_is_held_out_of_uneven_documents(sizes, fraction, train, val):
    documents = [Document(name, name * size) for name, size in sizes.items()]
    for order in (documents, documents[::-1]):
        assert tuple(map(lengths, split_documents(order, fraction))) == (train, val)


def test_files_and_folders(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfbee\r\n")
    (tmp_path / "sub" / "a.md").write_text("# ay\n")
    (tmp_path / "c.csv").write_text("ignored")
    assert [(d.name, d.text) for d in load_documents(str(tmp_path))] == [("b.txt", "bee\r\n"), ("sub/a.md", "# ay\n")]
    assert load_documents(str(tmp_path / "c.csv")) == [Document("c.csv", "ignored")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b" \n\t ", "has no text"),
        (b"ab\xffcd", r"not UTF-8 text \(byte 2\)"),
        (b"ab\0cd", r"a NUL byte at 2"),
    ],
)
def test_what_is_not_text_is_refused(tmp_path, content, words):
    (tmp_path / "file.txt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_documents(str(tmp_path / "file.txt"))


def test_missing_and_empty_places_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_documents(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"holds no \.txt or \.md file"):
        load_documents(str(tmp_path))
    with pytest.raises(UserError, match="leaves nothing"):
        split_documents([Document("a", "xy")], 0.001)
