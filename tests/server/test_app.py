"""The routes over HTTP: what is answered, and what is refused before the model is asked."""

import http.client
import json
import threading
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from starlette.testclient import TestClient

from moe_jax.config import Config, DataConfig, SampleConfig
from moe_jax.data.tokenizer import ByteTokenizer
from moe_jax.model.machine import Machine
from moe_jax.sampling.engine import Engine
from moe_jax.sampling.text import Text
from moe_jax.server.app import Service, build_app
from moe_jax.server.requests import CompletionRequest, Limits
from moe_jax.server.responses import Completion, Spellings
from moe_jax.server.worker import Call
from tests.server.harness import BYTES, MODEL, events, serving, wait_until


def stream(server, **fields):
    status, headers, body = server.request("POST", "/v1/completions", {"model": "tiny", "stream": True, **fields})
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    chunks, is_done = events(body)
    assert is_done
    return chunks


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("ab", ["ab"]), ([97, 98], ["ab"]), (["ab", "c"], ["ab", "c"]), ([[97, 98], [99]], ["ab", "c"])],
)
def test_a_completion_is_what_the_generator_makes_of_a_prompt_in_every_form(server, made, prompt, texts):
    engine, variables = made
    status, answer = server.complete(prompt=prompt, max_tokens=12, seed=5, n=2)
    sample = SampleConfig(max_new_tokens=12, temperature=1.0, top_p=1.0, seed=5, num_samples=2)
    expected = engine.finish(variables, engine.begin_all(texts, sample))
    assert (status, answer["object"], answer["model"]) == (200, "text_completion", "tiny")
    found = [(choice["index"], choice["text"], choice["finish_reason"]) for choice in answer["choices"]]
    assert found == [(index, each.text, each.finish_reason) for index, each in enumerate(expected)]
    given, drawn = sum(map(len, texts)), sum(len(each.tokens) for each in expected)
    assert answer["usage"] == {
        "prompt_tokens": given,
        "completion_tokens": drawn,
        "total_tokens": given + drawn,
    }


def test_echo_shows_the_prompt_first(server):
    _, plain = server.complete(prompt=["ab", "é"], max_tokens=5, seed=1)
    for prompt in (["ab", "é"], [[97, 98], [0xC3, 0xA9]]):
        _, echoed = server.complete(prompt=prompt, max_tokens=5, seed=1, echo=True)
        assert [each["text"] for each in echoed["choices"]] == [
            shown + each["text"] for shown, each in zip(("ab", "é"), plain["choices"], strict=True)
        ]
    chunks = stream(server, prompt="ab", max_tokens=5, seed=1, echo=True)
    assert "".join(each["choices"][0]["text"] for each in chunks) == "ab" + plain["choices"][0]["text"]


@pytest.mark.parametrize(
    "options",
    [{}, {"logprobs": 3}, {"n": 3}, {"stop": ["e", "0"], "logprobs": 1}, {"logprobs": 2, "echo": True}],
)
def test_a_stream_is_the_whole_in_pieces(server, options):
    fields = {"prompt": ["ab", ""], "max_tokens": 40, "seed": 7, **options}
    _, whole = server.complete(**fields)
    chunks = stream(server, **fields)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    for expected in whole["choices"]:
        own = [each for chunk in chunks for each in chunk["choices"] if each["index"] == expected["index"]]
        assert "".join(each["text"] for each in own) == expected["text"]
        assert [each["finish_reason"] for each in own] == [None] * (len(own) - 1) + [expected["finish_reason"]]
        if "logprobs" in options:
            for name, values in expected["logprobs"].items():
                assert [value for each in own for value in each["logprobs"][name]] == values
        else:
            assert all(each["logprobs"] is None for each in own)


def test_usage_ends_a_stream_that_asks_for_it(server):
    _, whole = server.complete(prompt="ab", max_tokens=9, seed=1)
    *chunks, last = stream(server, prompt="ab", max_tokens=9, seed=1, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])


def test_log_probabilities(server):
    _, answer = server.complete(prompt="ab", max_tokens=8, temperature=0, logprobs=5)
    found = answer["choices"][0]["logprobs"]
    assert {len(values) for values in found.values()} == {answer["usage"]["completion_tokens"]}
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        # The most likely token was taken.
        assert top[token] == logprob == max(top.values()) <= 0
        assert len(top) == 5
    assert found["text_offset"] == sorted(found["text_offset"])
    assert found["text_offset"][0] == 0
    _, none = server.complete(prompt="ab", max_tokens=8, temperature=0, logprobs=0)
    shown = none["choices"][0]["logprobs"]
    assert shown["top_logprobs"] == [
        {token: value} for token, value in zip(found["tokens"], found["token_logprobs"], strict=True)
    ]


