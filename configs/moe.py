"""The default: a sparse Mixture-of-Experts model that learns Shakespeare's plays on a laptop's processor.

    python train.py --config configs/moe.py
    python sample.py --workdir runs/moe

@MOE@
"""

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            qk_norm=True, tie_embeddings=False, init_std=0.05, scan_unroll=4, moe=MoEConfig(capacity_factor=1.5)
        ),
        data=DataConfig(batch_size=8),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=60, final_fraction=0.02),
        train=TrainConfig(num_steps=1200, eval_every=400, checkpoint_every=400),
    )
