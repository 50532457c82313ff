"""Tokenizers: round trips, special text, folders."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.command import UserError
from moe_jax.data.tokenizer import build_tokenizer, fingerprint, load_tokenizer, save_tokenizer

TEXTS = ["To be, or not to be: that is the question.\n" * 20, "Whether 'tis nobler in the mind to suffer\n" * 20]
SPECS = ["char", "byte", "bpe:300"]


@pytest.fixture(scope="module", params=SPECS)
def tokenizer(request):
    return build_tokenizer(request.param, TEXTS)


def test_training_text_comes_back(tokenizer):
    ids = tokenizer.encode(TEXTS[0])
    assert tokenizer.decode(ids) == TEXTS[0]
    assert all(0 <= index < tokenizer.vocab_size for index in ids)
    assert tokenizer.endoftext_id not in ids


def test_text_that_looks_special_is_text(tokenizer):
    assert tokenizer.endoftext_id not in tokenizer.encode("a <|endoftext|> b")
    assert tokenizer.decode([tokenizer.endoftext_id]) == "<|endoftext|>"


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.name, loaded.vocab_size) == (tokenizer.name, tokenizer.vocab_size)
    assert (loaded.endoftext_id, loaded.unknown_id) == (tokenizer.endoftext_id, tokenizer.unknown_id)
    assert loaded.encode("that is 42 🙂\0") == tokenizer.encode("that is 42 🙂\0")
    assert fingerprint(loaded) == fingerprint(tokenizer)


@pytest.mark.parametrize("spec", ["byte", "bpe:300"])
def test_any_unicode_round_trips(spec):
    tokenizer = build_tokenizer(spec, TEXTS)

    @settings(derandomize=True, deadline=None, max_examples=60)
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
    def check(text):
        assert tokenizer.decode(tokenizer.encode(text)) == text

    check()
    check_text = "<|endoftext|>\0\r\n\t 你好 🙂é"
    assert tokenizer.decode(tokenizer.encode(check_text)) == check_text


def test_unknown_characters_have_a_token_of_their_own():
    tokenizer = build_tokenizer("char", TEXTS)
    ids = tokenizer.encode("to é")
    assert ids[-1] == tokenizer.unknown_id
    assert tokenizer.decode(ids) == "to \N{REPLACEMENT CHARACTER}"


def test_bpe_merges_and_ends_where_the_text_does():
    tokenizer = build_tokenizer("bpe:300", TEXTS)
    assert tokenizer.vocab_size <= 300
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    small = build_tokenizer("bpe:4096", ["abab"])
    assert small.vocab_size < 300
    assert small.decode(small.encode("xyz abab")) == "xyz abab"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no tokenizer at"),
        ("{", "is corrupt"),
        ('{"version": 99, "kind": "byte"}', "format version 99"),
        ('{"version": 1, "kind": "bpe"}', "is corrupt"),
        ('{"version": 1, "kind": "runes"}', "unknown kind 'runes'"),
        ("[]", "is corrupt"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=words):
        load_tokenizer(tmp_path)


def test_the_folder_is_plain_json(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    assert json.loads((tmp_path / "tokenizer.json").read_text())["version"] == 1
