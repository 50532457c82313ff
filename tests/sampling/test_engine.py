"""Text in, text out, on an untrained model: what is compiled equals a naive loop of full forwards."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from moe_jax.config import Config, DataConfig, SampleConfig
from moe_jax.data.tokenizer import document_end, document_start
from moe_jax.errors import UserError
from moe_jax.model.decoder import Tokens, forward
from moe_jax.model.moe.backends import Machine
from moe_jax.prepare.tokenizer import build_tokenizer
from moe_jax.sampling.decode import Programs
from moe_jax.sampling.engine import Engine
from tests.sampling.tiny import CONFIG, TOKENIZER

END = document_end(TOKENIZER)


def naive_greedy(decoder, variables, prompt, count, penalty=1.0):
    """Full forwards of the growing text, without a cache; tokens in it are penalised."""
    ids = list(prompt)
    run = jax.jit(lambda tokens: forward(decoder, variables, Tokens(tokens)).logits_BLV)
    for _ in range(count):
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.array(run(padded)[0, len(ids) - 1])
        for token in set(ids):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        ids.append(int(np.argmax(logits)))
        if ids[-1] == END:
            break
    return [index for index in ids[len(prompt) :] if index != END]


def streamed(engine, variables, prompt, settings):
    return engine.stream(variables, engine.begin(prompt, settings))


@pytest.mark.parametrize("prompt", ["", "a", "bad", "hgfedcb"])
def test_greedy_text_equals_a_loop_of_full_forwards(rotary, prompt):
    engine, variables, decoder = rotary
    ids = TOKENIZER.encode(prompt).tolist() or [END]  # from nothing it starts at the end-of-text token
    count = 16 - len(ids)  # to the end of the context, in two or three chunks
    (sample,) = engine.generate(variables, prompt, SampleConfig(temperature=0.0, max_new_tokens=count))
    expected = naive_greedy(decoder, variables, ids, count)
    assert sample.tokens == expected
    assert sample.text == TOKENIZER.decode(expected)


@pytest.mark.parametrize("penalty", [1.3, 1.8])
def test_what_was_drawn_is_penalised_as_the_prompt_is(rotary, penalty):
    engine, variables, decoder = rotary
    settings = SampleConfig(temperature=0.0, max_new_tokens=12, repetition_penalty=penalty)
    tokens = [sample.tokens for sample in engine.finish(variables, engine.begin_all(["bad", "hg"], settings))]
    expected = [naive_greedy(decoder, variables, TOKENIZER.encode(prompt), 12, penalty) for prompt in ("bad", "hg")]
    assert tokens == expected
    assert tokens[0] != naive_greedy(decoder, variables, TOKENIZER.encode("bad"), 12)


def test_the_same_seed_gives_the_same_text_and_samples_differ(rotary):
    engine, variables, _ = rotary
    settings = SampleConfig(max_new_tokens=12, num_samples=4, temperature=1.0, top_p=1.0, seed=3)
    first = engine.generate(variables, "ab", settings)
    assert [s.text for s in first] == [s.text for s in engine.generate(variables, "ab", settings)]
    assert len({s.text for s in first}) > 1
    other = engine.generate(variables, "ab", dataclasses.replace(settings, seed=4))
    assert [s.text for s in first] != [s.text for s in other]
    # A sample does not depend on how many others are drawn beside it.
    alone = engine.generate(variables, "ab", dataclasses.replace(settings, num_samples=1))
    assert alone[0].text == first[0].text


def test_log_probabilities_are_those_of_the_model_itself(rotary):
    engine, variables, decoder = rotary
    settings = SampleConfig(max_new_tokens=12, temperature=2.0, top_k=5, num_samples=3, repetition_penalty=1.3, seed=1)
    prompt = TOKENIZER.encode("bad").tolist()
    samples = engine.generate(variables, "bad", settings)
    texts = [[*prompt, *sample.tokens] for sample in samples]
    padded_BL = np.array([text + [0] * (16 - len(text)) for text in texts], np.int32)
    logprobs_BLV = jax.jit(lambda: jax.nn.log_softmax(forward(decoder, variables, Tokens(padded_BL)).logits_BLV))()
    for sample, logprobs_LV in zip(samples, np.asarray(logprobs_BLV)[:, len(prompt) - 1 :], strict=True):
        expected = [row[token] for row, token in zip(logprobs_LV, sample.tokens, strict=False)]
        assert len(expected) == len(sample.tokens) == len(sample.logprobs)
        np.testing.assert_allclose(sample.logprobs, expected, atol=1e-5)


def test_a_sample_ends_before_a_stop(rotary):
    engine, variables, _ = rotary
    settings = SampleConfig(max_new_tokens=40, temperature=1.0, num_samples=6, seed=1)
    plain = engine.generate(variables, "ab", settings)
    letter = max(plain, key=lambda sample: len(sample.text)).text[9]
    stopped = engine.generate(variables, "ab", dataclasses.replace(settings, stop=("zz", letter)))
    assert any(letter in sample.text for sample in plain)
    for sample, whole in zip(stopped, plain, strict=True):
        assert sample.text == whole.text.split(letter)[0]
        if letter in whole.text:
            # The token that completes the stop is the last one.
            assert (sample.finish_reason, sample.tokens) == ("stop", whole.tokens[: len(sample.tokens)])
            assert TOKENIZER.decode(sample.tokens) == sample.text + letter
            assert len(sample.logprobs) == len(sample.tokens)
        else:
            assert sample == whole
    one = dataclasses.replace(settings, stop=(letter,))
    assert "".join(streamed(engine, variables, "ab", one)) == stopped[0].text


@pytest.mark.parametrize("max_new_tokens", [1, 2, 9, 10, 40])
def test_a_text_is_the_same_streamed_or_not(rotary, max_new_tokens):
    engine, variables, _ = rotary
    for seed in range(4):
        settings = SampleConfig(max_new_tokens=max_new_tokens, num_samples=4, temperature=1.0, seed=seed)
        pieces = list(streamed(engine, variables, "ab", settings))
        sample = engine.generate(variables, "ab", settings)[0]
        assert "".join(pieces) == sample.text
        # The first token comes alone, and then eight at a time.
        drawn = len(sample.tokens) + (sample.finish_reason == "stop")
        assert len(pieces) == 1 + math.ceil((drawn - 1) / 8)


def test_stop_tokens_end_a_sample_and_are_not_part_of_it(rotary):
    engine, variables, _ = rotary
    settings = SampleConfig(max_new_tokens=30, temperature=1.0, num_samples=4, seed=2)
    plain = engine.generate(variables, "ab", settings)
    token = max(plain, key=lambda sample: len(sample.tokens)).tokens[6]
    for sample, whole in zip(
        engine.generate(variables, "ab", dataclasses.replace(settings, stop_tokens=(token, END))),
        plain,
        strict=True,
    ):
        ends = token in whole.tokens
        assert sample.tokens == (whole.tokens[: whole.tokens.index(token)] if ends else whole.tokens)
        assert sample.finish_reason == ("stop" if ends else whole.finish_reason)
        assert len(sample.logprobs) == len(sample.tokens)
    with pytest.raises(UserError, match=r"each token of the prompt must be in \[0, 12\], got 13; take those of this"):
        engine.begin([1, 13], settings)


def test_a_text_knows_how_much_was_read_for_its_last_token(rotary):
    engine, variables, _ = rotary
    settings = SampleConfig(max_new_tokens=14, temperature=1.0, seed=4)
    texts = [engine.begin("abc", settings, number) for number in range(16)]
    engine.finish(variables, texts)
    assert {text.finish_reason for text in texts} == {"stop", "length"}
    for text in texts:
        # The token that ended a text was drawn after all of ``tokens`` were read, another one before itself.
        assert text.num_read == 3 + len(text.tokens) - (text.finish_reason == "length")


def test_a_stream_can_be_left_and_begun_again(rotary):
    engine, variables, _ = rotary
    settings = SampleConfig(max_new_tokens=30, temperature=1.0, seed=2)
    first = next(streamed(engine, variables, "ab", settings))
    assert "".join(streamed(engine, variables, "ab", settings)).startswith(first)


def test_a_prompt_longer_than_the_context_is_refused(rotary):
    engine, variables, _ = rotary
    engine.generate(variables, "a" * 16, SampleConfig(max_new_tokens=1))
    with pytest.raises(UserError, match="the prompt must fit the context of 16 tokens, got 17; shorten the prompt"):
        engine.generate(variables, "a" * 17, SampleConfig(max_new_tokens=1))


def test_a_prompt_is_the_start_of_a_document_where_training_rows_were(rotary):
    _, variables, decoder = rotary
    greedy = SampleConfig(temperature=0.0, max_new_tokens=6)
    engine = Engine(Config(model=CONFIG, data=DataConfig(mode="packed")), TOKENIZER, Machine("cpu"))
    prompt = [document_start(TOKENIZER), *TOKENIZER.encode("bad")]
    assert engine.generate(variables, "bad", greedy)[0].tokens == naive_greedy(decoder, variables, prompt, 6)


def test_chat_delimiters_start_and_end_a_text(rotary):
    _, variables, decoder = rotary
    chat = build_tokenizer("char", ["abcdefgh"], "chat")
    engine = Engine(Config(model=CONFIG), chat, Machine("cpu"))
    (sample,) = engine.generate(variables, "", SampleConfig(temperature=0.0, max_new_tokens=8))
    start, end = chat.specials["<|im_start|>"], chat.specials["<|im_end|>"]
    # The same drawing, without an end: it stops where <|im_end|> comes, and not at <|endoftext|>.
    ids = [start]
    run = jax.jit(lambda tokens: forward(decoder, variables, Tokens(tokens)).logits_BLV)
    for _ in range(8):
        ids.append(int(np.argmax(run(np.array([ids + [0] * (16 - len(ids))], np.int32))[0, len(ids) - 1])))
    expected = ids[1 : ids.index(end)] if end in ids else ids[1:]
    assert sample.tokens == expected


def test_each_shape_has_the_backend_of_its_number_of_tokens_whatever_the_run_was_trained_with():
    moe = dataclasses.replace(CONFIG.moe, dispatch="tokamax")  # which this machine does not have
    programs = Programs(dataclasses.replace(CONFIG, moe=moe), 13, Machine("cpu"), END)
    assert [programs.decoder_for(size).config.moe.dispatch for size in (1, 4, 5)] == ["by_row", "by_row", "blocked"]
