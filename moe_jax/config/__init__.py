"""Every setting of a run, as frozen typed sections. Imports no jax, so that a mistake is reported within a second.

A recipe in ``configs/`` is a file with ``get_config() -> Config`` that names only what differs from the defaults here.
``rules.check`` is called once, right after parsing; each part of the package then takes the section that it needs.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

from moe_jax.config.bounds import (
    MANY,
    Count,
    Fraction,
    LocalInput,
    LocalPath,
    NotNegative,
    Positive,
    Range,
    Seed,
    Text,
    TokenizerSpec,
    ValidationFraction,
    few,
)
from moe_jax.config.fields import OldSettings, section_from_dict


@dataclass(frozen=True)
class MoEConfig:
    num_experts: Annotated[int, Range(0, 2**16)] = 8
    """Experts of each MoE layer (E); 0 makes every layer dense."""
    top_k: Annotated[int, Range(0, MANY)] = 2
    """Experts that each token is sent to (K)."""
    expert_dim: Count = 256
    """Hidden width of one expert (F)."""
    router: Literal["top_k", "noisy_top_k", "switch", "expert_choice", "sigmoid_bias"] = "top_k"
    """How experts are chosen; docs/routing.md has each one's equation, use and traps."""
    renormalise: bool = True
    """Whether the weights of a token's experts sum to one, or are the scores among all experts (tokens' choice)."""
    routed_scaling_factor: Positive = 1.0
    """Multiplies the sum of the routed experts' outputs (DeepSeek-V3: 2.5)."""
    router_jitter: Annotated[float, Range(0.0, 0.99)] = 0.01
    """switch: in training the router's input is multiplied by noise in [1 - this, 1 + this]."""
    bias_update: Literal["sign", "quantile"] = "sign"
    """sigmoid_bias: a step moves an expert's bias by a fixed rate, or to where the batch would give it its share."""
    bias_update_rate: Fraction = 0.001
    """sign: what a step adds to the bias of an underloaded expert and takes from that of an overloaded one."""
    num_expert_groups: Count = 1
    """sigmoid_bias: groups of neighbouring experts, of which a token may use only some."""
    top_k_groups: Count = 1
    """sigmoid_bias: groups that a token may use."""
    num_shared_experts: Annotated[int, Range(0, 2**16)] = 0
    """Experts that every token passes, beside its routed ones; computed as one MLP of their joint width."""
    dispatch: Literal["auto", "einsum", "gather", "blocked", "ragged", "pallas", "by_row"] = "auto"
    """How rows reach their experts; auto: the fastest measured here (docs/dispatch.md). The last four drop nothing."""
    capacity_factor: Positive | None = None
    """Rows an expert accepts in training, as a multiple of the balanced share T*K/E; None drops nothing."""
    load_balancing_weight: NotNegative = 0.01
    """Weight of the load-balancing loss (arXiv 2101.03961, eq. 4) in the training objective."""
    load_balancing_scope: Literal["sequence", "batch"] = "sequence"
    """Whether load and importance are balanced in each sequence or over each microbatch of all devices."""
    router_z_weight: NotNegative = 0.001
    """Weight of the router z-loss (arXiv 2202.08906, eq. 5) in the training objective."""
    importance_weight: NotNegative = 0.0
    """Weight of the importance loss (arXiv 1701.06538, eq. 6-7) in the training objective."""
    every: Count = 1
    """Layers in one period; the last layer of each period is the MoE layer."""
    first_dense: Annotated[int, Range(0, MANY)] = 0
    """Dense layers before the first period."""


@dataclass(frozen=True)
class ModelConfig:
    context_length: Count = 128
    """Tokens in one training sequence, and the reach of attention when sampling (L)."""
    num_layers: Count = 4
    """Transformer blocks (N)."""
    embed_dim: Count = 128
    """Width of the residual stream (D)."""
    num_heads: Count = 4
    """Query heads (H); embed_dim is divided among them."""
    num_kv_heads: Count | None = None
    """Key/value heads (J), each shared by num_heads/num_kv_heads query heads; None: as many as query heads."""
    mlp_dim: Count | None = None
    """Hidden width of a dense block's MLP; None: what a token passes in a MoE layer, (K + shared) * expert_dim."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before attention, before the MLP and before the output."""
    positions: Literal["rotary", "learned"] = "rotary"
    """Rotated queries and keys (arXiv 2104.09864), or one learned vector a position."""
    rope_theta: Positive = 10000.0
    """Longest rotary wavelength, as a multiple of 2*pi tokens."""
    attention: Literal["auto", "full", "blocks", "cudnn"] = "auto"
    """full: all scores in memory; blocks: a part; cudnn: NVIDIA's kernel, bfloat16. auto: the fastest."""
    qk_norm: bool = False
    """Normalise queries and keys by RMS, per head, before the rotation."""
    activation: Literal["swiglu", "gelu", "relu"] = "swiglu"
    """Nonlinearity of experts and dense MLPs; swiglu has a gate branch, so three matrices. gelu is the tanh form."""
    use_bias: bool = False
    """Add a bias after every linear map and in LayerNorm."""
    dropout_rate: Annotated[float, Range(0.0, 0.99)] = 0.0
    """Dropout on attention weights, on each block's two outputs and, with embedding_dropout, on the embedding."""
    embedding_dropout: bool = True
    """Whether dropout_rate applies to the embedding too, as in GPT-2."""
    tie_embeddings: bool = True
    """Use the token embedding as the output projection."""
    init: Literal["scaled_normal", "kaiming", "xavier"] = "scaled_normal"
    """Matrices: normal of std init_std (outputs of blocks / sqrt(2N)), He (arXiv 1502.01852) or Glorot normal."""
    init_std: Positive = 0.02
    """Standard deviation of the embeddings, and of every matrix under init = scaled_normal."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products; parameters, routing, norms and losses stay in float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, or everything in a period."""
    scan_unroll: Count = 1
    """Periods unrolled in each turn of the loop over layers: faster steps on a CPU, longer compilation."""
    moe: MoEConfig = field(default_factory=MoEConfig)