class Vowels(ByteTokenizer):
    """Shows b and c as b."""

    def spell(self, token, previous):
        return super().spell(min(token, ord("b")), previous)


@pytest.mark.parametrize(
    ("tokenizer", "drawn", "tops", "expected"),
    [
        (BYTES, 0x82, [0x80, ord("a")], [{"\\x80": -0.5, "a": -1.0, "\\x82": -3.0}, {"\\x82": -3.0}]),
        (Vowels("endoftext"), ord("b"), [ord("c"), ord("b")], [{"token_id:99": -0.5, "b": -1.0}, {"b": -3.0}]),
        (
            Vowels("endoftext"),
            ord("a"),
            [ord("c"), ord("b")],
            [{"b": -0.5, "token_id:98": -1.0, "a": -3.0}, {"a": -3.0}],
        ),
    ],
)
def test_tokens_that_look_the_same_stay_apart(tokenizer, drawn, tops, expected):
    text = Text(tokenizer, [0], SampleConfig(max_new_tokens=1), 0, end_token=-1)
    text.tokens, text.logprobs = [drawn], [-3.0]
    text.top_logprobs = [list(zip(tops, (-0.5, -1.0), strict=True))]
    spellings = Spellings(tokenizer)
    for num_top, shown in zip((2, 0), expected, strict=True):
        ticket = SimpleNamespace(text=text, pieces=[], num_tokens=1, finish_reason="length", has_begun=True)
        wanted = CompletionRequest(("",), text.sample, num_top, echo=False, stream=False, include_usage=False)
        whole = Completion(wanted, SimpleNamespace(tickets=[ticket]), spellings, "tiny").whole()
        (choice,) = whole["choices"]
        assert choice["logprobs"]["top_logprobs"] == [shown]
        assert choice["logprobs"]["token_logprobs"] == [-3.0]


def test_a_whole_answer_is_written_down_beside_the_event_loop(server, monkeypatch):
    threads, whole = [], Completion.whole
    monkeypatch.setattr(Completion, "whole", lambda self: threads.append(threading.current_thread()) or whole(self))
    loop_threads, receive = [], Call.receive
    monkeypatch.setattr(
        Call, "receive", lambda self, *gains: loop_threads.append(threading.current_thread()) or receive(self, *gains)
    )
    assert server.complete(max_tokens=2)[0] == 200
    assert len(threads) == 1
    assert threads[0] not in loop_threads


def test_a_prompt_is_tokenized_once(server, monkeypatch):
    encoded = []
    encode = type(BYTES).encode
    monkeypatch.setattr(BYTES, "encode", lambda text: encoded.append(text) or encode(BYTES, text), raising=False)
    assert server.complete(prompt=["ab", "c"], n=4, max_tokens=1)[0] == 200
    assert encoded == ["ab", "c"]


def test_a_stop_ends_a_text_before_it(server):
    fields = {"prompt": "ab", "max_tokens": 60, "seed": 1}
    text = server.complete(**fields)[1]["choices"][0]["text"]
    stop = next(character for character in text[5:] if character.isascii() and character not in text[:5])
    for ending in ({"stop": stop}, {"stop": ["\n" * 50, stop]}, {"stop_token_ids": BYTES.encode(stop).tolist()}):
        (cut,) = server.complete(**fields, **ending)[1]["choices"]
        assert cut["text"] == text[: text.index(stop)]
        assert cut["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("prompt", "code", "message"),
    [
        ("a" * 65, "context_length_exceeded", "the prompt may have 64 tokens, got 65; shorten it"),
        *(([token], None, f"each token of the prompt must be in [0, 260], got {token}") for token in (261, -1, 2**70)),
    ],
)
def test_limits_on_tokens(server, prompt, code, message):
    status, error = server.refusal("POST", "/v1/completions", {"model": "tiny", "prompt": prompt})
    assert (status, error["param"], error["code"]) == (400, "prompt", code)
    assert error["message"].startswith(message)


def test_the_start_of_a_document_counts_as_a_token_of_the_prompt():
    config = Config(model=MODEL, data=DataConfig(mode="documents"))
    engine = Engine(config, BYTES, Machine("cpu"))
    service = Service(engine, mock.Mock(), Limits("tiny", BYTES.vocab_size, 64, 100, 8))
    client = TestClient(build_app(service, None))
    for size in (64, 65):
        answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "a" * size})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["message"] == f"the prompt may have 64 tokens, got {size + 1}; shorten it"


