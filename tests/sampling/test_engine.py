"""Text in, text out, on an untrained model: what is compiled equals a naive loop of full forwards."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from moe_jax.config import Config, DataConfig, SampleConfig
from moe_jax.data.tokenizer import document_start
from moe_jax.errors import UserError
from moe_jax.model.machine import Machine
from moe_jax.prepare.tokenizer import build_tokenizer
from moe_jax.sampling.batch import Batch
from moe_jax.sampling.decode import Programs
from moe_jax.sampling.engine import Engine
from tests.sampling.tiny import CONFIG, END, TOKENIZER, run_of


@pytest.mark.parametrize("prompt", ["", "a", "bad", "hgfedcb"])
def test_greedy_text_equals_a_loop_of_full_forwards(rotary, prompt):
    ids = TOKENIZER.encode(prompt).tolist() or [END]  # from nothing it starts at the end-of-text token
    count = 16 - len(ids)  # to the end of the context, in two or three chunks
    (sample,) = rotary.generate(prompt, SampleConfig(temperature=0.0, max_new_tokens=count))
    expected = rotary.greedy_loop(ids, count)
    assert sample.tokens == expected
    assert sample.text == TOKENIZER.decode(expected)


@pytest.mark.parametrize("penalty", [1.3, 1.8])
def test_what_was_drawn_is_penalised_as_the_prompt_is(rotary, penalty):
    engine, variables, _ = rotary
    settings = SampleConfig(temperature=0.0, max_new_tokens=12, repetition_penalty=penalty)
    prompts = [TOKENIZER.encode(prompt).tolist() for prompt in ("bad", "hg")]
    tokens = [sample.tokens for sample in engine.finish(variables, engine.begin_all(["bad", "hg"], settings))]
    assert tokens == [rotary.greedy_loop(ids, 12, penalty=penalty) for ids in prompts]
    assert tokens[0] != rotary.greedy_loop(prompts[0], 12)


def test_the_same_seed_gives_the_same_text_and_samples_differ(rotary):
    settings = SampleConfig(max_new_tokens=12, num_samples=4, temperature=1.0, top_p=1.0, seed=3)
    first = rotary.generate("ab", settings)
    assert [s.text for s in first] == [s.text for s in rotary.generate("ab", settings)]
    assert len({s.text for s in first}) > 1
    other = rotary.generate("ab", dataclasses.replace(settings, seed=4))
    assert [s.text for s in first] != [s.text for s in other]
    # A sample does not depend on how many others are drawn beside it.
    alone = rotary.generate("ab", dataclasses.replace(settings, num_samples=1))
    assert alone[0].text == first[0].text


def test_log_probabilities_are_those_of_the_model_itself(rotary):
    settings = SampleConfig(max_new_tokens=12, temperature=2.0, top_k=5, num_samples=3, repetition_penalty=1.3, seed=1)
    prompt = TOKENIZER.encode("bad").tolist()
    samples = rotary.generate("bad", settings)
    texts = [[*prompt, *sample.tokens] for sample in samples]
    padded_BL = np.array([text + [0] * (16 - len(text)) for text in texts], np.int32)
    logprobs_BLV = jax.nn.log_softmax(run_of(rotary.decoder, rotary.variables)(padded_BL))
    for sample, logprobs_LV in zip(samples, np.asarray(logprobs_BLV)[:, len(prompt) - 1 :], strict=True):
        expected = [row[token] for row, token in zip(logprobs_LV, sample.tokens, strict=False)]
        assert len(expected) == len(sample.tokens) == len(sample.logprobs)
        np.testing.assert_allclose(sample.logprobs, expected, atol=1e-5)


def test_a_sample_ends_before_a_stop(rotary):
    settings = SampleConfig(max_new_tokens=40, temperature=1.0, num_samples=6, seed=1)
    plain = rotary.generate("ab", settings)
    letter = max(plain, key=lambda sample: len(sample.text)).text[9]
    stopped = rotary.generate("ab", dataclasses.replace(settings, stop=("zz", letter)))
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
    assert "".join(rotary.stream("ab", one)) == stopped[0].text


@pytest.mark.parametrize("max_new_tokens", [1, 2, 9, 10, 40])
def test_a_text_is_the_same_streamed_or_not(rotary, max_new_tokens):
    for seed in range(4):
        settings = SampleConfig(max_new_tokens=max_new_tokens, num_samples=4, temperature=1.0, seed=seed)
        pieces = list(rotary.stream("ab", settings))
        sample = rotary.generate("ab", settings)[0]
        assert "".join(pieces) == sample.text
        # The first token comes alone, and then eight at a time.
        drawn = len(sample.tokens) + (sample.finish_reason == "stop")
        assert len(pieces) == 1 + math.ceil((drawn - 1) / 8)


def test_stop_tokens_end_a_sample_and_are_not_part_of_it(rotary):
    settings = SampleConfig(max_new_tokens=30, temperature=1.0, num_samples=4, seed=2)
    plain = rotary.generate("ab", settings)
    token = max(plain, key=lambda sample: len(sample.tokens)).tokens[6]
    stopped = rotary.generate("ab", dataclasses.replace(settings, stop_tokens=(token, END)))
    for sample, whole in zip(stopped, plain, strict=True):
        ends = token in whole.tokens
        assert sample.tokens == (whole.tokens[: whole.tokens.index(token)] if ends else whole.tokens)
        assert sample.finish_reason == ("stop" if ends else whole.finish_reason)
        assert len(sample.logprobs) == len(sample.tokens)
    with pytest.raises(UserError, match=r"each token of the prompt must be in \[0, 12\], got 13; take those of this"):
        rotary.engine.begin([1, 13], settings)


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
    settings = SampleConfig(max_new_tokens=30, temperature=1.0, seed=2)
    first = next(rotary.stream("ab", settings))
    assert "".join(rotary.stream("ab", settings)).startswith(first)


def test_a_prompt_is_the_start_of_a_document_where_training_rows_were(rotary):
    greedy = SampleConfig(temperature=0.0, max_new_tokens=6)
    engine = Engine(Config(model=CONFIG, data=DataConfig(mode="packed")), TOKENIZER, Machine("cpu"))
    prompt = [document_start(TOKENIZER), *TOKENIZER.encode("bad")]
    assert engine.generate(rotary.variables, "bad", greedy)[0].tokens == rotary.greedy_loop(prompt, 6)


@pytest.mark.parametrize(
    ("mode", "prompt", "in_the_text"), [("windows", "", ""), ("packed", "", ""), ("packed", "bad", "bad")]
)
def test_what_stands_before_a_text_is_not_in_it_for_the_penalty(rotary, mode, prompt, in_the_text):
    """The start of a document is most often its end too, and a penalty must not keep texts from ending."""
    engine = Engine(Config(model=CONFIG, data=DataConfig(mode=mode)), TOKENIZER, Machine("cpu"))

    def seen(prompt):
        batch = Batch(rotary.engine.programs, rotary.variables, [1])
        batch.admit([engine.begin(prompt, SampleConfig())])
        return set(np.flatnonzero(batch.state.seen_BV[0]).tolist())

    assert seen(prompt) == set(TOKENIZER.encode(in_the_text).tolist())
    assert seen([END, 3]) == {END, 3}  # who asks for it has it in the text


def test_chat_delimiters_start_and_end_a_text(rotary):
    chat = build_tokenizer("char", ["abcdefgh"], "chat")
    engine = Engine(Config(model=CONFIG), chat, Machine("cpu"))
    (sample,) = engine.generate(rotary.variables, "", SampleConfig(temperature=0.0, max_new_tokens=8))
    start, end = chat.specials["<|im_start|>"], chat.specials["<|im_end|>"]
    # It stops where <|im_end|> comes, and not at <|endoftext|>.
    assert sample.tokens == rotary.greedy_loop([start], 8, end=end)


def test_each_shape_has_the_backend_of_its_number_of_tokens_whatever_the_run_was_trained_with():
    moe = dataclasses.replace(CONFIG.moe, dispatch="pallas")  # which this machine does not have
    programs = Programs(dataclasses.replace(CONFIG, moe=moe), 13, Machine("cpu"), END)
    assert [programs.decoder_for(size).config.moe.dispatch for size in (1, 4, 5)] == ["by_row", "by_row", "blocked"]
