"""Configuration: validation, its messages, and the command line."""

import dataclasses
import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from moe_jax.cli import load_recipe
from moe_jax.commands.sample import parse_sample
from moe_jax.commands.train import parse_train
from moe_jax.config import Config, ModelConfig, MoEConfig, SampleConfig
from moe_jax.config.fields import settings
from moe_jax.config.rules import RANGES, check, profile_steps
from moe_jax.errors import UserError

REPOSITORY = Path(__file__).parents[1]


def changed(name, value, config=None):
    config = config or Config()
    head, _, rest = name.partition(".")
    return dataclasses.replace(config, **{head: changed(rest, value, getattr(config, head)) if rest else value})


def test_the_defaults_and_every_recipe_are_valid():
    check(Config())
    recipes = sorted((REPOSITORY / "configs").glob("*.py"))
    assert {"moe.py", "dense.py"} <= {recipe.name for recipe in recipes}
    for recipe in recipes:
        check(load_recipe(recipe))


def test_every_number_has_its_range():
    numbers = {name for name, kind, _ in settings(Config()) if {int, float} & {kind, *typing.get_args(kind)}}
    unchecked_here = {"model.moe.top_k", "mesh.data"}  # by rules of their own
    assert numbers - unchecked_here == set(RANGES)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.moe.top_k", 99, "model.moe.top_k must be in [1, num_experts=8], got 99; lower top_k or raise"),
        ("model.moe.top_k", 0, "model.moe.top_k must be in [1, num_experts=8], got 0"),
        ("model.num_heads", 3, "model.num_heads must divide model.embed_dim=128, got 3"),
        ("model.num_kv_heads", 3, "model.num_kv_heads must divide model.num_heads=4, got 3"),
        ("model.num_heads", 128, "needs an even head width"),
        ("sample.stop_tokens", (3, -1), "sample.stop_tokens must be at least 0, got -1"),
        ("model.moe.every", 3, "model.moe.every must divide num_layers - first_dense = 4, got 3"),
        ("model.moe.first_dense", 4, "model.moe.first_dense must be below model.num_layers=4, got 4"),
        ("model.moe.capacity_factor", 0.0, "model.moe.capacity_factor must be at least"),
        ("model.moe.router", "topk", "model.moe.router must be one of top_k, noisy_top_k, switch, expert_choice"),
        ("model.moe.router", "switch", "router=switch sends a token to one expert, but model.moe.top_k is 2; set it"),
        ("model.moe.router", "expert_choice", "needs a model.moe.capacity_factor, which sets how many tokens"),
        ("model.moe.num_expert_groups", 2, "are for model.moe.router=sigmoid_bias, got 2 and 1 with top_k; leave"),
        ("model.moe.bias_update_rate", -0.1, "model.moe.bias_update_rate must be in [0.0, 1.0], got -0.1"),
        ("model.embed_dim", 128.0, "model.embed_dim must be of type int, got 128.0 of type float"),
        ("model.qk_norm", 1, "model.qk_norm must be of type bool"),
        ("model.num_layers", True, "model.num_layers must be of type int, got True of type bool"),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate must be a finite number"),
        ("optimizer.learning_rate", "fast", "optimizer.learning_rate must be of type float"),
        ("optimizer.warmup_steps", 1000, "optimizer.warmup_steps must be below the 1000 steps"),
        ("optimizer.accumulation_steps", 5, "optimizer.accumulation_steps must divide data.batch_size=32, got 5"),
        ("model.dropout_rate", 1.0, "model.dropout_rate must be in [0.0, 0.99], got 1.0"),
        ("data.tokenizer", "bpe", "data.tokenizer must be char, byte, bpe:VOCAB"),
        ("data.tokenizer", "bpe:100", "needs VOCAB in [300, 262144], got 100"),
        ("data.batch_size", 0, "data.batch_size must be at least 1, got 0"),
        ("mesh.data", 0, "mesh.data must be -1 (all devices) or at least 1, got 0"),
        ("train.profile", "9:3", "train.profile must be START:STOP with START < STOP"),
        ("sample.top_p", 0.0, "sample.top_p must be in"),
    ],
)
def test_what_is_impossible_is_refused_with_rule_value_and_remedy(name, value, words):
    with pytest.raises(UserError) as caught:
        check(changed(name, value))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("moe", "words"),
    [
        ({"num_expert_groups": 3}, "num_expert_groups must divide num_experts=8, got 3"),
        ({"num_expert_groups": 4, "top_k_groups": 5}, "top_k_groups must be in [1, num_expert_groups=4], got 5"),
        ({"num_expert_groups": 4, "top_k": 3}, "at most the 2 experts of 1 of 4 groups, got 3; lower it, or raise"),
    ],
)
def test_impossible_groups_of_experts_are_refused(moe, words):
    with pytest.raises(UserError) as caught:
        check(Config(model=ModelConfig(moe=MoEConfig(router="sigmoid_bias", **moe))))
    assert words in str(caught.value)


