"""Many small experts: 64 of which a token takes 8, and one that every token takes, balanced by a bias (DeepSeek-V3).

    python train.py --config configs/fine_grained.py
    python sample.py --workdir runs/fine_grained

The plays, as wide as configs/moe.py: 4 layers of width 128, 6.4 M parameters, 1.6 M active. Scores are sigmoids; a
bias that each step moves by a fixed rate keeps the load even, so no auxiliary loss is needed. The learning rate stays
at its peak and falls in the last fifth (warm-up, stable, decay). On one core of a busy machine 1,200 steps of 1,024
tokens take 7.6 minutes: validation 2.095 bits per byte (4.224 nats per token) at the last step. No row is dropped.
"""

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            qk_norm=True,
            tie_embeddings=False,
            init_std=0.05,
            scan_unroll=4,
            moe=MoEConfig(
                num_experts=64,
                top_k=8,
                expert_dim=56,
                num_shared_experts=1,
                router="sigmoid_bias",
                load_balancing_weight=0.0,
                router_z_weight=0.0,
            ),
        ),
        data=DataConfig(batch_size=8),
        optimizer=OptimizerConfig(learning_rate=4e-3, schedule="wsd", warmup_steps=60, final_fraction=0.02),
        train=TrainConfig(num_steps=1200, eval_every=400, checkpoint_every=400),
    )
