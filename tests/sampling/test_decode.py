"""Texts through the cache, past the context too, against the training decoder: logits at every position."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Config, DataConfig, MoEConfig, SampleConfig
from moe_jax.model import decoder as decoder_module
from moe_jax.model.decoder import Tokens
from moe_jax.model.machine import Machine
from moe_jax.sampling import batch as batch_module
from moe_jax.sampling import score
from moe_jax.sampling.batch import Batch, _rows
from moe_jax.sampling.decode import _LOOP_AS_GRAPH
from moe_jax.sampling.engine import Engine
from tests.sampling.tiny import CONFIG, TOKENIZER, make, make_trained, run_of

M = 8
PROMPTS = ([3], [5, 1, 4, 2, 6], [7, 7, 2, 1, 3, 4, 6, 5])
END = 3 * M + len(PROMPTS[-1])
"""Three windows after the longest prompt."""

GQA = {"num_heads": 4, "num_kv_heads": 2}
MQA = {"num_heads": 4, "num_kv_heads": 1, "embed_dim": 32}
GPT = {"use_bias": True, "norm": "layernorm", "activation": "gelu", "tie_embeddings": True}
EVERY_SECOND = {"moe": MoEConfig(4, 2, 8, every=2)}
BIASED = {"moe": MoEConfig(4, 2, 8, router="sigmoid_bias", num_shared_experts=1, first_dense=1)}


def texts_and_logits(engine, variables):
    """The texts of PROMPTS up to END tokens, drawn token by token in one ragged batch, and the logits before each."""
    batch = Batch(engine.programs, variables, [4])
    texts = [
        engine.begin(ids, SampleConfig(max_new_tokens=END - len(ids), temperature=1.0, top_p=1.0, seed=index))
        for index, ids in enumerate(PROMPTS)
    ]
    # The last joins when the others are under way.
    batch.admit(texts[:2])
    found = [[], [], []]
    for turn in range(END):
        if turn == 3:
            batch.admit(texts[2:])
        for text, rows in zip(texts, found, strict=True):
            if text in batch.texts:
                rows.append(np.asarray(batch.state.logits_BV[batch._texts.index(text)]))
        batch.advance(1)
    assert all(text.finish_reason == "length" for text in texts)
    return [text.prompt_ids + text.tokens for text in texts], found


def reference_rotary(decoder, variables, texts, monkeypatch):
    """One forward of each whole text, in which a query sees itself and the M - 1 positions before it."""

    def banded(position_BL, segment_BL=None):
        distance_BLL = position_BL[:, :, None] - position_BL[:, None, :]
        return (distance_BLL >= 0) & (distance_BLL < M)

    monkeypatch.setattr(decoder_module, "causal_mask", banded)
    banded_run = jax.jit(lambda tokens_BL: decoder_module.forward(decoder, variables, Tokens(tokens_BL)).logits_BLV)
    logits_BLV = banded_run(np.array(texts))
    return [np.asarray(rows[len(ids) - 1 : -1]) for rows, ids in zip(logits_BLV, PROMPTS, strict=True)]


def reference_learned(decoder, variables, texts, monkeypatch):
    """A forward of the window of each place: the whole text, until it is cut to half a window, and so on."""
    windows, sizes = [], []
    for text, ids in zip(texts, PROMPTS, strict=True):
        start = 0
        for size in range(len(ids), END):
            if size - start > M:
                start = size - M // 2
            windows.append(text[start:size] + [0] * (M - size + start))
            sizes.append(size - start)
    logits_BLV = run_of(decoder, variables)(np.array(windows))
    rows = np.asarray(logits_BLV)[np.arange(len(sizes)), np.array(sizes) - 1]
    return np.split(rows, np.cumsum([END - len(ids) for ids in PROMPTS])[:-1])


REFERENCES = {"rotary": reference_rotary, "learned": reference_learned}
CASES = [
    ("rotary", GQA | BIASED | {"qk_norm": True}),
    pytest.param("rotary", MQA | GPT | EVERY_SECOND, marks=pytest.mark.slow),
    ("learned", GQA | GPT | {"qk_norm": True}),
]
EVERY = [
    pytest.param(positions, heads | extra | {"qk_norm": extra != GPT | EVERY_SECOND}, marks=pytest.mark.slow)
    for positions in REFERENCES
    for heads in ({}, GQA, MQA)
    for extra in ({}, GPT | EVERY_SECOND, BIASED)
]


@pytest.mark.parametrize(("positions", "changes"), [*CASES, *EVERY])
def test_cached_logits_are_those_of_a_forward_three_windows_long(positions, changes, monkeypatch):
    config = dataclasses.replace(CONFIG, context_length=M, positions=positions, **changes)
    engine, variables, _ = make(config, end_token=-1)  # so that all texts get there
    texts, found = texts_and_logits(engine, variables)
    expected = REFERENCES[positions](*make_trained(config), texts, monkeypatch)
    for rows, wanted in zip(found, expected, strict=True):
        assert len(rows) == len(wanted) >= 3 * M
        np.testing.assert_allclose(rows, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", [pytest.param("rotary", marks=pytest.mark.slow), "learned"])
def test_a_batch_grows_and_shrinks_and_texts_keep_their_rows(rotary, positions):
    """Texts of up to three windows come and go at random; each is what it is alone."""
    changed = dataclasses.replace(CONFIG, positions="learned")
    engine, variables, _ = rotary if positions == "rotary" else make(changed, end_token=-1)
    random = np.random.default_rng(0)
    batch, waiting, removed = Batch(engine.programs, variables, [1, 16]), [], []
    for index in range(24):
        sample = SampleConfig(
            max_new_tokens=int(random.integers(1, 49)),
            temperature=float(random.choice([0.0, 0.7, 1.0])),
            top_k=[None, 3][index % 2],
            repetition_penalty=[1.0, 1.5][index % 2],
            seed=index,
        )
        waiting.append(engine.begin(random.integers(1, 9, random.integers(1, 17)).tolist(), sample, index % 5))
    every, sizes = list(waiting), set()
    while waiting or batch.texts:
        count = min(batch.num_free, len(waiting), int(random.integers(0, 3)))
        batch.admit([waiting.pop() for _ in range(count)])
        batch.advance(int(random.integers(1, 6)))
        sizes.add(len(batch._texts))
        if batch.texts and random.random() < 0.1:
            removed.append(batch.texts[-1])
            batch.remove(removed[-1])
    assert sizes == {1, 16}  # so that there are rows enough for another backend than alone
    assert removed
    assert all(text.finish_reason is None for text in removed)
    single = Batch(engine.programs, variables, [1])
    for text in every:
        if text in removed:
            continue
        again = engine.begin(text.prompt_ids, text.sample, text.number)
        single.admit([again])
        while single.texts:
            single.advance()
        assert (again.tokens, again.finish_reason) == (text.tokens, text.finish_reason)
        np.testing.assert_allclose(again.logprobs, text.logprobs, atol=1e-4)


def test_a_penalty_knows_what_the_window_has_left():
    config = dataclasses.replace(CONFIG, positions="learned", context_length=M)
    made = make(config, end_token=-1)
    (sample,) = made.generate(PROMPTS[1], SampleConfig(max_new_tokens=30, temperature=0.0, repetition_penalty=1.6))
    assert sample.tokens == made.greedy_loop(PROMPTS[1], 30, penalty=1.6, end=-1)


def test_a_prompt_is_scored_in_parts(monkeypatch):
    for module in (score, batch_module):
        monkeypatch.setattr(module, "SCORED", 5)
    made = make(CONFIG)
    packed = Engine(Config(model=CONFIG, data=DataConfig(mode="packed")), TOKENIZER, Machine("cpu"))
    for engine in (made.engine, packed):
        for size in (1, 2, 6, 7, 15):
            text = engine.begin(np.random.default_rng(size).integers(0, 8, size).tolist(), SampleConfig())
            text.scores_prompt = True
            Batch(made.engine.programs, made.variables, [1], num_top=2).admit([text])
            padded = text.prompt_ids + [0] * (16 - len(text.prompt_ids))
            logprobs_LV = jax.nn.log_softmax(run_of(made.decoder, made.variables)([padded])[0])
            expected = np.asarray(logprobs_LV)[text.num_prefix : len(text.prompt_ids) - 1]
            assert len(text.prompt_logprobs) == len(text.prompt_top_logprobs) == len(expected) == size - 1
            for row, token, found, top in zip(
                expected, text.own_prompt_ids[1:], text.prompt_logprobs, text.prompt_top_logprobs, strict=True
            ):
                np.testing.assert_allclose(found, row[token], atol=1e-5)
                assert [index for index, _ in top] == np.argsort(-row)[:2].tolist()


def test_what_is_warmed_up_is_not_compiled_again():
    engine = make(CONFIG)[0]
    # Where a checkpoint puts them.
    variables = jax.device_put(engine.prepare(make_trained(CONFIG)[1]), jax.devices()[0])
    batch = Batch(engine.programs, variables, [1, 2])
    programs = engine.programs
    functions = (
        *(programs.prefill, programs.decode, programs.take_rows, programs.empty_state),
        *(programs.score, programs.empty_caches),
    )
    batch.warm_up()
    before = [function._cache_size() for function in functions]
    waiting = [engine.begin([1] * length, SampleConfig(max_new_tokens=20)) for length in (1, 16, 5)]
    waiting[1].scores_prompt = True
    while waiting or batch.texts:
        if waiting and batch.num_free:
            batch.admit([waiting.pop()])
        batch.advance(3)
    assert [function._cache_size() for function in functions] == before


@pytest.mark.parametrize(("platform", "lowered_for"), [("gpu", "cuda"), ("tpu", "tpu")])
def test_an_accelerator_draws_a_token_without_a_branch_or_a_loop(platform, lowered_for):
    """Each is launches of its own, and may wait for the host; the loop over tokens alone is left."""
    engine = Engine(Config(model=CONFIG), TOKENIZER, Machine(platform))
    variables = engine.prepare(make_trained(CONFIG)[1])
    for B in (1, 4):
        state, number_B = engine.programs.empty_state(B, variables), np.ones(B, np.int32)
        rows = _rows([None] * B, TOKENIZER.vocab_size)
        traced = engine.programs.decode.trace(variables, state, rows, number_B, number_B, np.int32(1))
        text = traced.lower(lowering_platforms=(lowered_for,)).as_text()
        assert re.findall(r"stablehlo\.(while|case|if)\b", text) == ["while"]


def test_bfloat16_holds_matrices_in_two_bytes_and_all_else_in_four(rotary):
    _, variables, _ = rotary
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    engine, small, _ = make(config)
    kinds = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in jax.tree.leaves_with_path(small.params)}
    assert {kinds[name] for name in kinds if "attention'" in name or "w_up" in name} == {jnp.dtype("bfloat16")}
    others = [name for name in kinds if "router" in name or "norm" in name or "embedding" in name]
    assert {kinds[name] for name in others} == {jnp.dtype("float32")}
    greedy = SampleConfig(max_new_tokens=12, temperature=0.0)
    (sample,) = engine.generate(small, "bad", greedy)
    # Rounding once at the start is what rounding at each use would give.
    rounded = jax.tree.map(lambda wide, narrow: wide.astype(narrow.dtype).astype(jnp.float32), variables, small)
    (wide,) = engine.generate(rounded, "bad", greedy)
    assert wide.tokens == sample.tokens
    np.testing.assert_array_equal(wide.logprobs, sample.logprobs)


def test_xla_still_knows_what_a_gpus_loop_is_compiled_with():
    assert jax.jit(lambda x: x + 1, compiler_options=_LOOP_AS_GRAPH)(1) == 2