@dataclass(frozen=True)
class DataConfig:
    path: LocalInput | None = None
    """A text file, a folder of texts, or one that moe_jax.prepare made; None: the 38 embedded plays."""
    tokenizer: TokenizerSpec | None = None
    """char, byte, bpe:VOCAB, gpt2, cl100k or a tokenizer.json; None: that of a prepared folder, else bpe:2048."""
    val_fraction: ValidationFraction | None = None
    """Share of the text held out for validation; None: that of a prepared folder, else 0.05."""
    mode: Literal["windows", "packed", "padded"] = "windows"
    """A row is: a window from anywhere; whole documents that cannot see each other; one document, cut or padded."""
    batch_size: Count = 32
    """Sequences in the global batch of one optimizer step (B)."""
    token_dropout: Annotated[float, Range(0.0, 0.99)] = 0.0
    """Share of input tokens that are replaced in training, against noisy data; targets stay."""
    token_dropout_by: Literal["unknown", "random"] = "unknown"
    """What replaces them: <|unknown|>, or tokens drawn from the whole vocabulary."""
    seed: Seed = 0
    """Seed of the order in which the training rows are drawn, and of token dropout."""


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "muon"] = "adamw"
    """AdamW for everything, or Muon for the matrices of attention, MLPs and experts and AdamW for the rest."""
    learning_rate: Positive = 1e-3
    """Peak learning rate; Muon's updates are scaled to the size of AdamW's, so that one rate serves both."""
    schedule: Literal["cosine", "wsd", "onecycle", "constant"] = "cosine"
    """After the warm-up: a cosine down; the peak, then a line down; OneCycle, whose warm-up is a cosine; the peak."""
    warmup_steps: Annotated[int, Range(0, MANY)] = 100
    """Optimizer steps over which the learning rate rises: linearly from zero, with onecycle from 1/25 of the peak."""
    decay_steps: Count | None = None
    """Optimizer step at which the decay ends; None: train.num_steps."""
    decay_fraction: Annotated[float, Range(1e-6, 1.0)] = 0.2
    """wsd: share of decay_steps, at their end, over which the learning rate falls; at most all after the warm-up."""
    final_fraction: Fraction = 0.1
    """Learning rate after the decay, as a fraction of the peak."""
    beta1: Annotated[float, Range(0.0, 0.9999)] = 0.9
    """AdamW: decay of the mean of gradients."""
    beta2: Annotated[float, Range(0.0, 0.999999)] = 0.95
    """AdamW: decay of the mean of squared gradients."""
    epsilon: Annotated[float, Range(1e-30, 1.0)] = 1e-8
    """AdamW: added to the root of the mean of squared gradients."""
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the mean of gradients is kept between steps; bfloat16 saves 2 bytes a parameter."""
    muon_beta: Annotated[float, Range(0.0, 0.9999)] = 0.95
    """Muon: decay of the mean of gradients, with Nesterov's look ahead."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay, on matrices only (not on embeddings, norms and biases)."""
    clip_norm: Positive | None = 1.0
    """Largest global norm of the gradient; None: no clipping."""
    accumulation_steps: Count = 1
    """Microbatches that one optimizer step is computed in; the result is that of the whole batch."""


@dataclass(frozen=True)
class MeshConfig:
    data: Annotated[int, Range(-1, MANY)] = -1
    """Devices that the batch alone is divided over; -1 here or below: all that the other sizes leave."""
    fsdp: Annotated[int, Range(-1, MANY)] = 1
    """Devices that batch, parameters and optimizer state are divided over; a layer is gathered to be computed."""
    expert: Annotated[int, Range(-1, MANY)] = 1
    """Devices that batch and experts are divided over; rows travel to their experts."""
    tensor: Annotated[int, Range(-1, MANY)] = 1
    """Devices that attention heads, the width of experts and MLPs, and the vocabulary are divided over."""
    coordinator: Text | None = None
    """HOST:PORT of process 0 of a run of several; None: what SLURM, Open MPI or a TPU pod says, if anything."""
    num_processes: Count | None = None
    """Processes of the run; with coordinator."""
    process_id: Annotated[int, Range(0, MANY)] | None = None
    """Which of them this is, from 0; with coordinator."""
    heartbeat_seconds: Annotated[float, Range(5.0, 3600.0)] = 60.0
    """Seconds after which a process that does not answer ends the others, of a run of several."""


