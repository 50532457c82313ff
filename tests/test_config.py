"""Configuration: bounds, rules and their messages, and what is read from disk."""

import dataclasses
import json
import math
import re
import typing
from pathlib import Path

import pytest

from moe_jax.cli import load_recipe
from moe_jax.config import Config, MeshConfig, ModelConfig, MoEConfig, SampleConfig
from moe_jax.config.bounds import MANY
from moe_jax.config.fields import check_type, settings
from moe_jax.config.rules import ROUTER_RULES, check, check_sample, profile_steps, router_rules
from moe_jax.errors import UserError

REPOSITORY = Path(__file__).parents[1]
CHOICES = {name: typing.get_args(hint) for name, hint in typing.get_type_hints(MoEConfig).items()}


def changed(name, value, config=None):
    config = config or Config()
    head, _, rest = name.partition(".")
    return dataclasses.replace(config, **{head: changed(rest, value, getattr(config, head)) if rest else value})


def error_of(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_defaults_and_every_recipe_are_valid():
    check(Config())
    recipes = sorted((REPOSITORY / "configs").glob("*.py"))
    assert {"moe.py", "dense.py"} <= {recipe.name for recipe in recipes}
    for recipe in recipes:
        check(load_recipe(recipe))


def test_every_number_stands_with_its_range():
    for name, hint, _ in settings(Config()):
        assert "Range(" in str(hint) or not re.search(r"\b(int|float)\b", str(hint)), name


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model.moe.top_k", 99, "model.moe.top_k must be in [1, num_experts=8], got 99; lower top_k or raise"),
        ("model.moe.top_k", 0, "model.moe.top_k must be in [1, num_experts=8], got 0"),
        ("model.num_heads", 3, "model.num_heads must divide model.embed_dim=128, got 3"),
        ("model.num_kv_heads", 3, "model.num_kv_heads must divide model.num_heads=4, got 3"),
        ("model.num_kv_heads", "3", "model.num_kv_heads must be of type int or None, got '3' of type str"),
        ("model.num_heads", 128, "needs an even head width"),
        ("model.moe.every", 3, "model.moe.every must divide num_layers - first_dense=4, got 3"),
        ("model.moe.first_dense", 4, "model.moe.first_dense must be below model.num_layers=4, got 4"),
        ("model.moe.capacity_factor", 0.0, "model.moe.capacity_factor must be at least"),
        ("model.moe.router", "topk", "model.moe.router must be one of top_k, noisy_top_k, switch, expert_choice"),
        ("model.moe.router", "switch", "router=switch sends a token to one expert, but model.moe.top_k is 2; set it"),
        ("model.moe.router", "expert_choice", "needs a model.moe.capacity_factor, which sets how many tokens"),
        ("model.moe.num_expert_groups", 2, "are for model.moe.router=sigmoid_bias, got 2 and 1 with top_k; leave"),
        ("model.moe.bias_update", "quantile", "with one group of experts, got top_k with 1; set it to sign"),
        ("model.moe.bias_update_rate", -0.1, "model.moe.bias_update_rate must be in [0.0, 1.0], got -0.1"),
        ("model.embed_dim", 128.0, "model.embed_dim must be of type int, got 128.0 of type float"),
        ("model.qk_norm", 1, "model.qk_norm must be of type bool"),
        ("model.num_layers", True, "model.num_layers must be of type int, got True of type bool"),
        ("model", 3, "model must be of type ModelConfig, got 3 of type int"),
        ("optimizer.learning_rate", math.nan, "optimizer.learning_rate must be a finite number"),
        ("optimizer.learning_rate", "fast", "optimizer.learning_rate must be of type float"),
        ("optimizer.warmup_steps", 1000, "optimizer.warmup_steps must be below the 1000 steps"),
        ("optimizer.accumulation_steps", 5, "optimizer.accumulation_steps must divide data.batch_size=32, got 5"),
        ("model.dropout_rate", 1.0, "model.dropout_rate must be in [0.0, 0.99], got 1.0"),
        ("data.path", "s3://bucket/x", "data.path must be a file or folder of this machine, got s3://bucket/x;"),
        ("data.tokenizer", "bpe:100", "data.tokenizer bpe:VOCAB needs VOCAB in [300, 262144], got 100; change it"),
        ("data.tokenizer", "bpe:many", "needs VOCAB in [300, 262144], got many"),
        ("data.tokenizer", " ", "data.tokenizer must name a tokenizer, got ' '"),
        ("data.batch_size", 0, "data.batch_size must be at least 1, got 0"),
        ("model.context_length", 10**9, "the tokens of a step, must be at most 2,147,483,647, got 32,000,000,000;"),
        ("data.batch_size", 2**31, f"data.batch_size must be in [1, {MANY}], got 2147483648"),
        ("mesh.data", 0, "mesh.data must be -1 (all devices that are left) or at least 1, got 0"),
        ("mesh.coordinator", "host:1", "go together, but there is no mesh.num_processes and no mesh.process_id; give"),
        ("mesh.heartbeat_seconds", 1.0, "mesh.heartbeat_seconds must be in [5.0, 3600.0], got 1.0"),
        ("train.max_minutes", 0.0, "train.max_minutes must be at least"),
        ("train.profile", "9:3", "train.profile must be START:STOP with START < STOP"),
        ("train.profile", "2000:2001", "train.profile must start before train.num_steps=1000"),
        ("train.trackers", ["mlflow"], "train.trackers must be a tuple"),
        ("train.mlflow_uri", "sqlite:///x", "train.mlflow_uri is for train.trackers mlflow, got sqlite:///x with"),
        ("sample.top_p", -0.1, "sample.top_p must be in"),
        ("sample.temperature", -1e-4, "sample.temperature must be at least 0, got -0.0001"),
        ("sample.stop", ("",), "each of sample.stop must have at least one character, got an empty text; leave"),
        ("sample.stop_tokens", tuple(range(1025)), "sample.stop_tokens must have at most 1,024 values, got 1,025;"),
        ("sample.stop", ("x",) * 10**6, "sample.stop must have at most 1,024 values, got 1,000,000; leave"),
        ("optimizer.weight_decay", 10**400, "optimizer.weight_decay must be a finite number, got 1000"),
        ("sample.stop_tokens", (3, -1), "each of sample.stop_tokens must be at least 0, got -1"),
    ],
)
def test_what_is_impossible_is_refused_with_rule_value_and_remedy(name, value, words):
    assert words in error_of(check, changed(name, value))


