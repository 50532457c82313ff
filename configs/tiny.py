"""The smallest recipe, in seconds: does an installation work, and what does a run directory look like?

    python train.py --config configs/tiny.py
    python sample.py --workdir runs/tiny

The plays; 2 layers of width 64, 4 experts of which a token takes 2, in a context of 64: 0.2 M parameters, 0.1 M
active. 200 steps take seconds, and half a minute with the preparation of the text and compilation: validation 2.825
bits per byte at the last step. No row is dropped.
"""

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, SampleConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            context_length=64,
            num_layers=2,
            embed_dim=64,
            tie_embeddings=False,
            init_std=0.05,
            moe=MoEConfig(num_experts=4, expert_dim=64),
        ),
        data=DataConfig(tokenizer="bpe:512", val_fraction=0.01, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=20, final_fraction=0.02),
        train=TrainConfig(num_steps=200, eval_every=200, checkpoint_every=100),
        sample=SampleConfig(max_new_tokens=100),
    )