def test_every_router_goes_with_every_dispatcher_or_is_refused_with_the_reason():
    hints = typing.get_type_hints(MoEConfig)
    refused = set()
    for router in typing.get_args(hints["router"]):
        for dispatch in typing.get_args(hints["dispatch"]):
            for factor in (None, 1.0):
                moe = MoEConfig(
                    router=router, dispatch=dispatch, capacity_factor=factor, top_k=1 if router == "switch" else 2
                )
                try:
                    check(Config(model=ModelConfig(moe=moe)))
                except UserError:
                    refused.add((router, dispatch, factor))
    no_capacity = {("expert_choice", dispatch, None) for dispatch in typing.get_args(hints["dispatch"])}
    no_drops = {
        (router, dispatch, 1.0)
        for router in ("top_k", "noisy_top_k", "switch", "sigmoid_bias")
        for dispatch in ("blocked", "ragged", "tokamax", "by_row")
    }
    assert refused == no_capacity | no_drops


@pytest.mark.parametrize(
    ("dispatch", "grouped_matmul", "today"),
    [
        *(("sorted", name, name) for name in ("auto", "blocked", "ragged", "tokamax", "by_row")),
        *((name, "auto", name) for name in ("auto", "einsum", "gather")),
        ("auto", "blocked", "blocked"),
    ],
)
def test_an_older_runs_settings_are_read_under_their_names_of_today(dispatch, grouped_matmul, today):
    values = Config().to_dict()
    values["model"]["moe"] |= {"dispatch": dispatch, "grouped_matmul": grouped_matmul}
    assert Config.from_dict(values, "here") == changed("model.moe.dispatch", today)
    assert values["model"]["moe"]["dispatch"] == dispatch, "what was read stays as it was"


def test_a_dense_model_needs_no_possible_moe_settings():
    dense = Config(model=ModelConfig(moe=MoEConfig(num_experts=0, top_k=2, every=7)))
    assert check(dense) == dense
    with pytest.raises(UserError, match=r"model\.moe\.every must divide"):
        check(changed("model.moe.num_experts", 8, dense))


def test_settings_survive_json():
    config = changed("model.moe.capacity_factor", None, changed("data.path", "x.txt"))
    assert Config.from_dict(json.loads(json.dumps(config.to_dict())), "here") == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": {"embd_dim": 3}}, "here: there is no setting model.embd_dim; did you mean model.embed_dim?"),
        ({"modle": {}}, "here: there is no setting modle; did you mean model?"),
        ({"data": 3}, "here: data must be an object of settings, got 3"),
        ([], "here: the file must be an object of settings"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(values, words):
    with pytest.raises(UserError) as caught:
        Config.from_dict(values, "here")
    assert words in str(caught.value)


def test_profile_steps():
    assert profile_steps("10:15") == (10, 15)
    for wrong in ("10", "a:b", "5:5", "-1:3"):
        with pytest.raises(UserError, match="START:STOP"):
            profile_steps(wrong)


def test_the_command_line_changes_the_recipe():
    config, workdir = parse_train(
        ["--config", str(REPOSITORY / "configs/moe.py"), "--model.moe.num-experts", "16", "--data.batch_size=6"]
    )
    assert (config.model.moe.num_experts, config.data.batch_size) == (16, 6)
    assert workdir == Path("runs/moe")
    _, named = parse_train([f"--config={REPOSITORY / 'configs/moe.py'}", "--workdir", "elsewhere"])
    assert named == Path("elsewhere")


def test_sampling_flags_default_to_the_runs_own():
    defaults = SampleConfig(temperature=0.3, max_new_tokens=7)
    command = parse_sample(["--prompt", "x", "--top-k", "5"], defaults)
    assert command.sample == dataclasses.replace(defaults, top_k=5)
    with pytest.raises(UserError, match=r"--temperature must be at least 0, got -1"):
        parse_sample(["--temperature", "-1"], defaults)


def test_help_explains_every_setting():
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0
    for name, _, _ in settings(Config()):
        assert f"--{name.replace('_', '-')}" in done.stdout, name
    source = (REPOSITORY / "moe_jax/config/__init__.py").read_text()
    assert source.count('    """') >= len(list(settings(Config()))), "each setting has its line of explanation"