def test_a_body_that_is_too_large(server):
    status, error = server.refusal("POST", "/v1/completions", b"x" * 1_000_000)
    assert (status, error["message"]) == (413, "the body may have 4096 bytes, got 1000000; shorten it")
    # Without a length said beforehand.
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", iter([b"x" * 3000] * 2), headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_only_json_is_read(server):
    status, error = server.refusal("POST", "/v1/completions", b"{}", {"Content-Type": "text/plain"})
    words = "the Content-Type must be application/json, got 'text/plain'; set it"
    assert (status, error["message"]) == (415, words)
    status, _, _ = server.request("POST", "/v1/completions", b"{", {"Content-Type": "Application/JSON; charset=utf-8"})
    assert status == 400


def test_models(server):
    status, _, body = server.request("GET", "/v1/models")
    (model,) = json.loads(body)["data"]
    assert (status, model["id"], model["object"], model["max_model_len"]) == (200, "tiny", "model", 64)
    assert json.loads(server.request("GET", "/v1/models/tiny")[2]) == model
    for name in ("other", "a/b", "%ff", "%00", "x" * 5000):
        status, error = server.refusal("GET", "/v1/models/" + name)
        assert (status, error["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("request_line", "status"),
    [("GET /v1/chat/completions", 404), ("GET /v1/completions", 405), ("POST /healthz", 405), ("PUT /", 405)],
)
def test_what_is_not_there_is_an_error_object(server, request_line, status):
    answered, error = server.refusal(*request_line.split())
    assert (answered, error["type"]) == (status, "invalid_request_error")


def test_another_name_of_the_host_is_refused(server):
    """A page of the web may have its own name resolved to this machine."""
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "", "127.0.0.1@evil.example"):
        status, headers, body = server.request("GET", "/v1/models", headers={"Host": host})
        assert (status, headers["content-type"]) == (400, "application/json")
        assert json.loads(body)["error"]["message"].startswith("this server is not called '")
    for host in ("localhost", "LOCALHOST:80", f"127.0.0.1:{server.port}", "[::1]:8000", "[::1]"):
        assert server.request("GET", "/v1/models", headers={"Host": host})[0] == 200


def test_requests_are_counted_by_a_few_names(server):
    def counted():
        sizes = [server.metric(f"moe_jax_{name}_tokens_total") for name in ("prompt", "generated")]
        times = [
            server.metric(f"moe_jax_{name}_seconds_count") for name in ("request_duration", "time_to_first_token")
        ]
        return np.array([server.count("other", 404), server.count("/v1/completions", 400), *sizes, *times])

    before = counted()
    for path in ("/a", "/b", "/v1/completions/x"):
        server.request("GET", path)
    server.complete(n=0)
    _, answer = server.complete(prompt="abc", max_tokens=5, n=2)
    assert (counted() - before).tolist() == [3, 1, 3, answer["usage"]["completion_tokens"], 1, 1]
    assert server.request("GET", "/metrics")[1]["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_the_key(made):
    wrong = (
        b"secret",
        b"Basic secret",
        *(b"Bearer " + key for key in (b"", b"secre", b"secrets", b"\xff\xfe", b"Secret")),
    )
    with serving(made, sizes=(1,), api_key=b"secret") as server:
        for given in ({}, *({"Authorization": each} for each in wrong)):
            for path in ("/v1/models", "/metrics", "/nothing"):
                status, headers, body = server.request("GET", path, headers=given)
                assert (status, headers["www-authenticate"]) == (401, "Bearer")
                assert json.loads(body)["error"]["code"] == "invalid_api_key"
        assert server.request("POST", "/v1/completions", b"x" * 10_000)[0] == 401  # whatever the body is
        for scheme in ("Bearer", "bearer"):
            assert server.request("GET", "/v1/models", headers={"Authorization": f"{scheme} secret"})[0] == 200
        assert server.request("GET", "/healthz")[0] == server.request("GET", "/")[0] == 200


def test_a_method_and_a_path_that_are_no_http(server):
    for sent in (
        b"\x16\x03\x01\x02\x00\x01\x00 tls hello\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000,
    ):
        with server.connect() as connection:
            connection.sendall(sent)
            assert connection.recv(1000).startswith(b"HTTP/1.1 400")
    wait_until(lambda: not server.server.server_state.tasks)
    assert server.request("GET", "/healthz")[::2] == (200, b"ok\n")
