"""What a body may be, and what each mistake is called."""

import contextlib
import dataclasses
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
    """(message, RequestError) of a body that is refused."""
    with pytest.raises(RequestError) as raised:
        parse_completion(body, LIMITS)
    return raised.value.content["error"]["message"], raised.value


def test_the_defaults_are_those_of_the_api():
    wanted = parse(seed=1)
    sample = SampleConfig(max_new_tokens=16, temperature=1.0, top_p=1.0, seed=1)
    assert wanted == CompletionRequest(("",), sample, None, echo=False, stream=False, include_usage=False)
    nulls = dict.fromkeys(["prompt", "max_tokens", "stop", "logit_bias", "stream_options", "best_of", "logprobs"])
    assert parse(seed=1, **nulls) == wanted


def test_who_names_no_max_tokens_gets_no_more_than_the_server_allows():
    limits = dataclasses.replace(LIMITS, max_output_tokens=8)
    assert parse_completion(b'{"model": "tiny"}', limits).sample.max_new_tokens == 8


def test_without_a_seed_each_request_has_its_own():
    assert len({parse().sample.seed for _ in range(5)}) > 1
    # Of 64 bits the sampler takes 32.
    assert parse(seed=2**32 + 5).sample.seed == 5
    assert parse(seed=-1).sample.seed == 2**32 - 1


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ("a",)), (["a", ""], ("a", "")), ([1, 2], ([1, 2],)), ([[1], [2, 3]], ([1], [2, 3]))],
)
def test_the_four_forms_of_a_prompt(prompt, prompts):
    assert parse(prompt=prompt).prompts == prompts


EVERY_FIELD = b"""{
  "model": "tiny", "prompt": "a", "max_tokens": 5, "n": 2, "best_of": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7,
  "min_p": 0.1, "repetition_penalty": 1.2, "stop": ["x", "yz"], "stop_token_ids": [9, 4, 9], "logprobs": 0, "seed": 3,
  "stream": true, "stream_options": {"include_usage": true, "include_obfuscation": false, "x": null},
  "user": "someone", "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "suffix": ""
}"""


def test_every_field_arrives():
    wanted = parse_completion(EVERY_FIELD, LIMITS)
    sampler = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 3}
    expected = SampleConfig(max_new_tokens=5, num_samples=2, stop=("x", "yz"), stop_tokens=(4, 9), **sampler)
    assert (wanted.prompts, wanted.sample, wanted.echo) == (("a",), expected, False)
    assert (wanted.logprobs, wanted.stream, wanted.include_usage) == (0, True, True)
    assert parse(top_k=-1).sample.top_k is parse(top_k=0).sample.top_k is None
    assert parse(stop="x").sample.stop == ("x",)
    assert parse(stop=list("abcde")).sample.stop == tuple("abcde")
    assert parse(max_tokens=0).sample.max_new_tokens == 0
    assert (parse(temperature=1e-9).sample.temperature, parse(top_p=0).sample.top_p) == (1e-9, 0)


