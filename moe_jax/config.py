"""Every setting of a run, as frozen typed sections. Imports no jax, so that a mistake is told within a second.

A recipe in ``configs/`` is a file with ``get_config() -> Config`` that names only what differs from the defaults here.
``validate`` is called once, right after parsing; each part of the package then takes the section it needs.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Literal

from moe_jax.command import UserError
from moe_jax.sections import MANY, check_range, check_type, section_from_dict, settings


@dataclass(frozen=True)
class MoEConfig:
    num_experts: int = 8
    """Experts of each MoE layer (E); 0 makes every layer dense."""
    top_k: int = 2
    """Experts that each token is sent to (K)."""
    expert_dim: int = 256
    """Hidden width of one expert (F)."""
    router: Literal["top_k", "noisy_top_k"] = "top_k"
    """How experts are chosen: by score, or by score plus learned noise while training (arXiv 1701.06538)."""
    dispatch: Literal["einsum", "gather"] = "gather"
    """How rows reach their experts: one-hot products, or gathers by row index. Both make the same decisions."""
    capacity_factor: float | None = 1.25
    """Rows an expert accepts in training, as a multiple of the balanced share T*K/E; None drops nothing."""
    load_balancing_weight: float = 0.01
    """Weight of the load-balancing loss (arXiv 2101.03961, eq. 4) in the training objective."""
    load_balancing_scope: Literal["sequence", "batch"] = "sequence"
    """Whether load and importance are balanced in each sequence or over each microbatch of all devices."""
    router_z_weight: float = 0.001
    """Weight of the router z-loss (arXiv 2202.08906, eq. 5) in the training objective."""
    importance_weight: float = 0.0
    """Weight of the importance loss (arXiv 1701.06538, eq. 6-7) in the training objective."""
    every: int = 1
    """Layers in one period; the last layer of each period is the MoE layer."""
    first_dense: int = 0
    """Dense layers before the first period."""


@dataclass(frozen=True)
class ModelConfig:
    context_length: int = 128
    """Tokens in one training sequence, and the reach of attention when sampling (L)."""
    num_layers: int = 4
    """Transformer blocks (N)."""
    embed_dim: int = 128
    """Width of the residual stream (D)."""
    num_heads: int = 4
    """Query heads (H); embed_dim is divided among them."""
    num_kv_heads: int | None = None
    """Key/value heads (J), each shared by num_heads/num_kv_heads query heads; None: as many as query heads."""
    mlp_dim: int | None = None
    """Hidden width of a dense block's MLP; None: top_k * expert_dim, the active width of a MoE layer."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before attention, before the MLP and before the output."""
    positions: Literal["rotary", "learned"] = "rotary"
    """Rotated queries and keys (arXiv 2104.09864), or one learned vector a position."""
    rope_theta: float = 10000.0
    """Longest rotary wavelength, as a multiple of 2*pi tokens."""
    qk_norm: bool = False
    """Normalise queries and keys by RMS, per head, before the rotation."""
    activation: Literal["swiglu", "gelu", "relu"] = "swiglu"
    """Nonlinearity of experts and dense MLPs; swiglu has a gate branch, so three matrices instead of two."""
    use_bias: bool = False
    """Add a bias after every linear map and in LayerNorm."""
    dropout_rate: float = 0.0
    """Dropout after the embedding, on attention weights and on each block's two outputs."""
    tie_embeddings: bool = True
    """Use the token embedding as the output projection."""
    init: Literal["scaled_normal", "kaiming", "xavier"] = "scaled_normal"
    """Matrices: normal of std init_std (outputs of blocks / sqrt(2N)), He (arXiv 1502.01852) or Glorot normal."""
    init_std: float = 0.02
    """Standard deviation of the embeddings, and of every matrix under init = scaled_normal."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products; parameters, routing, norms and losses stay in float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, or everything in a period."""
    scan_unroll: int = 1
    """Periods unrolled in each turn of the loop over layers: faster steps on a CPU, longer compilation."""
    moe: MoEConfig = field(default_factory=MoEConfig)


@dataclass(frozen=True)
class DataConfig:
    path: str | None = None
    """A text file or a folder of .txt and .md files; None: the 38 plays of Shakespeare that come with the package."""
    tokenizer: str = "bpe:2048"
    """char, byte, or bpe:VOCAB (byte-pair encoding with VOCAB tokens, trained on the training split)."""
    val_fraction: float = 0.05
    """Share of the text held out for validation: whole documents, or the end of a single one."""
    batch_size: int = 32
    """Sequences in the global batch of one optimizer step (B)."""
    seed: int = 0
    """Seed of the order in which the training windows are drawn."""


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup_steps: int = 100
    """Optimizer steps over which the learning rate rises linearly from zero."""
    decay_steps: int | None = None
    """Optimizer step at which the cosine decay ends; None: train.num_steps."""
    final_fraction: float = 0.1
    """Learning rate after the decay, as a fraction of the peak."""
    beta1: float = 0.9
    """AdamW: decay of the mean of gradients."""
    beta2: float = 0.95
    """AdamW: decay of the mean of squared gradients."""
    epsilon: float = 1e-8
    """AdamW: added to the root of the mean of squared gradients."""
    weight_decay: float = 0.1
    """AdamW: decoupled weight decay, on matrices only (not on embeddings, norms and biases)."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; None: no clipping."""
    accumulation_steps: int = 1
    """Microbatches that one optimizer step is computed in; the result is that of the whole batch."""


@dataclass(frozen=True)
class MeshConfig:
    data: int = -1
    """Devices that the batch is divided over; -1: all of them."""


