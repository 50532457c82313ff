"""The default: a sparse Mixture-of-Experts model that learns Shakespeare's plays on a laptop's processor."""

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            context_length=128,
            num_layers=4,
            embed_dim=128,
            num_heads=4,
            qk_norm=True,
            tie_embeddings=False,
            scan_unroll=4,
            moe=MoEConfig(num_experts=8, top_k=2, expert_dim=256, capacity_factor=1.5),
        ),
        data=DataConfig(tokenizer="bpe:2048", batch_size=8),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=60, final_fraction=0.02),
        train=TrainConfig(num_steps=1200, eval_every=400, checkpoint_every=400),
    )
