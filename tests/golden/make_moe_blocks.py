"""Writes moe_blocks.npz: the sparse MoE blocks of Hugging Face transformers on random weights and tokens.

``pip install torch 'transformers>=5.20'``, then ``python tests/golden/make_moe_blocks.py``. The file was made with
torch 2.13.0 and transformers 5.23.0 on a CPU. Everything is float32, and NumPy draws the random numbers.

Keys are "family/name". ``x`` and ``y`` are the block's input and output, [T, D]. The rest are its weights, in the
layout of ``moe_jax.model.moe.layer.MoE``: ``router`` [D, E], ``w_gate`` and ``w_up`` [E, D, F], ``w_down`` [E, F, D].
DeepSeek adds ``expert_bias`` [E] and, for S shared experts, ``shared_w_gate`` and ``shared_w_up`` [D, S·F] and
``shared_w_down`` [S·F, D].
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DeepseekV3Config, MixtralConfig, OlmoeConfig, PreTrainedConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

T, D, F = 20, 14, 12
MARGIN = 1e-3  # between a chosen and a refused score: far more than rounding changes

COMMON: dict[str, Any] = {"hidden_size": D, "experts_implementation": "eager"}
TOP_2_OF_8: dict[str, Any] = {**COMMON, "num_experts": 8, "num_experts_per_tok": 2}
QWEN3: dict[str, Any] = {**TOP_2_OF_8, "moe_intermediate_size": F}
FAMILIES: dict[str, tuple[type[torch.nn.Module], PreTrainedConfig]] = {
    "mixtral": (MixtralSparseMoeBlock, MixtralConfig(**TOP_2_OF_8, intermediate_size=F)),
    "olmoe": (OlmoeSparseMoeBlock, OlmoeConfig(**TOP_2_OF_8, intermediate_size=F, norm_topk_prob=False)),
    "qwen3_moe": (Qwen3MoeSparseMoeBlock, Qwen3MoeConfig(**QWEN3, norm_topk_prob=True)),
    "qwen3_moe_unnormalised": (Qwen3MoeSparseMoeBlock, Qwen3MoeConfig(**QWEN3, norm_topk_prob=False)),
    "deepseek_v3": (
        DeepseekV3MoE,
        DeepseekV3Config(
            **COMMON,
            moe_intermediate_size=F,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_group=4,  # of four experts each: the two best, which a group is judged by, are only half of it
            topk_group=2,
            n_shared_experts=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        ),
    ),
}


def blocks(seed: int) -> dict[str, np.ndarray]:
    """Every family's input, output and weights."""
    arrays = {}
    for index, (family, (block_class, config)) in enumerate(FAMILIES.items()):
        rng = np.random.default_rng([seed, index])
        block = block_class(config).eval()
        state = {name: draw(name, tuple(old.shape), rng) for name, old in sorted(block.state_dict().items())}
        block.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
        ours = our_layout(state)
        x_TD = rng.standard_normal((4 * T, D), np.float32)
        x_TD = x_TD[is_clear(x_TD, ours, config)][:T]
        assert len(x_TD) == T, f"{family}: too many near ties"
        with torch.no_grad():
            y_TD = block(torch.from_numpy(x_TD)[None])[0].numpy()
        arrays |= {f"{family}/{name}": array for name, array in {"x": x_TD, "y": y_TD, **ours}.items()}
    return arrays


def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A random weight. A matrix is [..., out, in] and makes the spread 1.5 times as wide: outputs are of order one."""
    if name == "gate.e_score_correction_bias":
        return rng.uniform(-0.3, 0.3, shape).astype(np.float32)
    return rng.standard_normal(shape, np.float32) * np.float32(1.5 / shape[-1] ** 0.5)


def our_layout(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """transformers keeps matrices as [..., out, in], and an expert's gate and up as one: gate first."""
    ours = {"router": state["gate.weight"].T, "w_down": state["experts.down_proj"].swapaxes(1, 2)}
    ours["w_gate"], ours["w_up"] = np.split(state["experts.gate_up_proj"].swapaxes(1, 2), 2, axis=2)
    if "gate.e_score_correction_bias" in state:
        ours["expert_bias"] = state["gate.e_score_correction_bias"]
        ours |= {f"shared_w_{name}": state[f"shared_experts.{name}_proj.weight"].T for name in ("gate", "up", "down")}
    return ours


def is_clear(x_TD: np.ndarray, ours: dict[str, np.ndarray], config: PreTrainedConfig) -> np.ndarray:
    """[T] bool: whether rounding cannot change which groups and which experts a token chooses."""
    logits_TE = x_TD @ ours["router"]
    if "expert_bias" not in ours:
        probs_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(axis=1, keepdims=True)
        return gap(probs_TE, config.num_experts_per_tok) > MARGIN
    score_TE = 1 / (1 + np.exp(-logits_TE)) + ours["expert_bias"]
    score_TNM = score_TE.reshape(len(x_TD), config.n_group, -1)  # N groups of M experts
    group_TN = np.sort(score_TNM, axis=2)[..., -2:].sum(axis=2)
    chosen_TN = group_TN >= np.sort(group_TN, axis=1)[:, [-config.topk_group]]
    # Some give the experts of refused groups 0, some -inf: the same where every chosen score is above these zeros.
    score_TE = np.where(chosen_TN[..., None], score_TNM, 0).reshape(logits_TE.shape)
    return (gap(group_TN, config.topk_group) > MARGIN) & (gap(score_TE, config.num_experts_per_tok) > MARGIN)


def gap(score_TE: np.ndarray, k: int) -> np.ndarray:
    """[T]: the k-th highest score minus the next."""
    descending_TE = -np.sort(-score_TE, axis=1)
    return descending_TE[:, k - 1] - descending_TE[:, k]


if __name__ == "__main__":
    torch.set_num_threads(1)
    np.savez_compressed(Path(__file__).with_name("moe_blocks.npz"), allow_pickle=False, **blocks(seed=0))