@dataclass(frozen=True)
class TrainConfig:
    num_steps: Count = 1000
    """Optimizer steps of the run."""
    num_epochs: Count | None = None
    """Passes over the training split, instead of num_steps; None: num_steps counts."""
    eval_every: Count = 250
    """Steps between evaluations; the last step is always evaluated."""
    checkpoint_every: Count = 250
    """Steps between checkpoints; each evaluated step and the last one are also saved."""
    log_every: Count = 20
    """Steps that one line of metrics.jsonl averages over."""
    seed: Seed = 0
    """Seed of the initial parameters, dropout and router noise."""
    max_minutes: Positive | None = None
    """Save and end after so many minutes, with exit code 0, as after SIGUSR1: the same command goes on."""
    patience: Count | None = None
    """Stop after this many evaluations in a row without a lower validation loss; None: never."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept."""
    keep_best: Annotated[int, Range(0, MANY)] = 1
    """Checkpoints of the lowest validation losses kept beside them."""
    keep_every: Count | None = None
    """Checkpoints at multiples of this many steps are made and kept for good; None: none is."""
    keep_epochs: bool = False
    """Make a checkpoint at the end of each pass over the training split, and keep it for good."""
    init_from: LocalPath | None = None
    """Run directory from whose best checkpoint a new run takes its parameters, as for fine-tuning; None: random."""
    deterministic: bool = False
    """On a GPU, only use kernels that give the same bits each time, which is slower; a CPU always does."""
    max_skipped_steps: Count = 10
    """Steps in a row without a finite loss and gradient, each left out, after which the run stops."""
    watchdog: Annotated[float, Range(2.0, 1e6)] | None = 20.0
    """Log what every thread does when a step takes this many times its peers and a minute; None: never."""
    compile_cache: bool = True
    """Keep compiled programs in the user's cache folder, so that a later start skips compilation."""
    trackers: tuple[Literal["tensorboard", "mlflow"], ...] = ("tensorboard",)
    """Where metrics go beside metrics.jsonl."""
    mlflow_uri: str | None = None
    """Server or database of mlflow; None: MLFLOW_TRACKING_URI, else the file mlflow.db beside the run directory."""
    mlflow_experiment: str = "moe_jax"
    """Experiment of mlflow that the run belongs to."""
    profile: str | None = None
    """START:STOP writes a jax.profiler trace of steps START to STOP-1 into the run directory; None: no trace."""


@dataclass(frozen=True)
class SampleConfig:
    max_new_tokens: Annotated[int, Range(1, 2**20)] = 200
    """Tokens to generate after the prompt, at most."""
    num_samples: Annotated[int, Range(1, 2**16)] = 1
    """Continuations of the prompt."""
    temperature: NotNegative = 0.8
    """Divides the logits: below 1 is safer, above 1 wilder; 0, or less than 0.001, takes the most likely token."""
    top_k: Count | None = None
    """Sample only among this many of the most likely tokens; None: all."""
    top_p: Fraction = 0.95
    """Sample only among the most likely tokens that together reach this probability; 1: all; 0: the first alone."""
    min_p: Fraction = 0.0
    """Sample only among tokens at least this many times as likely as the most likely one; 0: all."""
    repetition_penalty: Annotated[float, Range(0.01, 100.0)] = 1.0
    """Divides the logits of tokens that are in the text already: above 1 repeats less; 1: no penalty."""
    stop: Annotated[tuple[Text, ...], few] = ()
    """Texts before the first of which a sample ends."""
    stop_tokens: Annotated[tuple[Annotated[int, Range(0, MANY)], ...], few] = ()
    """Token ids before the first of which a sample ends, as it does before the end of a document."""
    seed: Seed = 0
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
        return section_from_dict(Config, values, source, OLD_SETTINGS)


OLD_SETTINGS: OldSettings = {
    ("model.moe.dispatch", "sorted"): ("model.moe.dispatch", "auto"),
    ("model.moe.dispatch", "tokamax"): ("model.moe.dispatch", "pallas"),
    ("model.moe.grouped_matmul", "auto"): None,
    ("model.moe.grouped_matmul", "tokamax"): ("model.moe.dispatch", "pallas"),
    **{("model.moe.grouped_matmul", name): ("model.moe.dispatch", name) for name in ("blocked", "ragged", "by_row")},
}
"""The name and value of a setting in an older run's config.json, and what it is called today; None: it is gone."""
