"""Mixtral 8x7B (arXiv 2401.04088): 32 layers of width 4,096, 8 experts of which a token takes 2.

Prepare text once, with a tokenizer of 32,000 tokens, then train on 64 GPUs of 80 GB:

    python -m moe_jax.prepare --input text/ --tokenizer tokenizer.json --out data/corpus_32k
    python train.py --config configs/mixtral_8x7b.py --mesh.fsdp 64

46702.8 M parameters, 12879.9 M active. The shape is that of the paper; the batch (4.2 M tokens), the learning rate
and the schedule are ours, as it gives none. The context is 4,096 tokens, of the 32,768 that the published model
reads. No minutes and no loss are stated: it was compiled for such GPUs, not run (docs/scaling.md has what each would
hold and exchange, and scripts that start it). No row is dropped.
"""

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            context_length=4096,
            num_layers=32,
            embed_dim=4096,
            num_heads=32,
            num_kv_heads=8,
            rope_theta=1e6,
            tie_embeddings=False,
            dtype="bfloat16",
            remat="full",
            moe=MoEConfig(expert_dim=14336),
        ),
        data=DataConfig(path="data/corpus_32k", batch_size=1024),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
        train=TrainConfig(num_steps=250_000, eval_every=1000, checkpoint_every=250),
    )