@dataclass(frozen=True)
class TrainConfig:
    num_steps: int = 1000
    """Optimizer steps of the run."""
    eval_every: int = 250
    """Steps between evaluations; the last step is always evaluated."""
    checkpoint_every: int = 250
    """Steps between checkpoints; each evaluated step and the last one are also saved."""
    log_every: int = 20
    """Steps that one line of metrics.jsonl averages over."""
    seed: int = 0
    """Seed of the initial parameters, dropout and router noise."""
    patience: int | None = None
    """Stop after this many evaluations in a row without a lower validation loss; None: never."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, beside the one of the lowest validation loss."""
    compile_cache: bool = True
    """Keep compiled programs in the user's cache folder, so that a later start skips compilation."""
    profile: str | None = None
    """START:STOP writes a jax.profiler trace of steps START to STOP-1 into the run directory; None: no trace."""


@dataclass(frozen=True)
class SampleConfig:
    max_new_tokens: int = 200
    """Tokens to generate after the prompt, at most."""
    num_samples: int = 1
    """Continuations of the prompt."""
    temperature: float = 0.8
    """Divides the logits: below 1 is safer, above 1 wilder; 0 always takes the most likely token."""
    top_k: int | None = None
    """Sample only among this many of the most likely tokens; None: all."""
    top_p: float = 0.95
    """Sample only among the most likely tokens that together reach this probability; 1: all."""
    seed: int = 0
    """Seed of the draw: the same seed gives the same text."""


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def to_dict(self) -> dict:
        """The settings as nested dictionaries of JSON values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict, source: str) -> "Config":
        """The settings of ``to_dict``; ``source`` names where they were read from in errors. Raises UserError."""
        return section_from_dict(Config, values, source, "")


def validate(config: Config) -> Config:
    """Returns ``config``, or raises UserError on a wrong type, a value out of range or an impossible combination."""
    for name, expected, value in settings(config):
        check_type(name, expected, value)
        if value is not None and name in _RANGES:
            check_range(name, value, *_RANGES[name])
    _check_model(config.model)
    if config.model.moe.num_experts:
        _check_moe(config.model)
    _check_training(config)
    return config


_POSITIVE = (1e-12, math.inf)
_COUNT = (1, MANY)
_NOT_NEGATIVE = (0, math.inf)
_FRACTION = (0.0, 1.0)
_RANGES = {
    **dict.fromkeys(["model.context_length", "model.num_layers", "model.embed_dim", "model.num_heads"], _COUNT),
    **dict.fromkeys(["model.num_kv_heads", "model.mlp_dim", "model.scan_unroll"], _COUNT),
    **dict.fromkeys(["model.rope_theta", "model.init_std"], _POSITIVE),
    "model.dropout_rate": (0.0, 0.99),
    "model.moe.num_experts": (0, 2**16),
    **dict.fromkeys(["model.moe.expert_dim", "model.moe.every"], _COUNT),
    "model.moe.capacity_factor": _POSITIVE,
    **dict.fromkeys(["model.moe.load_balancing_weight", "model.moe.router_z_weight"], _NOT_NEGATIVE),
    "model.moe.importance_weight": _NOT_NEGATIVE,
    "model.moe.first_dense": _NOT_NEGATIVE,
    "data.val_fraction": (0.0001, 0.9),
    "data.batch_size": _COUNT,
    "data.seed": (0, 2**32 - 1),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.warmup_steps": _NOT_NEGATIVE,
    "optimizer.decay_steps": _COUNT,
    "optimizer.final_fraction": _FRACTION,
    "optimizer.beta1": (0.0, 0.9999),
    "optimizer.beta2": (0.0, 0.999999),
    "optimizer.epsilon": (1e-30, 1.0),
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.clip_norm": _POSITIVE,
    "optimizer.accumulation_steps": _COUNT,
    **dict.fromkeys(["train.num_steps", "train.eval_every", "train.checkpoint_every", "train.log_every"], _COUNT),
    **dict.fromkeys(["train.patience", "train.keep_checkpoints"], _COUNT),
    "train.seed": (0, 2**32 - 1),
    **dict.fromkeys(["sample.num_samples", "sample.top_k"], _COUNT),
    "sample.max_new_tokens": (1, 2**20),
    "sample.temperature": _NOT_NEGATIVE,
    "sample.top_p": (1e-6, 1.0),
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
            "top_k * expert_dim is the width of a dense MLP; raise it, or set model.mlp_dim"
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


def _check_training(config: Config) -> None:
    data, optimizer, train = config.data, config.optimizer, config.train
    tokenizer = re.fullmatch(r"char|byte|bpe:(\d{1,6})", data.tokenizer)
    if not tokenizer:
        raise UserError(f"data.tokenizer must be char, byte or bpe:VOCAB (such as bpe:2048), got {data.tokenizer!r}")
    if tokenizer.group(1) and not 300 <= int(tokenizer.group(1)) <= 262144:
        raise UserError(f"data.tokenizer bpe:VOCAB needs VOCAB in [300, 262144], got {tokenizer.group(1)}")
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
    if config.mesh.data != -1 and config.mesh.data < 1:
        raise UserError(f"mesh.data must be -1 (all devices) or at least 1, got {config.mesh.data}")
    if train.profile is not None and profile_steps(train.profile)[0] >= train.num_steps:
        raise UserError(
            f"train.profile must start before train.num_steps={train.num_steps}, got {train.profile}; lower its START"
        )


def profile_steps(profile: str) -> tuple[int, int]:
    """The steps (start, stop) of train.profile; raises UserError unless it is START:STOP with START < STOP."""
    match = re.fullmatch(r"(\d+):(\d+)", profile)
    if not match or int(match.group(1)) >= int(match.group(2)):
        raise UserError(f"train.profile must be START:STOP with START < STOP, such as 10:15; got {profile!r}")
    return int(match.group(1)), int(match.group(2))
