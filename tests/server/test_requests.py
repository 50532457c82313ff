"""What a body may be, and what each mistake is called."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import SampleConfig
from moe_jax.server.requests import CompletionRequest, Limits, RequestError, parse_completion

LIMITS = Limits("tiny", vocab_size=261, max_prompt_tokens=64, max_output_tokens=100, max_texts=8)


def parse(**fields):
    return parse_completion(json.dumps({"model": "tiny", **fields}).encode(), LIMITS)


def refusal(body):
    with pytest.raises(RequestError) as raised:
        parse_completion(body, LIMITS)
    return raised.value


def refusal_of(**fields):
    return refusal(json.dumps({"model": "tiny", **fields}).encode())


def test_the_defaults_are_those_of_the_api():
    wanted = parse(seed=1)
    sample = SampleConfig(max_new_tokens=16, temperature=1.0, top_p=1.0, seed=1)
    assert wanted == CompletionRequest(("",), sample, None, echo=False, stream=False, include_usage=False)
    nulls = dict.fromkeys(["prompt", "max_tokens", "stop", "logit_bias", "stream_options", "best_of", "logprobs"])
    assert parse(seed=1, **nulls) == wanted


def test_without_a_seed_each_request_has_its_own():
    assert len({parse().sample.seed for _ in range(5)}) > 1
    # Of 64 bits the sampler takes 32.
    assert parse(seed=2**32 + 5).sample.seed == 5
    assert parse(seed=-1).sample.seed == 2**32 - 1


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ("a",)), (["a", ""], ("a", "")), ([1, 2], ((1, 2),)), ([[1], [2, 3]], ((1,), (2, 3)))],
)
def test_the_four_forms_of_a_prompt(prompt, prompts):
    assert parse(prompt=prompt).prompts == prompts


def test_every_field_arrives():
    wanted = parse(
        prompt="a",
        max_tokens=5,
        n=2,
        best_of=2,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        repetition_penalty=1.2,
        stop=["x", "yz"],
        stop_token_ids=[9, 4, 9],
        logprobs=0,
        stream=True,
        stream_options={"include_usage": True},
        user="someone",
        presence_penalty=0.0,
        frequency_penalty=0,
        logit_bias={},
        suffix="",
        seed=3,
    )
    assert wanted.sample == SampleConfig(
        max_new_tokens=5,
        num_samples=2,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        repetition_penalty=1.2,
        stop=("x", "yz"),
        stop_tokens=(4, 9),
        seed=3,
    )
    assert (wanted.logprobs, wanted.stream, wanted.include_usage) == (0, True, True)
    assert parse(top_k=-1).sample.top_k is parse(top_k=0).sample.top_k is None
    assert parse(stop="x").sample.stop == ("x",)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temprature": 1}, "temprature", "there is no field temprature; did you mean temperature?"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be in [1, 100], got 0; raise it"),
        ({"max_tokens": 101}, "max_tokens", "max_tokens must be in [1, 100], got 101; lower it"),
        ({"max_tokens": True}, "max_tokens", "max_tokens must be of type int, got True of type bool"),
        ({"max_tokens": 1.0}, "max_tokens", "max_tokens must be of type int, got 1.0 of type float"),
        ({"temperature": -0.1}, "temperature", "temperature must be in [0, 2], got -0.1; raise it"),
        ({"temperature": 2.1}, "temperature", "temperature must be in [0, 2], got 2.1; lower it"),
        ({"temperature": "1"}, "temperature", "temperature must be of type float, got '1' of type str"),
        ({"temperature": 1e-5}, "temperature", "temperature must be 0 (the most likely token) or at least 0.001"),
        ({"top_p": 0}, "top_p", "top_p must be in [1e-06, 1.0], got 0; change it"),
        ({"top_k": -2}, "top_k", "top_k must be at least 1, got -2"),
        ({"min_p": 1.5}, "min_p", "min_p must be in [0.0, 1.0], got 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty must be in [0.01, 100.0], got 0"),
        ({"n": 0}, "n", "n must be in [1, 8], got 0; raise it"),
        ({"n": 9}, "n", "n must be in [1, 8], got 9; lower it"),
        ({"n": 3, "prompt": ["a"] * 3}, "n", "a request may ask for 8 texts, got 3 prompts times n=3; send several"),
        ({"prompt": ["a"] * 9}, "prompt", "a request may ask for 8 texts"),
        ({"prompt": []}, "prompt", "prompt must be a string, a list of strings"),
        ({"prompt": [[]]}, "prompt", "prompt must be a string"),
        ({"prompt": ["a", 1]}, "prompt", "prompt must be a string"),
        ({"prompt": [True]}, "prompt", "prompt must be a string"),
        ({"prompt": {"a": 1}}, "prompt", "prompt must be a string"),
        ({"stop": ["a"] * 5}, "stop", "stop must be a string or up to 4"),
        ({"stop": ""}, "stop", "each of stop must have at least one character"),
        ({"stop": "a" * 1001}, "stop", "each of stop may have 1000 characters"),
        ({"stop_token_ids": [261]}, "stop_token_ids", "stop_token_ids must be a list of token ids in [0, 260]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "stop_token_ids must be"),
        ({"stop_token_ids": 1}, "stop_token_ids", "stop_token_ids must be"),
        ({"seed": 1.5}, "seed", "seed must be a whole number, got 1.5"),
        ({"logprobs": 6}, "logprobs", "logprobs must be a whole number in [0, 5], got 6"),
        ({"logprobs": True}, "logprobs", "logprobs must be a whole number in [0, 5], got true"),
        ({"logprobs": 1, "echo": True}, "logprobs", "logprobs of an echoed prompt are not supported"),
        ({"echo": 1}, "echo", "echo must be true or false, got 1"),
        ({"stream": "yes"}, "stream", 'stream must be true or false, got "yes"'),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options needs stream=true"),
        ({"stream": True, "stream_options": {"a": 1}}, "stream_options", "stream_options may have include_usage"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage", "include_usage must be true or"),
        ({"best_of": 2}, "best_of", "best_of must be n=1"),
        ({"best_of": True}, "best_of", "best_of must be n=1"),
        ({"presence_penalty": 0.5}, "presence_penalty", "presence_penalty is not supported; leave it out, or give 0"),
        ({"frequency_penalty": False}, "frequency_penalty", "frequency_penalty is not supported"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "logit_bias is not supported; leave it out, or give {}"),
        ({"suffix": "x"}, "suffix", 'suffix is not supported; leave it out, or give ""'),
        ({"user": 1}, "user", "user must be a string, got 1"),
        ({"model": None}, "model", "model is required; give 'tiny'"),
        ({"model": ["tiny"]}, "model", "model must be a string"),
    ],
)
def test_a_mistake_is_told_with_its_field(fields, param, message):
    error = refusal_of(**fields)
    assert error.message.startswith(message)
    assert "; " in error.message  # the remedy
    assert (error.param, error.status) == (param, 400)


def test_another_model_is_not_found():
    error = refusal_of(model="large")
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body must be JSON (Expecting value"),
        (b'{"model": "tiny"', "the body must be JSON (Expecting"),
        (b"[]", "the body must be a JSON object, got []"),
        (b'"text"', "the body must be a JSON object"),
        (b'{"temperature": NaN}', "the body must be JSON (NaN is not a finite number)"),
        (b'{"temperature": -Infinity}', "the body must be JSON (-Infinity is not a finite number)"),
        (b'{"temperature": 1e999}', "the body must be JSON (1e999 is not a finite number)"),
        (b'{"seed": 9223372036854775808}', "the body must be JSON (9223372036854775808 has more than 64 bits)"),
        (b'{"seed": ' + b"9" * 100_000 + b"}", "the body must be JSON (999"),
        (b'{"prompt": "\xff"}', "the body must be UTF-8 text, got another byte at 12"),
        (b'{"prompt": "\\ud800"}', "the body has half of a surrogate pair"),
        (b'{"\\udfff": 1}', "the body has half of a surrogate pair"),
        ("{}".encode("utf-16"), "the body must be UTF-8 text"),
        (b"\xef\xbb\xbf{}", "the body must be JSON (Unexpected UTF-8 BOM"),
        (b"[" * 100_000, "the body must be JSON, got too many brackets"),
        (b'{"a":' * 100_000, "the body must be JSON, got too many brackets"),
        (b'{"model": "tiny", "' + b"x" * 10_000 + b'": 1}', "there is no field xxx"),
    ],
)
def test_what_is_no_request(body, message):
    error = refusal(body)
    assert error.status == 400
    assert error.message.startswith(message)
    assert len(error.message) < 500


@pytest.mark.parametrize("depth", range(900, 1100, 20))
def test_brackets_just_below_what_can_be_read(depth):
    refusal(b'{"model": "tiny", "prompt": ' + b"[" * depth + b"]" * depth + b"}")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
NAMES = ("prompt", "max_tokens", "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "seed")
OTHERS = ("stop_token_ids", "stream", "stream_options", "logprobs", "echo", "user", "best_of", "logit_bias", "suffix")


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES + OTHERS), JSON, max_size=4))
def test_anything_is_a_request_or_a_refusal(fields):
    with contextlib.suppress(RequestError):  # and nothing else is raised
        assert parse(**fields).prompts


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_refused(body):
    assert refusal(body).status == 400
