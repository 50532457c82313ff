"""The default: a sparse Mixture-of-Experts model that learns Shakespeare's plays on a laptop's CPU.

    python train.py --config configs/moe.py
    python sample.py --workdir runs/moe

2 layers of width 128, 8 experts of which a token takes 2: 2.2 M parameters, 1.1 M active. 1,260 steps of 2,048 tokens:
validation 2.044 bits per byte (4.121 nats per token) at the last step, the busiest expert of any layer at 1.10 times
its share. On two cores four minutes, or six where they are slow. No row is dropped. More layers learn less in that
time (docs/results.md).
"""

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            num_layers=2,
            qk_norm=True,
            tie_embeddings=False,
            init_std=0.05,
            scan_unroll=2,
            moe=MoEConfig(load_balancing_weight=0.05),
        ),
        data=DataConfig(batch_size=16),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=60, final_fraction=0.02, weight_decay=0.5),
        train=TrainConfig(num_steps=1260, eval_every=420, checkpoint_every=420),
    )