@pytest.mark.parametrize(
    ("moe", "words"),
    [
        ({"num_expert_groups": 3}, "num_expert_groups must divide num_experts=8, got 3"),
        ({"num_expert_groups": 4, "top_k_groups": 5}, "top_k_groups must be in [1, num_expert_groups=4], got 5"),
        ({"top_k_groups": 2}, "top_k_groups must be in [1, num_expert_groups=1], got 2"),
        ({"num_expert_groups": 4, "bias_update": "quantile"}, "one group of experts, got sigmoid_bias with 4; set it"),
        ({"num_expert_groups": 4, "top_k": 3}, "at most the 2 experts of 1 of 4 groups, got 3; lower it, or raise"),
    ],
)
def test_impossible_groups_of_experts_are_refused(moe, words):
    assert words in error_of(check, Config(model=ModelConfig(moe=MoEConfig(router="sigmoid_bias", **moe))))


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ({"coordinator": "host"}, "mesh.coordinator must be HOST:PORT, got host; add the port, such as :8476"),
        ({"process_id": 2}, "mesh.process_id must be below mesh.num_processes=2, got 2; ids start at 0"),
    ],
)
def test_impossible_processes_are_refused(mesh, words):
    settings = {"coordinator": "10.0.0.1:8476", "num_processes": 2, "process_id": 0} | mesh
    assert words in error_of(check, Config(mesh=MeshConfig(**settings)))


