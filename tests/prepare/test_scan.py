"""Which documents are held out."""

from itertools import pairwise

import pytest

from moe_jax.errors import UserError
from moe_jax.prepare.scan import InputScan, hold_out
from moe_jax.prepare.sources import Piece


def pieces_of(documents, size=7):
    """Pieces of {name: text}, in parts of ``size`` characters."""
    for index, (name, text) in enumerate(documents.items()):
        bounds = [*range(0, len(text), size), len(text)]
        for start, stop in pairwise(bounds):
            yield Piece(index, name, text[start:stop], start == 0, stop == len(text))


def scanned(documents, seed=0):
    scan = InputScan(seed)
    for piece in pieces_of(documents):
        scan.add(piece)
    return scan


def split(documents, fraction=0.1, number=None, seed=0):
    """({name: text} to train on, and to validate on), with whether every document has one start and one end."""
    held_out = hold_out(scanned(documents, seed), fraction, number, "verse")
    found, is_open = {"train": {}, "val": {}}, {"train": False, "val": False}
    for name, piece in held_out.assign(pieces_of(documents)):
        assert piece.is_first != is_open[name]
        is_open[name] = not piece.is_last
        found[name][piece.name] = found[name].get(piece.name, "") + piece.text
    assert not any(is_open.values())
    return found["train"], found["val"]


@pytest.mark.parametrize(("sizes", "fraction", "train", "val"), [
    # 10 of 1,010 is nearly one in a hundred.
    ({"a": 10, "b": 1000}, 0.01, {"b": 1000}, {"a": 10}),
    # Whole documents would be far too much, or far too little.
    ({"a": 10, "b": 1000}, 0.1, {"a": 10, "b": 899}, {"b": 101}),
    ({"a": 1000, "b": 1000}, 0.05, {"a": 1000, "b": 900}, {"b": 100}),
    # Never all of them.
    ({"a": 100, "b": 100}, 0.9, {"a": 100}, {"b": 100}),
    # A single one is cut, at a piece's end (14) and within a piece (8).
    ({"a": 28}, 0.5, {"a": 14}, {"a": 14}),
    ({"a": 10}, 0.2, {"a": 8}, {"a": 2}),
])  # fmt: skip
def test_how_much_is_held_out_of_uneven_documents(sizes, fraction, train, val):
    documents = {name: name * size for name, size in sizes.items()}
    for order in (documents, dict(reversed(documents.items()))):
        found = split(order, fraction)
        assert [{name: len(text) for name, text in part.items()} for part in found] == [train, val]


def test_the_share_of_many_documents_and_the_seed():
    documents = {f"story {index}": "x" * (1 + index % 50) for index in range(2000)}
    train, val = split(documents, 0.07)
    assert len(train) + len(val) == 2000
    assert sum(map(len, val.values())) == pytest.approx(0.07 * sum(map(len, documents.values())), abs=25)
    assert split(documents, 0.07) == (train, val)
    other = split(documents, 0.07, seed=1)[1]
    assert len(set(other) & set(val)) < 0.2 * len(val)
    assert len(split(documents, number=30)[1]) == 30


def test_what_leaves_nothing_is_refused():
    with pytest.raises(UserError, match=r"the fraction 0.001 .* leaves nothing to train on or to validate in the 2"):
        split({"a": "xy"}, 0.001)
    with pytest.raises(UserError, match=r"--val-documents must leave something to train on, got 2 of the 2 documents"):
        split({"a": "xy", "b": "z"}, number=2)


def test_the_digest_knows_where_documents_begin():
    whole, other, again = ({"1": "ab", "2": "c"}, {"1": "a", "2": "bc"}, {"1": "ab", "2": "c"})
    assert scanned(whole).sha256("") == scanned(again).sha256("") != scanned(other).sha256("")