def test_a_null_of_any_name_asks_for_nothing():
    assert parse(seed=1, functions=None, tool_choice=None) == parse(seed=1)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"model": "tiny", "seed": 1, "n": 1, "seed": 2}', "seed"),
        (
            b'{"model": "tiny", "stream": true, "stream_options": {"include_usage": true, "include_usage": null}}',
            "include_usage",
        ),
        (b'{"model": "tiny", "p\\u0072ompt": "a", "prompt": "b"}', "prompt"),
    ],
)
def test_a_name_that_is_there_twice_is_refused(body, name):
    message, error = refusal(body)
    assert message == f"{name} is given 2 times; give it once"
    assert error.content["error"]["param"] == name


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temprature": 1}, "temprature", "there is no field temprature; did you mean temperature?"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens must be in [0, 100], got -1; change it"),
        ({"max_tokens": 101}, "max_tokens", "max_tokens must be in [0, 100], got 101; change it"),
        ({"max_tokens": True}, "max_tokens", "max_tokens must be a whole number, got true; change it"),
        ({"max_tokens": 1.0}, "max_tokens", "max_tokens must be a whole number, got 1.0; change it"),
        ({"temperature": -0.1}, "temperature", "temperature must be a number in [0, 2], got -0.1; change it"),
        ({"temperature": 2.1}, "temperature", "temperature must be a number in [0, 2], got 2.1; change it"),
        ({"temperature": "1"}, "temperature", 'temperature must be a number in [0, 2], got "1"; change it'),
        ({"top_p": -1e-9}, "top_p", "top_p must be in [0.0, 1.0], got -1e-09; change it"),
        ({"top_k": -2}, "top_k", "top_k must be at least 1, got -2"),
        ({"min_p": 1.5}, "min_p", "min_p must be in [0.0, 1.0], got 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty must be in [0.01, 100.0], got 0"),
        ({"n": 0}, "n", "n must be in [1, 8], got 0"),
        ({"n": 9}, "n", "n must be in [1, 8], got 9"),
        ({"n": 3, "prompt": ["a"] * 3}, "n", "a request may ask for 8 texts, got 3 prompts times n=3; send several"),
        ({"prompt": ["a"] * 9}, "prompt", "a request may ask for 8 texts"),
        *(
            ({"prompt": prompt}, "prompt", "prompt must be a string, a list of strings, token ids or a list of lists")
            for prompt in ([], [[]], ["a", 1], [True], {"a": 1}, [[1.5]])
        ),
        *(
            ({"stop": stop}, "stop", "stop must be a string of 1 to 1000 characters, or a list of up to 64 of them")
            for stop in (["a"] * 65, "", "a" * 1001, ["a", 1])
        ),
        ({"stop_token_ids": [261]}, "stop_token_ids", "stop_token_ids must be token ids in [0, 260], got [261]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "stop_token_ids must be token ids in [0, 260]"),
        ({"stop_token_ids": 1}, "stop_token_ids", "stop_token_ids must be a list of token ids, got 1"),
        ({"seed": 1.5}, "seed", "seed must be a whole number of 64 bits, got 1.5"),
        ({"seed": 2**63}, "seed", "seed must be a whole number of 64 bits, got 9223372036854775808"),
        ({"logprobs": 6}, "logprobs", "logprobs must be a whole number in [0, 5], got 6"),
        ({"logprobs": True}, "logprobs", "logprobs must be a whole number in [0, 5], got true"),
        ({"echo": 1}, "echo", "echo must be true or false, got 1"),
        ({"stream": "yes"}, "stream", 'stream must be true or false, got "yes"'),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options needs stream=true"),
        *(
            ({"stream": True, "stream_options": options}, "stream_options", "stream_options must be an object with")
            for options in ({"a": 1}, {"include_usage": 1}, [])
        ),
        ({"best_of": 2}, "best_of", "best_of must be n=1"),
        ({"best_of": True}, "best_of", "best_of must be a whole number"),
        ({"presence_penalty": 0.5}, "presence_penalty", "presence_penalty must be 0 (it is not supported), got 0.5"),
        ({"frequency_penalty": False}, "frequency_penalty", "frequency_penalty must be 0 (it is not supported)"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "logit_bias must be {} (it is not supported)"),
        ({"suffix": " at `$.prompt"}, "suffix", 'suffix must be ""'),  # a field's place, as an error names it
        ({"suffix": "x"}, "suffix", 'suffix must be "" (it is not supported), got "x"'),
        ({"user": 1}, "user", "user must be a string, got 1"),
        ({"model": None}, "model", "model is required; give 'tiny'"),
        ({"model": ["tiny"]}, "model", "model must be a string"),
    ],
)
def test_a_mistake_is_reported_with_its_field(fields, param, message):
    found, error = refusal(json.dumps({"model": "tiny", **fields}).encode())
    assert found.startswith(message)
    assert "; " in found  # the remedy
    assert (error.content["error"]["param"], error.status) == (param, 400)


def test_another_model_is_not_found():
    _, error = refusal(b'{"model": "large"}')
    content = error.content["error"]
    assert (error.status, content["code"], content["param"]) == (404, "model_not_found", "model")


NO_JSON_OBJECT = (
    *(b"", b'{"model": "tiny"', b"[]", b'"text"', b"[" * 100_000, b'{"a":' * 100_000),
    *(b'{"temperature": %s}' % number for number in (b"NaN", b"-Infinity", b"1e999", b"9" * 100_000)),
    *(b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b'{"\\udfff": 1}', "{}".encode("utf-16")),
)


@pytest.mark.parametrize("body", NO_JSON_OBJECT, ids=lambda body: repr(body[:20]))
def test_what_is_no_json(body):
    message, error = refusal(body)
    assert error.status == 400
    assert message.startswith("the body must be a JSON object in UTF-8 (")
    assert message.endswith("); correct it")
    assert len(message) < 200


def test_a_byte_order_mark_before_the_body_is_left_out():
    body = b'{"model": "tiny", "prompt": "a", "seed": 0}'
    assert parse_completion(b"\xef\xbb\xbf" + body, LIMITS) == parse_completion(body, LIMITS)


@pytest.mark.parametrize("value", [b"-" + b"9" * 4000, b'"' + b"x" * 9000 + b'"', b"[" * 900 + b"]" * 900])
@pytest.mark.parametrize("name", [b"n", b"seed", b"stop", b"prompt", b"user", b"x" * 10_000])
def test_what_is_long_is_cut(name, value):
    body = b'{"model": "tiny", "' + name + b'": ' + value + b"}"
    if value.startswith(b'"') and name in (b"prompt", b"user"):
        assert parse_completion(body, LIMITS)
    else:
        assert len(refusal(body)[0]) < 500


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
    assert refusal(body)[1].status == 400
