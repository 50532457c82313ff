"""The rules that settings must keep with each other. Imports no jax and reads no file."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from moe_jax.config import Config, MeshConfig, ModelConfig, MoEConfig, SampleConfig, TrainConfig
from moe_jax.config.bounds import MANY
from moe_jax.config.fields import check_fields
from moe_jax.errors import UserError


def check(config: Config) -> Config:
    """Returns ``config``, or raises UserError on a wrong type, a value out of bounds or an impossible combination.

    Whether the files that it names exist is checked where they are read.
    """
    check_fields(config)
    _check_model(config.model)
    if config.model.moe.num_experts:
        _check_moe(config.model)
    _check_training(config)
    _check_trackers(config.train)
    return config


def check_sample(sample: SampleConfig, name_of: Callable[[str], str]) -> SampleConfig:
    """Returns ``sample``, or raises UserError; ``name_of`` maps a field's name to what the error calls it."""
    return check_fields(sample, name_of)


@dataclass(frozen=True)
class RouterRules:
    """What a router asks of the other settings."""

    one_expert: bool = False
    """It sends a token to one expert: top_k is 1."""
    needs_capacity: bool = False
    """Its experts choose as many tokens as capacity_factor says, and never drop one."""
    has_groups: bool = False
    """It may keep a token within some groups of experts."""


ROUTER_RULES = {
    "switch": RouterRules(one_expert=True),
    "expert_choice": RouterRules(needs_capacity=True),
    "sigmoid_bias": RouterRules(has_groups=True),
}
"""Of the routers that ask for anything."""


def router_rules(moe: MoEConfig) -> RouterRules:
    return ROUTER_RULES[moe.router] if moe.router in ROUTER_RULES else RouterRules()


def _check_divides(name: str, value: int, of: str, whole: int) -> None:
    if whole % value:
        raise UserError(f"{name} must divide {of}={whole}, got {value}; change one of them")


def _check_model(model: ModelConfig) -> None:
    if not model.moe.num_experts and model.mlp_dim is None and model.moe.top_k < 1:
        raise UserError(
            f"model.moe.top_k must be at least 1, got {model.moe.top_k}: (top_k + num_shared_experts) * expert_dim is "
            "the width of a dense MLP; raise it, or set model.mlp_dim"
        )
    _check_divides("model.num_heads", model.num_heads, "model.embed_dim", model.embed_dim)
    _check_divides("model.num_kv_heads", model.num_kv_heads or 1, "model.num_heads", model.num_heads)
    head_dim = model.embed_dim // model.num_heads
    if model.positions == "rotary" and head_dim % 2:
        raise UserError(
            f"model.positions=rotary needs an even head width embed_dim/num_heads, got {head_dim}; "
            "change model.num_heads or use learned positions"
        )


def _check_moe(model: ModelConfig) -> None:
    moe = model.moe
    if not 1 <= moe.top_k <= moe.num_experts:
        raise UserError(
            f"model.moe.top_k must be in [1, num_experts={moe.num_experts}], got {moe.top_k}; "
            "lower top_k or raise num_experts"
        )
    if moe.first_dense >= model.num_layers:
        raise UserError(
            f"model.moe.first_dense must be below model.num_layers={model.num_layers}, got {moe.first_dense}; "
            "lower it, or set model.moe.num_experts to 0 for a dense model"
        )
    _check_divides("model.moe.every", moe.every, "num_layers - first_dense", model.num_layers - moe.first_dense)
    _check_router(moe)
    if moe.num_expert_groups > 1 or moe.top_k_groups > 1:
        _check_groups(moe)


def _check_router(moe: MoEConfig) -> None:
    rules = router_rules(moe)
    if rules.one_expert and moe.top_k != 1:
        raise UserError(
            f"model.moe.router={moe.router} sends a token to one expert, but model.moe.top_k is {moe.top_k}; "
            "set it to 1, or use top_k"
        )
    if rules.needs_capacity and moe.capacity_factor is None:
        raise UserError(
            f"model.moe.router={moe.router} needs a model.moe.capacity_factor, which sets how many tokens an expert "
            "takes, got None; set it, 1.0 for top_k experts a token on average"
        )
    if moe.bias_update == "quantile" and (not rules.has_groups or moe.num_expert_groups > 1):
        raise UserError(
            "model.moe.bias_update=quantile is for model.moe.router=sigmoid_bias with one group of experts, got "
            f"{moe.router} with {moe.num_expert_groups}; set it to sign"
        )
    can_drop = moe.dispatch in ("auto", "einsum", "gather") or rules.needs_capacity
    if moe.capacity_factor is not None and not can_drop:
        raise UserError(
            f"model.moe.dispatch={moe.dispatch} drops nothing and takes no model.moe.capacity_factor, got "
            f"{moe.capacity_factor}; set it to None, or use gather"
        )


