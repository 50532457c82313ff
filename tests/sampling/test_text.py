"""Pieces of text as tokens come: whole characters only, and together what the whole list decodes to."""

import json
import re

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from moe_jax.data.hugging_face import HuggingFaceTokenizer, to_hugging_face
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


def foreign(model, decoder):
    """A tokenizer of Hugging Face's library."""
    made = tokenizers.Tokenizer(model)
    made.decoder = decoder
    return HuggingFaceTokenizer(made.to_str(), "endoftext", "a test")


WORDS = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁acnoetimup", "▁a", "▁time", "▁upon", "▁Once"]
LLAMA_DECODER = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
PIECES = ["[UNK]", "[SEP]", "once", "upon", "a", "time", "##s", "##ing", ".", "n", "'", "t"]


@pytest.fixture(scope="module", params=["metaspace", "llama", "wordpiece", "byte level"])
def tokenizer_and_ids(request):
    """(tokenizer, tokens of a text): the first token of a text, or a run of bytes, is decoded in a way of its own."""
    by_id = {word: index for index, word in enumerate(WORDS)}
    match request.param:
        case "metaspace":
            model = models.Unigram([(word, 0.0) for word in WORDS], 0, False)
            names = ["▁Once", "▁upon", "▁a", "▁time", "t"]
            return foreign(model, decoders.Metaspace()), [by_id[name] for name in names]
        case "llama":
            names = ["▁Once", "<0xC3>", "<0xA9>", *["<0xE4>", "<0xBD>", "<0xA0>"] * 3, "▁a", "t", "<0x0A>", "▁time"]
            return foreign(models.BPE(by_id, [], byte_fallback=True), LLAMA_DECODER), [by_id[name] for name in names]
        case "wordpiece":
            model = models.WordPiece({word: index for index, word in enumerate(PIECES)}, unk_token="[UNK]")
            names = ["once", "upon", "a", "time", "##s", ".", "a", "##ing"]
            return foreign(model, decoders.WordPiece("##", cleanup=True)), [PIECES.index(name) for name in names]
    ours = build_tokenizer("bpe:300", [TEXT])
    made = HuggingFaceTokenizer(json.dumps(to_hugging_face(ours)), "endoftext", "a test")
    return made, made.encode(" déjà 你🙂").tolist()


def test_a_continuation_is_what_the_whole_text_has_after_the_prompt(tokenizer_and_ids):
    tokenizer, ids = tokenizer_and_ids
    whole = tokenizer.decode(ids)
    for cut in range(len(ids)):
        before = tokenizer.decode(ids[:cut])
        for size in (1, 3, 100):
            stream = TextStream(tokenizer, ids[:cut])
            text = "".join([*map(stream.add, in_chunks(ids[cut:], size)), stream.finish()])
            # A character that the prompt has begun belongs to the continuation.
            assert before.rstrip(REPLACEMENT) + text == whole


def test_spellings_join_to_the_text_and_parts_of_characters_differ(tokenizer_and_ids):
    tokenizer, ids = tokenizer_and_ids
    names = [tokenizer.spell(token, previous) for token, previous in zip(ids, [None, *ids], strict=False)]
    shown = "".join(names)
    as_bytes = b"".join(
        bytes.fromhex(part[2:]) if part.startswith("\\x") else part.encode()
        for part in re.findall(r"\\x[0-9a-f]{2}|[^\\]", shown)
    )
    assert as_bytes.decode() == tokenizer.decode(ids)
    assert REPLACEMENT not in shown


@pytest.mark.parametrize("spec", ["byte", "bpe:300", "gpt2"])
def test_every_byte_has_a_spelling_of_its_own(spec):
    tokenizer = build_tokenizer(spec, [TEXT])
    names = [tokenizer.spell(token, 65) for token in range(256)]
    assert len(set(names)) == 256
    assert sum(name.startswith("\\x") for name in names) == 128


def test_a_character_that_is_unknown_in_the_prompt_is_not_given_again():
    tokenizer = build_tokenizer("char", ["ab"])
    unknown = tokenizer.unknown_id
    stream = TextStream(tokenizer, [0, unknown])
    assert [stream.add(tokens) for tokens in ([unknown], [1, unknown], [0])] == [
        "",
        REPLACEMENT + "b",
        REPLACEMENT + "a",
    ]


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
