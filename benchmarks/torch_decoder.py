"""The decoder of this package in PyTorch, without a cache: what a small MoE repository does for each token.

Not a benchmark of its own: ``sampling.py`` runs it where torch is installed, on the same parameters.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # pyrefly: ignore[missing-import]
from torch.nn import functional  # pyrefly: ignore[missing-import]

from moe_jax.config import ModelConfig

Weights = dict[str, Any]


def as_tensors(params: Any) -> Weights:
    """The tree of arrays ``params`` as tensors."""
    if isinstance(params, dict):
        return {name: as_tensors(value) for name, value in params.items()}
    return torch.from_numpy(np.array(params))


def logits_of(config: ModelConfig, weights: Weights, tokens_BL: torch.Tensor) -> torch.Tensor:
    """[B, L, V], by a full forward pass; for rotary positions, RMSNorm, relu experts and the router ``top_k``."""
    x_BLD = weights["embedding"][tokens_BL]
    for layer in range(config.num_layers):
        block = weights[f"layer_{layer}"]
        x_BLD = x_BLD + _attention(config, block["attention"], _norm(x_BLD, block["attention_norm"]))
        x_BLD = x_BLD + _experts(config, block["moe"], _norm(x_BLD, block["mlp_norm"]))
    output_DV = weights["embedding"].T if config.tie_embeddings else weights["output"]
    return _norm(x_BLD, weights["final_norm"]) @ output_DV


def continue_texts(
    config: ModelConfig, weights: Weights, prompt_BL: torch.Tensor, num_tokens: int, temperature: float
) -> torch.Tensor:
    """``num_tokens`` more after each prompt, each drawn from a forward pass of the last tokens."""
    text_BL = prompt_BL
    with torch.inference_mode():
        for _ in range(num_tokens):
            logits_BV = logits_of(config, weights, text_BL[:, -config.context_length :])[:, -1]
            token_B1 = torch.multinomial(torch.softmax(logits_BV / temperature, dim=-1), 1)
            text_BL = torch.cat([text_BL, token_B1], dim=1)
    return text_BL


def _norm(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    return functional.rms_norm(x, x.shape[-1:], weights["scale"], 1e-6)


def _attention(config: ModelConfig, weights: Weights, x_BLD: torch.Tensor) -> torch.Tensor:
    B, L, D = x_BLD.shape
    H = config.num_heads
    A = D // H
    angle_LA = torch.arange(L)[:, None] * config.rope_theta ** (-torch.arange(0, A, 2) / A)
    cos, sin = angle_LA.cos(), angle_LA.sin()

    def heads(name: str) -> torch.Tensor:
        return (x_BLD @ weights[name]).view(B, L, H, A).transpose(1, 2)

    def rotated(x_BHLA: torch.Tensor) -> torch.Tensor:
        first, second = x_BHLA.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    y_BHLA = functional.scaled_dot_product_attention(
        rotated(heads("query")), rotated(heads("key")), heads("value"), is_causal=True
    )
    return y_BHLA.transpose(1, 2).reshape(B, L, D) @ weights["out"]


def _experts(config: ModelConfig, weights: Weights, x_BLD: torch.Tensor) -> torch.Tensor:
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    top_logits_TK, expert_TK = torch.topk(x_TD @ weights["router"], config.moe.top_k)
    weight_TK = torch.softmax(top_logits_TK, dim=-1)
    y_TD = torch.zeros_like(x_TD)
    for expert in range(config.moe.num_experts):
        token_R, choice_R = torch.where(expert_TK == expert)
        hidden_RF = torch.relu(x_TD[token_R] @ weights["w_up"][expert])
        y_RD = (hidden_RF @ weights["w_down"][expert]) * weight_TK[token_R, choice_R, None]
        y_TD.index_add_(0, token_R, y_RD)
    return y_TD.view(x_BLD.shape)


def is_of_this_kind(config: ModelConfig) -> bool:
    """Whether ``logits_of`` is for such a model."""
    return (
        config.activation == "relu"
        and (config.positions, config.norm, config.moe.router) == ("rotary", "rmsnorm", "top_k")
        and config.moe.num_experts > 0
        and config.num_kv_heads in (None, config.num_heads)
        and not (config.qk_norm or config.use_bias or config.moe.num_shared_experts)
        and (config.moe.every, config.moe.first_dense, config.dtype) == (1, 0, "float32")
    )


def loop(
    config: ModelConfig, params: Any, prompt_BL: np.ndarray, logits_BLV: np.ndarray, temperature: float
) -> Callable[[int], None]:
    """A function that draws so many tokens after ``prompt_BL``, whose logits must be ``logits_BLV``."""
    weights, prompt = as_tensors(params), torch.from_numpy(prompt_BL.astype(np.int64))
    np.testing.assert_allclose(logits_of(config, weights, prompt).numpy(), logits_BLV, atol=1e-4)

    def draw(num_tokens: int) -> None:
        continue_texts(config, weights, prompt, num_tokens, temperature)

    return draw