def test_a_type_of_several_names_the_first_and_takes_the_others():
    hint = int | None | typing.Literal["all"]
    for value in (3, None, "all"):
        check_type("n", hint, value)
    assert error_of(check_type, "n", hint, "x") == "n must be of type int or None, got 'x' of type str"


def test_an_error_names_a_setting_of_sampling_as_it_was_given():
    assert error_of(check_sample, SampleConfig(top_p=7), "/{}".format) == "/top_p must be in [0.0, 1.0], got 7"


def test_every_router_goes_with_every_dispatch_or_is_refused_with_the_reason():
    assert set(ROUTER_RULES) < set(CHOICES["router"])
    refused = set()
    for router in CHOICES["router"]:
        rules = router_rules(MoEConfig(router=router))
        for dispatch in CHOICES["dispatch"]:
            for factor in (None, 1.0):
                moe = MoEConfig(router=router, dispatch=dispatch, capacity_factor=factor, top_k=2 - rules.one_expert)
                try:
                    check(Config(model=ModelConfig(moe=moe)))
                except UserError:
                    refused.add((router, dispatch, factor))
    no_capacity = {("expert_choice", dispatch, None) for dispatch in CHOICES["dispatch"]}
    droppers = ("top_k", "noisy_top_k", "switch", "sigmoid_bias")
    dropless = ("blocked", "ragged", "pallas", "by_row")
    assert refused == no_capacity | {(router, dispatch, 1.0) for router in droppers for dispatch in dropless}


def test_a_dense_model_needs_no_possible_moe_settings():
    dense = Config(model=ModelConfig(moe=MoEConfig(num_experts=0, top_k=2, every=7)))
    assert check(dense) == dense
    assert "model.moe.every must divide" in error_of(check, changed("model.moe.num_experts", 8, dense))
    nothing = changed("model.moe.top_k", 0, dense)  # the width of a dense MLP, where that is not set
    assert "the width of a dense MLP" in error_of(check, nothing)
    assert check(changed("model.mlp_dim", 64, nothing))


def test_settings_survive_json():
    config = changed("train.trackers", ("mlflow",), changed("data.path", "x.txt"))
    assert Config.from_dict(json.loads(json.dumps(config.to_dict())), "here") == config


@pytest.mark.parametrize(
    ("dispatch", "grouped_matmul", "today"),
    [
        *(("sorted", name, name) for name in ("auto", "blocked", "ragged", "by_row")),
        *((name, "auto", name) for name in ("auto", "einsum", "gather")),
        ("auto", "blocked", "blocked"),
        ("sorted", "tokamax", "pallas"),
        ("tokamax", "auto", "pallas"),
    ],
)
def test_an_older_runs_settings_are_read_under_their_names_of_today(dispatch, grouped_matmul, today):
    values = Config().to_dict()
    values["model"]["moe"] |= {"dispatch": dispatch, "grouped_matmul": grouped_matmul}
    before = json.dumps(values)
    assert check(Config.from_dict(values, "here")) == changed("model.moe.dispatch", today)
    assert json.dumps(values) == before, "what was read stays as it was"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": {"embd_dim": 3}}, "here: there is no setting model.embd_dim; did you mean model.embed_dim?"),
        ({"modle": {}}, "here: there is no setting modle; did you mean model?"),
        ({"model": {"moe": {"grouped_matmul": "x"}}}, "here: there is no setting model.moe.grouped_matmul"),
        ({"data": 3}, "here: data must be an object of settings, got 3"),
        ([], "here: the file must be an object of settings"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(values, words):
    assert words in error_of(Config.from_dict, values, "here")


def test_profile_steps():
    assert profile_steps("10:15") == (10, 15)
    for wrong in ("10", "a:b", "5:5", "-1:3"):
        assert "START:STOP" in error_of(profile_steps, wrong)
