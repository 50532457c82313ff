"""makeMoE."""

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, SampleConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            context_length=32,
            num_layers=8,
            embed_dim=128,
            num_heads=8,
            norm="layernorm",
            positions="learned",
            activation="relu",
            use_bias=True,
            dropout_rate=0.1,
            tie_embeddings=False,
            init="kaiming",
            init_std=1.0,
            moe=MoEConfig(
                num_experts=8,
                top_k=2,
                expert_dim=512,
                router="noisy_top_k",
                load_balancing_weight=0.0,
                router_z_weight=0.0,
            ),
        ),
        data=DataConfig(tokenizer="char", val_fraction=0.1, batch_size=16),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=0, final_fraction=1.0, beta2=0.999, weight_decay=0.01, clip_norm=None
        ),
        train=TrainConfig(num_steps=5000, eval_every=1000, checkpoint_every=1000),
        sample=SampleConfig(max_new_tokens=400),
    )