def _check_groups(moe: MoEConfig) -> None:
    if not router_rules(moe).has_groups:
        able = ", ".join(name for name, rules in ROUTER_RULES.items() if rules.has_groups)
        raise UserError(
            f"model.moe.num_expert_groups and top_k_groups are for model.moe.router={able}, got "
            f"{moe.num_expert_groups} and {moe.top_k_groups} with {moe.router}; leave them at 1"
        )
    _check_divides("model.moe.num_expert_groups", moe.num_expert_groups, "num_experts", moe.num_experts)
    if moe.top_k_groups > moe.num_expert_groups:
        raise UserError(
            f"model.moe.top_k_groups must be in [1, num_expert_groups={moe.num_expert_groups}], "
            f"got {moe.top_k_groups}; lower it"
        )
    allowed = moe.num_experts // moe.num_expert_groups * moe.top_k_groups
    if moe.top_k > allowed:
        raise UserError(
            f"model.moe.top_k must be at most the {allowed} experts of {moe.top_k_groups} of {moe.num_expert_groups} "
            f"groups, got {moe.top_k}; lower it, or raise top_k_groups"
        )


def _check_training(config: Config) -> None:
    data, optimizer, train = config.data, config.optimizer, config.train
    _check_divides("optimizer.accumulation_steps", optimizer.accumulation_steps, "data.batch_size", data.batch_size)
    if data.batch_size * config.model.context_length > MANY:
        raise UserError(
            f"data.batch_size * model.context_length, the tokens of a step, must be at most {MANY:,}, got "
            f"{data.batch_size * config.model.context_length:,}; lower one of them"
        )
    decay_steps = optimizer.decay_steps or train.num_steps
    if optimizer.warmup_steps >= decay_steps:
        raise UserError(
            f"optimizer.warmup_steps must be below the {decay_steps} steps of the schedule, "
            f"got {optimizer.warmup_steps}; lower it or raise train.num_steps"
        )
    _check_mesh(config.mesh)
    if train.profile is not None and profile_steps(train.profile)[0] >= train.num_steps:
        raise UserError(
            f"train.profile must start before train.num_steps={train.num_steps}, got {train.profile}; lower its START"
        )


def _check_mesh(mesh: MeshConfig) -> None:
    given = {"coordinator": mesh.coordinator, "num_processes": mesh.num_processes, "process_id": mesh.process_id}
    missing = [f"mesh.{name}" for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UserError(
            "mesh.coordinator, mesh.num_processes and mesh.process_id go together, but there is no "
            f"{' and no '.join(missing)}; give all three, or none where the cluster provides them"
        )
    if mesh.coordinator is not None and not re.fullmatch(r".+:\d{1,5}", mesh.coordinator):
        raise UserError(f"mesh.coordinator must be HOST:PORT, got {mesh.coordinator}; add the port, such as :8476")
    if mesh.process_id is not None and mesh.num_processes is not None and mesh.process_id >= mesh.num_processes:
        raise UserError(
            f"mesh.process_id must be below mesh.num_processes={mesh.num_processes}, got {mesh.process_id}; ids "
            "start at 0"
        )
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "expert": mesh.expert, "tensor": mesh.tensor}
    for name, size in sizes.items():
        if size == 0:
            raise UserError(f"mesh.{name} must be -1 (all devices that are left) or at least 1, got 0; change it")
    free = [f"mesh.{name}" for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"only one size of the mesh may be -1, got {' and '.join(free)}; give numbers to all but one")


def _check_trackers(train: TrainConfig) -> None:
    if "mlflow" in train.trackers and not train.mlflow_experiment.strip():
        raise UserError("train.mlflow_experiment must be a name, got none; name an experiment")
    if train.mlflow_uri is not None and "mlflow" not in train.trackers:
        raise UserError(
            f"train.mlflow_uri is for train.trackers mlflow, got {train.mlflow_uri} with "
            f"{', '.join(train.trackers) or 'none'}; add mlflow to train.trackers, or leave the address out"
        )


def profile_steps(profile: str) -> tuple[int, int]:
    """The steps (start, stop) of train.profile; raises UserError unless it is START:STOP with START < STOP."""
    match = re.fullmatch(r"(\d+):(\d+)", profile)
    if not match or int(match.group(1)) >= int(match.group(2)):
        raise UserError(f"train.profile must be START:STOP with START < STOP, such as 10:15; got {profile!r}")
    return int(match.group(1)), int(match.group(2))
