"""The rules that settings must keep, by themselves and with each other. Imports no jax."""

import math
import os
import re
from collections.abc import Callable

from moe_jax.config import Config, ModelConfig, MoEConfig, SampleConfig
from moe_jax.config.fields import MANY, check_range, check_type, settings
from moe_jax.errors import UserError


def check(config: Config) -> Config:
    """Returns ``config``, or raises UserError on a wrong type, a value out of range or an impossible combination."""
    for name, expected, value in settings(config):
        check_type(name, expected, value)
        if value is not None and name in RANGES:
            for number in value if isinstance(value, tuple) else (value,):
                check_range(name, number, *RANGES[name])
    _check_model(config.model)
    if config.model.moe.num_experts:
        _check_moe(config.model)
    _check_training(config)
    return config


def check_sample(sample: SampleConfig, name_of: Callable[[str], str]) -> SampleConfig:
    """Returns ``sample``, or raises UserError, which calls a setting what ``name_of`` makes of its field's name."""
    try:
        check(Config(sample=sample))
    except UserError as error:  # where these settings are given, they stand without their section
        raise UserError(re.sub(r"\bsample\.(\w+)", lambda match: name_of(match[1]), str(error))) from None
    return sample


_POSITIVE = (1e-12, math.inf)
_COUNT = (1, MANY)
_NOT_NEGATIVE = (0, math.inf)
_FRACTION = (0.0, 1.0)
RANGES = {
    **dict.fromkeys(["model.context_length", "model.num_layers", "model.embed_dim", "model.num_heads"], _COUNT),
    **dict.fromkeys(["model.num_kv_heads", "model.mlp_dim", "model.scan_unroll"], _COUNT),
    **dict.fromkeys(["model.rope_theta", "model.init_std"], _POSITIVE),
    "model.dropout_rate": (0.0, 0.99),
    "model.moe.num_experts": (0, 2**16),
    **dict.fromkeys(["model.moe.expert_dim", "model.moe.every"], _COUNT),
    **dict.fromkeys(["model.moe.capacity_factor", "model.moe.routed_scaling_factor"], _POSITIVE),
    "model.moe.router_jitter": (0.0, 0.99),
    "model.moe.bias_update_rate": _FRACTION,
    **dict.fromkeys(["model.moe.num_expert_groups", "model.moe.top_k_groups"], _COUNT),
    "model.moe.num_shared_experts": (0, 2**16),
    **dict.fromkeys(["model.moe.load_balancing_weight", "model.moe.router_z_weight"], _NOT_NEGATIVE),
    "model.moe.importance_weight": _NOT_NEGATIVE,
    "model.moe.first_dense": _NOT_NEGATIVE,
    "data.val_fraction": (0.0001, 0.9),
    "data.batch_size": _COUNT,
    "data.token_dropout": (0.0, 0.99),
    "data.seed": (0, 2**32 - 1),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.warmup_steps": _NOT_NEGATIVE,
    "optimizer.decay_steps": _COUNT,
    "optimizer.decay_fraction": (1e-6, 1.0),
    "optimizer.final_fraction": _FRACTION,
    "optimizer.beta1": (0.0, 0.9999),
    "optimizer.beta2": (0.0, 0.999999),
    "optimizer.epsilon": (1e-30, 1.0),
    "optimizer.muon_beta": (0.0, 0.9999),
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.clip_norm": _POSITIVE,
    "optimizer.accumulation_steps": _COUNT,
    **dict.fromkeys(["train.num_steps", "train.eval_every", "train.checkpoint_every", "train.log_every"], _COUNT),
    **dict.fromkeys(["train.patience", "train.keep_checkpoints", "train.num_epochs"], _COUNT),
    **dict.fromkeys(["train.keep_every", "train.max_skipped_steps"], _COUNT),
    "train.keep_best": (0, MANY),
    "train.watchdog": (2.0, 1e6),
    "train.seed": (0, 2**32 - 1),
    "sample.num_samples": (1, 2**16),
    "sample.top_k": _COUNT,
    "sample.max_new_tokens": (1, 2**20),
    "sample.temperature": _NOT_NEGATIVE,
    "sample.top_p": (1e-6, 1.0),
    "sample.min_p": _FRACTION,
    "sample.repetition_penalty": (0.01, 100.0),
    "sample.stop_tokens": (0, MANY),
    "sample.seed": (0, 2**32 - 1),
}


def _check_model(model: ModelConfig) -> None:
    if model.embed_dim % model.num_heads:
        raise UserError(
            f"model.num_heads must divide model.embed_dim={model.embed_dim}, got {model.num_heads}; change one of them"
        )
    if not model.moe.num_experts and model.mlp_dim is None and model.moe.top_k < 1:
        raise UserError(
            f"model.moe.top_k must be at least 1, got {model.moe.top_k}: "
            "(top_k + num_shared_experts) * expert_dim is the width of a dense MLP; raise it, or set model.mlp_dim"
        )
    if model.num_kv_heads is not None and model.num_heads % model.num_kv_heads:
        raise UserError(
            f"model.num_kv_heads must divide model.num_heads={model.num_heads}, got {model.num_kv_heads}; "
            "change one of them"
        )
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
    if (model.num_layers - moe.first_dense) % moe.every:
        raise UserError(
            f"model.moe.every must divide num_layers - first_dense = {model.num_layers - moe.first_dense}, "
            f"got {moe.every}; change model.num_layers, model.moe.first_dense or model.moe.every"
        )
    _check_router(moe)
    _check_dispatch(moe)


