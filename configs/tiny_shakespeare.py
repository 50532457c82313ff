"""Characters of Tiny Shakespeare in a context of 64, the setting of nanoGPT's recipe for a processor.

    python train.py --config configs/tiny_shakespeare.py --data.path input.txt

@TINY@
"""

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, SampleConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            context_length=64,
            qk_norm=True,
            tie_embeddings=False,
            init_std=0.05,
            scan_unroll=4,
            moe=MoEConfig(capacity_factor=2.0),
        ),
        data=DataConfig(tokenizer="char", val_fraction=0.1, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=60, final_fraction=0.02),
        train=TrainConfig(num_steps=700, eval_every=350, checkpoint_every=350),
        sample=SampleConfig(max_new_tokens=400),
    )
