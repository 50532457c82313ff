"""What Python code gets from ``moe_jax.load``; tests/end_to_end/test_commands.py loads a run as the README does."""

import dataclasses

import numpy as np
import pytest

import moe_jax
from moe_jax.config import SampleConfig
from moe_jax.errors import UserError
from moe_jax.sampling.api import Model, Settings

DEFAULTS = SampleConfig(max_new_tokens=5, temperature=1.0, top_k=3, seed=7)


@pytest.fixture(scope="module")
def model(rotary):
    engine, variables, _ = rotary
    return Model(engine, variables, DEFAULTS)


def test_each_prompts_samples_come_in_order_and_as_if_it_were_alone(model, rotary):
    settings = dataclasses.replace(DEFAULTS, num_samples=2)
    samples = model.generate(["ab", "", "hgf"], num_samples=2)
    assert [sample.prompt for sample in samples] == ["ab", "ab", "", "", "hgf", "hgf"]
    engine, variables, _ = rotary
    for index, prompt in enumerate(["ab", "", "hgf"]):
        alone = engine.finish(variables, [engine.begin(prompt, settings, number, index) for number in range(2)])
        assert [(each.text, each.finish_reason) for each in samples[2 * index : 2 * index + 2]] == [
            (each.text, each.finish_reason) for each in alone
        ]
    assert [each.text for each in samples[:2]] == [each.text for each in rotary.generate("ab", settings)]
    assert model.generate([]) == []


def test_equal_prompts_are_drawn_for_apart(model):
    """And different ones: their draws share no random numbers."""
    texts = [sample.text for sample in model.generate(["ab"] * 8, max_new_tokens=12, top_k=8)]
    assert len(set(texts)) > 4
    greedy = model.generate(["ab"] * 3, temperature=0.0)
    assert greedy == greedy[:1] * 3


def test_what_is_left_out_is_as_the_run_samples(model, rotary):
    assert model.generate(["ab"]) == rotary.generate("ab", DEFAULTS)
    every = {"num_samples": 2, "max_new_tokens": 12, "temperature": 0.5, "top_k": 2, "top_p": 0.5, "seed": 0}
    every |= {"min_p": 0.3, "repetition_penalty": 1.5, "stop": ("b",), "stop_tokens": (2,)}
    assert set(every) == set(Settings.__annotations__) == {each.name for each in dataclasses.fields(SampleConfig)}
    for name, value in every.items():
        changed = dataclasses.replace(DEFAULTS, **{name: value})
        assert model.generate(["ab"], **{name: value}) == rotary.generate("ab", changed), name


def test_numbers_of_numpy_are_numbers(model):
    plain = {"num_samples": 2, "max_new_tokens": 6, "temperature": 0.5, "top_k": 2, "seed": 3, "stop_tokens": [2, 4]}
    kinds = {"temperature": np.float32, "seed": np.uint32, "stop_tokens": np.array}
    theirs = {name: kinds.get(name, np.int64)(value) for name, value in plain.items()}
    expected = model.generate(["ab"], **plain)
    assert model.generate(np.array(["ab"]), **theirs) == expected
    assert model.generate([np.str_("ab")], **theirs | {"stop_tokens": [np.int32(2), np.int64(4)]}) == expected
    with pytest.raises(UserError, match=r"^seed must be of type int, got True"):
        model.generate(["ab"], seed=np.bool_(True))


def test_unknown_characters_of_a_prompt_are_told_once(model):
    with pytest.warns(UserWarning, match=r"tokenizer does not know '\\n', 'é', '☃' of the prompt") as told:
        model.generate(["abc", "a☃\n", "☃é"], num_samples=2, max_new_tokens=1)
    assert len(told) == 1


def test_many_samples_that_only_the_run_asks_for_are_told(model, monkeypatch):
    monkeypatch.setattr(model, "_defaults", dataclasses.replace(DEFAULTS, num_samples=17, max_new_tokens=1))
    with pytest.warns(UserWarning, match="17 samples of a prompt, as the run's settings say; num_samples=1 makes one"):
        assert len(model.generate(["ab"])) == 17
    assert len(model.generate(["ab"], num_samples=17)) == 17  # a warning would be an error


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        ("ROMEO:", {}, r"prompts must be a list of texts, got 'ROMEO:'; write generate\(\[text\]\)"),
        (["a", None], {}, r"prompts\[1\] must be of type str, got None"),
        (["a"], {"temprature": 1.0}, r"^there is no setting temprature; did you mean temperature\?"),
        (["a", "\udcff"], {}, r"prompts\[1\] must be UTF-8 text"),
        (["a" * 17], {}, "the prompt must fit the context of 16 tokens, got 17"),
        (["a"], {"top_p": 1.5}, r"^top_p must be in \[0.0, 1.0\], got 1.5"),
        (["a"], {"temperature": -0.1}, r"^temperature must be at least 0, got -0.1"),
        (["a"], {"stop": "cd"}, r"^stop must be a list of texts, got 'cd'; write stop=\[...\]"),
        (["a"], {"stop_tokens": 5}, r"^stop_tokens must be a list of token ids, got 5; write stop_tokens=\[...\]"),
        (["a"], {"stop_tokens": [13]}, r"^each of stop_tokens must be in \[0, 12\], got 13; take those of this"),
        (["a"], {"seed": "0"}, "^seed must be of type int, got '0' of type str"),
    ],
)
def test_mistakes_are_reported(model, prompts, settings, words):
    with pytest.raises(UserError, match=words):
        model.generate(prompts, **settings)


def test_loading_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        moe_jax.load(tmp_path)
    with pytest.raises(UserError, match=r"^dtype must be one of float32, bfloat16; got 'float16'"):
        moe_jax.load(tmp_path, dtype="float16")
    with pytest.raises(UserError, match="checkpoint must be one of best, newest; got 'last'"):
        moe_jax.load(str(tmp_path), "last")
