"""Long documents in pieces."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import pieces as pieces_module
from moe_jax.data.pieces import in_pieces
from moe_jax.prepare.tokenizer import build_tokenizer

ATOMS = ["the", "it's", " ", "  ", "\n", "\n\n", "\r\n", ".", "'ll", "12345", "é", "你好", "🙂", "\t", "(x)"]
WORDS = st.lists(st.sampled_from(ATOMS), max_size=60).map("".join)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(WORDS, st.lists(st.integers(0, 200), max_size=5), st.integers(3, 20))
def test_pieces_are_the_text_and_do_not_depend_on_the_chunks(text, cuts, size):
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = list(in_pieces([text[start:stop] for start, stop in pairwise(bounds)], size))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= size + 2 for piece in pieces)
    assert pieces == list(in_pieces([text], size))


def is_safe(text, place):
    if text[place - 1] == "\n":
        place -= 1
    return text[place] in " \n" and not text[place - 1].isspace() and not text[place + 1].isspace()


@pytest.mark.parametrize("spec", ["bpe:400", "gpt2", "cl100k"])
def test_the_tokens_of_pieces_are_those_of_the_whole(spec):
    tokenizer = build_tokenizer(spec, ["the quick brown fox it's 123 (x) it'll be. " * 30])
    checked: list[bool] = []

    @settings(derandomize=True, deadline=None, max_examples=300)
    @given(st.lists(WORDS, max_size=4).map(" a\nb".join))
    def check(text):
        pieces = list(in_pieces([text], 40))
        places = np.cumsum([len(piece) for piece in pieces])[:-1]
        if all(is_safe(text, place) for place in places):
            checked.append(len(pieces) > 1)
            whole = tokenizer.encode(text)
            np.testing.assert_array_equal(np.concatenate([whole[:0], *map(tokenizer.encode, pieces)]), whole)

    check()
    assert sum(checked) > 50, "most long texts have a place to cut at"


@pytest.mark.parametrize(("text", "size", "pieces"), [
    ("one two three", 9, ["one two", " three"]),
    ("one two\nthree", 9, ["one two\n", "three"]),
    ("one  two\n\nthree four", 15, ["one  two\n\nthree", " four"]),
    ("onetwothree", 5, ["onetw", "othree"]),
    ("", 5, []),
])  # fmt: skip
def test_a_safe_cut_is_at_a_single_space_or_line_end(text, size, pieces):
    assert list(in_pieces([text], size)) == pieces


@pytest.mark.parametrize("text", [" ", "a  ", "a\n\n", "a"])
def test_texts_without_a_safe_place_are_searched_once(monkeypatch, text):
    searched, safe = [], pieces_module._SAFE

    class Counted:
        def finditer(self, text, start, stop):
            searched.append(stop - start)
            return safe.finditer(text, start, stop)

    monkeypatch.setattr(pieces_module, "_SAFE", Counted())
    whole = text * ((1 << 20) // len(text) + 1)
    assert len(list(in_pieces([whole]))) >= 4
    assert sum(searched) < 1.1 * len(whole)


def test_runs_of_spaces_longer_than_a_regular_expression_can_take():
    tokenizer = build_tokenizer("bpe:300", ["a b c " * 20])
    text = "x" + " " * 1_000_000 + "y"
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text
