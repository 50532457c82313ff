"""What Python code gets from ``moe_jax.load``; tests/end_to_end/test_commands.py loads a run as the README does."""

import dataclasses

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
    for together, alone in (
        (samples[2:4], rotary.generate("", settings)),
        (samples[4:], rotary.generate("hgf", settings)),
    ):
        assert [(each.text, each.finish_reason) for each in together] == [
            (each.text, each.finish_reason) for each in alone
        ]
    assert model.generate([]) == []


def test_what_is_left_out_is_as_the_run_samples(model, rotary):
    assert model.generate(["ab"]) == rotary.generate("ab", DEFAULTS)
    every = {"num_samples": 2, "max_new_tokens": 12, "temperature": 0.5, "top_k": 2, "top_p": 0.5, "seed": 0}
    every |= {"min_p": 0.3, "repetition_penalty": 1.5, "stop": ("b",), "stop_tokens": (2,)}
    assert set(every) == set(Settings.__annotations__) == {each.name for each in dataclasses.fields(SampleConfig)}
    for name, value in every.items():
        changed = dataclasses.replace(DEFAULTS, **{name: value})
        assert model.generate(["ab"], **{name: value}) == rotary.generate("ab", changed), name


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        ("ROMEO:", {}, r"prompts must be a list of texts, got 'ROMEO:'; write generate\(\[text\]\)"),
        (["a", None], {}, r"prompts\[1\] must be of type str, got None"),
        (["a"], {"temprature": 1.0}, r"^there is no setting temprature; did you mean temperature\?"),
        (["a", "\udcff"], {}, r"prompts\[1\] must be UTF-8 text"),
        (["a" * 17], {}, "the prompt must fit the context of 16 tokens, got 17"),
        (["a"], {"top_p": 1.5}, r"^top_p must be in \[1e-06, 1.0\], got 1.5"),
        (["a"], {"temperature": 0.0001}, r"^temperature must be 0 \(the most likely token\) or at least 0.001"),
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