def _check_router(moe: MoEConfig) -> None:
    if moe.router == "switch" and moe.top_k != 1:
        raise UserError(
            f"model.moe.router=switch sends a token to one expert, but model.moe.top_k is {moe.top_k}; "
            "set it to 1, or use top_k"
        )
    if moe.router == "expert_choice" and moe.capacity_factor is None:
        raise UserError(
            "model.moe.router=expert_choice needs a model.moe.capacity_factor, which sets how many tokens an expert "
            "takes, got None; set it, 1.0 for top_k experts a token on average"
        )
    if moe.router != "sigmoid_bias" and (moe.num_expert_groups, moe.top_k_groups) != (1, 1):
        raise UserError(
            f"model.moe.num_expert_groups and top_k_groups are for model.moe.router=sigmoid_bias, got "
            f"{moe.num_expert_groups} and {moe.top_k_groups} with {moe.router}; leave them at 1"
        )
    if moe.num_experts % moe.num_expert_groups:
        raise UserError(
            f"model.moe.num_expert_groups must divide num_experts={moe.num_experts}, got {moe.num_expert_groups}; "
            "change one of them"
        )
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


def _check_dispatch(moe: MoEConfig) -> None:
    is_dropless = moe.dispatch not in ("auto", "einsum", "gather")
    if is_dropless and moe.capacity_factor is not None and moe.router != "expert_choice":
        raise UserError(
            f"model.moe.dispatch={moe.dispatch} drops nothing and takes no model.moe.capacity_factor, got "
            f"{moe.capacity_factor}; set it to None, or use gather"
        )


def _check_training(config: Config) -> None:
    data, optimizer, train = config.data, config.optimizer, config.train
    if data.path is not None:
        check_input("data.path", data.path)
    if data.tokenizer is not None:
        check_tokenizer("data.tokenizer", data.tokenizer)
    if data.batch_size % optimizer.accumulation_steps:
        raise UserError(
            f"optimizer.accumulation_steps must divide data.batch_size={data.batch_size}, "
            f"got {optimizer.accumulation_steps}; change one of them"
        )
    decay_steps = optimizer.decay_steps or train.num_steps
    if optimizer.warmup_steps >= decay_steps:
        raise UserError(
            f"optimizer.warmup_steps must be below the {decay_steps} steps of the schedule, "
            f"got {optimizer.warmup_steps}; lower it or raise train.num_steps"
        )
    if 0 < config.sample.temperature < 0.001:
        raise UserError(
            f"sample.temperature must be 0 (the most likely token) or at least 0.001, got {config.sample.temperature}"
        )
    if "" in config.sample.stop:
        raise UserError("each of sample.stop must have at least one character, got an empty text; leave it out")
    if config.mesh.data != -1 and config.mesh.data < 1:
        raise UserError(f"mesh.data must be -1 (all devices) or at least 1, got {config.mesh.data}")
    if "mlflow" in train.trackers and not train.mlflow_experiment.strip():
        raise UserError("train.mlflow_experiment must be a name, got none; name an experiment")
    if train.mlflow_uri is not None and "mlflow" not in train.trackers:
        raise UserError(
            f"train.mlflow_uri is for train.trackers mlflow, got {train.mlflow_uri} with "
            f"{', '.join(train.trackers) or 'none'}; add mlflow to train.trackers, or leave the address out"
        )
    if train.profile is not None and profile_steps(train.profile)[0] >= train.num_steps:
        raise UserError(
            f"train.profile must start before train.num_steps={train.num_steps}, got {train.profile}; lower its START"
        )


def check_tokenizer(name: str, spec: str) -> None:
    """UserError unless ``spec`` names a tokenizer that can be made, or a file or folder that is there."""
    vocab = re.fullmatch(r"bpe:(\d{1,6})", spec)
    if vocab and not 300 <= int(vocab.group(1)) <= 262144:
        raise UserError(f"{name} bpe:VOCAB needs VOCAB in [300, 262144], got {vocab.group(1)}; change it")
    if not vocab and spec not in ("char", "byte", "gpt2", "cl100k") and not os.path.exists(spec):
        raise UserError(
            f"{name} must be char, byte, bpe:VOCAB (such as bpe:2048), gpt2, cl100k or the path of a tokenizer.json, "
            f"got {spec!r}; choose one"
        )


_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def check_folder(name: str, folder: str, remedy: str) -> None:
    """UserError where ``folder``, the value of the flag ``name``, is empty or the address of something elsewhere."""
    if not folder.strip():
        raise UserError(f"{name} must name a folder, got {folder!r}, as of a variable that is not set; name one")
    if _ADDRESS.match(folder):  # a path of that spelling would be a folder called "gs:" in the working folder
        raise UserError(f"{name} must be a folder of this machine, got {folder}; {remedy}")


def check_input(name: str, path: str) -> None:
    """UserError where ``path``, PATH or CORPUS=PATH, is the address of a text elsewhere."""
    if _ADDRESS.match(re.sub(r"^[A-Za-z][\w-]*=", "", path)):
        raise UserError(
            f"{name} must be a file or folder of this machine, got {path}; download it, or mount the bucket, "
            "and name the copy"
        )


def profile_steps(profile: str) -> tuple[int, int]:
    """The steps (start, stop) of train.profile; raises UserError unless it is START:STOP with START < STOP."""
    match = re.fullmatch(r"(\d+):(\d+)", profile)
    if not match or int(match.group(1)) >= int(match.group(2)):
        raise UserError(f"train.profile must be START:STOP with START < STOP, such as 10:15; got {profile!r}")
    return int(match.group(1)), int(match.group(2))
