"""The size and sparsity of DeepSeek-V3 (arXiv 2412.19437): 256 experts of which a token takes 8, and a shared one.

Prepare text once, with a tokenizer of 129,280 tokens, then train on 1,024 GPUs of 80 GB:

    python -m moe_jax.prepare --input text/ --tokenizer tokenizer.json --out data/corpus_129k
    python train.py --config configs/moe_671b.py --mesh.fsdp 128 --mesh.expert 8

61 layers of width 7,168, the first three dense: 666776.7 M parameters, 33302.6 M active. Experts, routing by groups,
the bias that balances it, batch, learning rate and initialisation are those of the paper. Attention is not: 56 query
and 8 key/value heads of 128 channels stand for its multi-head latent attention, which makes up most of what is missing
from its 671 B and 37 B. Left out are its second prediction head and its arithmetic in 8 bits, and experts have a
capacity: 1.25 times their share of a sequence, where the paper drops no row. No minutes and no loss are stated: it was
compiled for such GPUs, not run (docs/scaling.md).
"""

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            context_length=4096,
            num_layers=61,
            embed_dim=7168,
            num_heads=56,
            num_kv_heads=8,
            mlp_dim=18432,
            tie_embeddings=False,
            init_std=0.006,
            dtype="bfloat16",
            remat="full",
            moe=MoEConfig(
                num_experts=256,
                top_k=8,
                expert_dim=2048,
                num_shared_experts=1,
                first_dense=3,
                router="sigmoid_bias",
                num_expert_groups=8,
                top_k_groups=4,
                routed_scaling_factor=2.5,
                capacity_factor=1.25,
                load_balancing_weight=1e-4,
                router_z_weight=0.0,
            ),
        ),
        data=DataConfig(path="data/corpus_129k", batch_size=15360),
        optimizer=OptimizerConfig(learning_rate=2.2e-4, warmup_steps=2000, accumulation_steps=3),
        train=TrainConfig(num_steps=235_000, eval_every=1000, checkpoint_every=250),
    )
