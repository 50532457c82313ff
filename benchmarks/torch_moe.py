"""A training step of a sparse model in PyTorch, by the MoE blocks of transformers: what ``gpu.py`` compares with.

    python benchmarks/torch_moe.py [--tiny]

Qwen2-MoE in the shape of the largest model of ``gpu.py``: 14 layers of width 1280, 64 experts of width 640, 4 a token,
and a shared one, 16 sequences of 4,096 random tokens, with the loss that balances experts. All that it has more is the
shared expert's gate, one number a token. Grouped products, fused attention, fused AdamW, gradients clipped, nothing
recomputed. In its favour, parameters, gradients and optimizer state are bfloat16, half of our float32. Where 16
sequences do not fit into memory, gradients of fewer at a time add up. Prints a JSON line.
"""

import argparse
import dataclasses
import gc
import json
import statistics
import time
from typing import Any

import torch  # pyrefly: ignore[missing-import]
import transformers  # pyrefly: ignore[missing-import]


@dataclasses.dataclass(frozen=True)
class Shape:
    layers: int = 14
    heads: int = 10
    head_dim: int = 128
    experts: int = 64
    top_k: int = 4
    vocab_size: int = 16384
    context: int = 4096
    batch: int = 16

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


TINY = Shape(layers=2, heads=2, head_dim=16, experts=8, vocab_size=256, context=64, batch=4)


def make_model(shape: Shape, device: str) -> Any:
    config = transformers.Qwen2MoeConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.width // 2,  # of dense layers, of which there are none
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        qkv_bias=False,
        max_position_embeddings=shape.context,
        use_sliding_window=True,  # in none of the layers, and so wide that no mask is made for it
        sliding_window=shape.context + 1,
        max_window_layers=0,
        decoder_sparse_step=1,
        moe_intermediate_size=shape.width // 2,
        shared_expert_intermediate_size=shape.width // 2,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        tie_word_embeddings=True,
        use_cache=False,
    )
    how = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    with torch.device(device):  # drawing two billion parameters takes a CPU too long
        try:
            model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm", **how)
        except (TypeError, ValueError):  # transformers before 5 has a loop over experts alone
            model = transformers.AutoModelForCausalLM.from_config(config, **how)
    return model.train()


def measure(shape: Shape, device: str, sequences: int, deadline: float) -> dict[str, Any]:
    """The median of up to five steps of ``shape.batch`` sequences, ``sequences`` at a time; none begins too late."""
    torch.manual_seed(0)
    start = time.perf_counter()
    model = make_model(shape, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens_BL = torch.randint(shape.vocab_size, (shape.batch, shape.context), device=device)

    def step() -> float:
        begin = time.perf_counter()
        for part_BL in tokens_BL.split(sequences):
            loss = model(input_ids=part_BL, labels=part_BL).loss * (sequences / shape.batch)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    step()
    first = time.perf_counter() - start
    step()
    taken = [step()]
    while len(taken) < 5 and time.perf_counter() < deadline:
        taken.append(step())
    median = statistics.median(taken)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {
        "ms": round(1000 * median, 1),
        "tokens_per_second": round(shape.batch * shape.context / median),
        "steps": len(taken),
        "sequences_at_a_time": sequences,
        "parameters_m": round(sum(each.numel() for each in model.parameters()) / 1e6, 1),
        "parameters_and_optimizer": "bfloat16",
        "experts": getattr(model.config, "_experts_implementation", None) or "loop",
        "attention": model.config._attn_implementation,
        "process_peak_gb": round(peak / 1e9, 2),
        "first_step_s": round(first, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a small shape, to try the command on a CPU")
    parser.add_argument("--seconds", type=float, default=40.0, help="begin no further step after these")
    arguments = parser.parse_args()
    shape, device = TINY if arguments.tiny else Shape(), "cuda" if torch.cuda.is_available() else "cpu"
    deadline = time.perf_counter() + arguments.seconds
    row, sequences = None, shape.batch
    while row is None and sequences:
        try:
            row = measure(shape, device, sequences, deadline)
        except torch.OutOfMemoryError:
            sequences //= 2
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    if row is None:
        row = {"error": "one sequence does not fit into memory"}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"what": f"{shape.layers} layers, {shape.heads} heads, Qwen2-MoE"} | row | versions), flush=True)


if __name__ == "__main__":
    main()
