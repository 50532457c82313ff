"""Log-probabilities of an echoed prompt, asked for as lm-evaluation-harness's local-completions asks for them."""

import jax
import numpy as np
import pytest

from tests.sampling.tiny import run_of
from tests.server.harness import BYTES
from tests.server.test_app import stream


@pytest.fixture(scope="module")
def expected(made):
    """A function: token ids to the log-probabilities [L, V] of the token after each, by a forward pass of them all."""
    engine, variables = made
    run = run_of(engine.programs.decoder_for(64), variables)

    def logprobs_of(ids):
        padded_BL = np.array([[*ids, *[0] * (64 - len(ids))]])
        return np.asarray(jax.nn.log_softmax(run(padded_BL)[0, : len(ids)]))

    return logprobs_of


def scored(answer, contexts):
    """(log-likelihood, whether each token was the likeliest) of each continuation, as the harness reads an answer.

    The tokens of the context are left out, and the last one, for which it had to ask and which was drawn.
    """
    found = []
    for choice, size in zip(sorted(answer["choices"], key=lambda each: each["index"]), contexts, strict=True):
        logprobs = choice["logprobs"]["token_logprobs"][size:-1]
        best = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][size:-1]]
        found.append((sum(logprobs), logprobs == best))
    return found


def test_log_likelihoods_of_continuations(server, expected):
    likely = np.argmax(expected(BYTES.encode("ab"))[-1])
    pairs = [("to be", " or not"), ("é", "é" * 20), ("a" * 30, "b" * 33)]
    pairs = [tuple(BYTES.encode(part).tolist() for part in pair) for pair in pairs]
    pairs.append((BYTES.encode("ab").tolist(), [int(likely)]))
    asked = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    prompts = [context + continuation for context, continuation in pairs]
    status, answer = server.complete(prompt=prompts, **asked)
    assert status == 200
    found = scored(answer, [len(context) for context, _ in pairs])
    for (context, continuation), (total, is_greedy) in zip(pairs, found, strict=True):
        logprobs_LV = expected(context + continuation)[len(context) - 1 : -1]
        np.testing.assert_allclose(total, logprobs_LV[np.arange(len(continuation)), continuation].sum(), rtol=1e-4)
        assert is_greedy == (np.argmax(logprobs_LV, axis=1).tolist() == continuation)
    assert found[-1][1]
    # The text alone, where its tokens are not sent; and one that ends at once still has the token that ended it.
    _, text = server.complete(prompt="to be or not", **asked)
    np.testing.assert_allclose(scored(text, [5]), found[:1], rtol=1e-5)
    drawn = BYTES.specials["<|pad|>"]
    ends = list(range(drawn + 1))
    _, ended = server.complete(prompt=prompts, stop_token_ids=ends, **asked)
    assert [choice["finish_reason"] for choice in ended["choices"]] == ["stop"] * 4
    np.testing.assert_allclose(scored(ended, [len(context) for context, _ in pairs]), found, rtol=1e-5)
    assert ended["usage"]["completion_tokens"] == 0


def test_a_prompt_is_scored_without_a_token_after_it(server, expected):
    fields = {"prompt": "aé!", "max_tokens": 0, "logprobs": 5, "echo": True}
    _, answer = server.complete(**fields)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("aé!", "length", 0)
    found, ids = choice["logprobs"], BYTES.encode("aé!").tolist()
    assert found["tokens"] == ["a", "\\xc3", "\\xa9", "!"]
    assert found["text_offset"] == [0, 1, 1, 2]
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    logprobs_LV = expected(ids)[:-1]
    np.testing.assert_allclose(found["token_logprobs"][1:], logprobs_LV[np.arange(3), ids[1:]], atol=1e-5)
    for top, logprobs_V in zip(found["top_logprobs"][1:], logprobs_LV, strict=True):
        np.testing.assert_allclose(list(top.values())[:5], np.sort(logprobs_V)[:-6:-1], atol=1e-5)
    (chunk,) = stream(server, **fields)
    assert chunk["choices"] == answer["choices"]
    # From nothing there is nothing to score, and without an echo nothing to show.
    for prompt, echo in (("", True), ("ab", False)):
        (choice,) = server.complete(prompt=prompt, max_tokens=0, logprobs=0, echo=echo)[1]["choices"]
        assert (choice["text"], choice["logprobs"]["tokens"], choice["finish_reason"]) == ("", [], "length")


def test_what_follows_an_echo_is_drawn_as_without_one(server):
    fields = {"prompt": "ab", "max_tokens": 12, "seed": 3, "logprobs": 2}
    plain, echoed = (server.complete(**fields, echo=echo)[1]["choices"][0] for echo in (False, True))
    assert echoed["text"] == "ab" + plain["text"]
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        assert echoed["logprobs"][name][2:] == plain["logprobs"][name]
    assert echoed["logprobs"]["text_offset"][2:] == [2 + each for each in plain["logprobs"]["text_offset"]]


def test_a_generation_as_the_harness_asks_for_it(server):
    stops = ["\n\n", "Question:", "Q:", "</s>", "<|im_end|>", "<|endoftext|>"]
    fields = {"prompt": [[97, 98]], "max_tokens": 8, "temperature": 0, "stop": stops, "seed": 1234}
    status, answer = server.complete(**fields)
    assert status == 200
    # What leaves one token is greedy under other names too.
    for settings in ({"temperature": 1e-4}, {"temperature": 1, "top_p": 0}):
        assert server.complete(**fields | settings)[1]["choices"] == answer["choices"]
