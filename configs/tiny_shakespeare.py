"""Characters of Tiny Shakespeare in a context of 64, as nanoGPT's recipe for a processor has it."""

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, SampleConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            context_length=64,
            num_layers=4,
            embed_dim=128,
            num_heads=4,
            qk_norm=True,
            tie_embeddings=False,
            scan_unroll=4,
            moe=MoEConfig(num_experts=8, top_k=2, expert_dim=256, capacity_factor=2.0),
        ),
        data=DataConfig(tokenizer="char", val_fraction=0.1, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=60, final_fraction=0.02),
        train=TrainConfig(num_steps=700, eval_every=350, checkpoint_every=350),
        sample=SampleConfig(max_new_tokens=400),
    )
