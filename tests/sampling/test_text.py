"""Pieces of text as tokens come: whole characters only, and together what the whole list decodes to."""

import numpy as np
import pytest

from moe_jax.data.tokenizer import REPLACEMENT
from moe_jax.prepare.tokenizer import build_tokenizer
from moe_jax.sampling.text import StopStream, TextStream, stop_in

BYTES = build_tokenizer("byte", [])
# One to four bytes a character.
TEXT = "déjà vu: 你好, 🙂🙂 ∀ε>0.\n" * 3


def pieces(tokenizer, chunks):
    stream = TextStream(tokenizer)
    return [*(stream.add(chunk) for chunk in chunks), stream.finish()]


def in_chunks(ids, size):
    return [ids[start : start + size] for start in range(0, len(ids), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 1000])
@pytest.mark.parametrize("spec", ["byte", "char", "bpe:300"])
def test_pieces_are_whole_characters_and_the_text(spec, size):
    tokenizer = build_tokenizer(spec, [TEXT])
    ids = tokenizer.encode(TEXT).tolist()
    given = pieces(tokenizer, in_chunks(ids, size))
    assert "".join(given) == TEXT
    assert REPLACEMENT not in "".join(given)


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([[index] for index in BYTES.encode("a🙂b").tolist()], ["a", "", "", "", "🙂", "b", ""]),
        ([BYTES.encode("a🙂").tolist()[:-1], []], ["a", "", REPLACEMENT]),
    ],
)
def test_a_character_is_given_as_soon_as_it_is_whole_and_half_a_one_at_the_end(chunks, expected):
    assert pieces(BYTES, chunks) == expected


def test_bytes_that_are_no_text_are_given_as_the_whole_list_decodes():
    generator = np.random.default_rng(0)
    for _ in range(200):
        # Starts and continuations of characters, in any order.
        ids = generator.choice([0x41, 0x80, 0xA9, 0xC3, 0xE4, 0xBD, 0xF0, 0x9F, 0xFF, 256], 30).tolist()
        size = int(generator.integers(1, 9))
        assert "".join(pieces(BYTES, in_chunks(ids, size))) == BYTES.decode(ids)


def test_a_long_run_of_unknown_characters_is_not_held_back():
    tokenizer = build_tokenizer("char", ["ab"])
    given = pieces(tokenizer, [[tokenizer.unknown_id] * 4] * 4)
    assert [len(piece) for piece in given] == [1, 4, 4, 4, 3]


class FirstWordBare:
    """As sentencepiece decodes: a space before each word but the first."""

    def decode(self, ids):
        return " ".join("abc"[index] for index in ids)


def test_a_tokenizer_that_decodes_a_first_token_differently():
    assert pieces(FirstWordBare(), [[0], [1], [2, 0]]) == ["a", " b", " c a", ""]


def ends_at(text, stops):
    """The oracle: character by character, the first moment at which the text ends in a stop."""
    for end in range(1, len(text) + 1):
        whole = [stop for stop in stops if text[:end].endswith(stop)]
        if whole:
            return end - max(map(len, whole))
    return len(text)


@pytest.mark.parametrize(
    "stops", [["END"], ["E", "ENDE"], ["xyz", "NDE"], ["aEND", "ab"], ["EE", "EEN"], ["aENDb", "ND"], []]
)
@pytest.mark.parametrize("text", ["aaENDbb", "aaEEND", "EN", "ENENEND", "", "aEaNDE", "aaENDEb"])
def test_a_text_ends_before_its_first_stop_however_it_is_divided(stops, text):
    expected = text[: ends_at(text, stops)]
    assert text[: stop_in(text, stops)] == expected
    for size in range(1, len(text) + 2):
        stream = StopStream(stops)
        shown = [stream.add(text[start : start + size]) for start in range(0, len(text), size)]
        assert stream.is_stopped == (expected != text or any(stop in text for stop in stops))
        assert "".join(shown) + stream.finish() == expected
        assert stream.add("more") == "" or not stream.is_stopped
