"""OpenAI's own client, as programs use it."""

import openai
import pytest

from tests.server.harness import read, wait_until


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "moe_jax"
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("other")
    assert raised.value.code == "model_not_found"


def test_a_completion_whole_and_in_a_stream(client):
    fields = {"model": "tiny", "prompt": "ab", "max_tokens": 40, "seed": 3, "logprobs": 2, "user": "me"}
    whole = client.completions.create(**fields, n=2)
    assert (whole.object, whole.model, len(whole.choices)) == ("text_completion", "tiny", 2)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    for choice in whole.choices:
        assert choice.finish_reason in ("stop", "length")
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == len(choice.logprobs.text_offset)
        assert all(len(top) + ("\ufffd" in top) >= 2 for top in choice.logprobs.top_logprobs)
    *chunks, last = client.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage.completion_tokens == len(whole.choices[0].logprobs.tokens)


def test_what_other_open_servers_take(client):
    extra = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [0]}
    first, second = (
        client.completions.create(model="tiny", prompt="ab", seed=seed, extra_body=extra).choices[0].text
        for seed in (1, 2)
    )
    assert first == second  # of one token there is no choice


def test_mistakes(client):
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="tiny", prompt="ab", temperature=3)
    assert raised.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="there is no field guided_json"):
        client.completions.create(model="tiny", prompt="ab", extra_body={"guided_json": {}})
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "ab"}])


def test_a_full_queue_is_tried_again(client, server, pace):
    """By the client's own patience: it reads Retry-After."""
    pace.gate.clear()
    streams = [server.open({"n": 4, "max_tokens": 20, "stream": True})]
    wait_until(lambda: server.num_texts == (4, 0))
    streams.append(server.open({"n": 32, "max_tokens": 20, "stream": True}))
    wait_until(lambda: server.num_texts == (4, 32))
    assert server.metric("moe_jax_queue_length") == 32
    fields = {"model": "tiny", "prompt": "ab", "max_tokens": 5}
    with pytest.raises(openai.RateLimitError) as raised:
        client.completions.create(**fields)
    assert (raised.value.type, raised.value.code) == ("rate_limit_error", "rate_limit_exceeded")
    assert raised.value.response.headers["retry-after"] == "1"
    pace.gate.set()
    assert client.with_options(max_retries=5).completions.create(**fields).choices
    for connection in streams:
        read(connection, b"[DONE]")
        connection.close()
    wait_until(lambda: server.is_idle)
