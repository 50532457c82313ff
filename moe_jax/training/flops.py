"""Parameters and operations of a model, and the share of the hardware's peak that a run reaches."""

import jax

from moe_jax.axes import PyTree
from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.model.moe.routing import ROUTERS
from moe_jax.training.optimizer import MATRICES

PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
"""Dense bfloat16 operations a second by ``device_kind``, from the makers' data sheets (without sparsity)."""


def count_params(params: PyTree, moe: MoEConfig) -> tuple[int, int]:
    """(total, active) parameters: active are those touched for one token, K of E experts in each MoE layer."""
    total = active = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        total += leaf.size
        active += _active_size(path, leaf, moe)
    return total, active


def flops_per_token(params: PyTree, model: ModelConfig) -> int:
    """Operations of one token's forward and backward pass: 6 · P + 12 · N · H · A · L (arXiv 2204.02311, appendix B).

    P counts the active entries of matrices, the output's too where it is the embedding. Looking up embeddings, norms
    and biases count nothing; nor does what a run computes beyond that: a recomputed forward pass, rows that pad an
    expert's capacity, router noise. Attention counts all L keys of each query, as the paper does, though half of them
    are masked. Experts that choose take K · capacity_factor rows a token on average.
    """
    matrices = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key in MATRICES - {"router_noise"}:
            matrices += _active_size(path, leaf, model.moe)
    if model.tie_embeddings:
        matrices += params["embedding"].size
    return 6 * matrices + 12 * model.num_layers * model.embed_dim * model.context_length


def _active_size(path: tuple, leaf: jax.Array, moe: MoEConfig) -> int:
    keys = [part.key for part in path]
    if "moe" not in keys or "shared" in keys or keys[-1].startswith("router"):
        return leaf.size
    rows = moe.top_k * (moe.capacity_factor or 1.0) if ROUTERS[moe.router].has_own_capacity else moe.top_k
    return round(leaf.size * min(rows / moe.num_experts, 1.0))


def utilisation(flops_per_second: float, device_kind: str, num_devices: int) -> float | None:
    """Model FLOPs utilisation (MFU): the share of the devices' bfloat16 peak; None for a device without an entry."""
    peak = PEAK_FLOPS.get(device_kind)
    return None if peak is None else flops_per_second / (peak * num_devices)
