"""Characters of Tiny Shakespeare in a context of 64, the setting of nanoGPT's recipe for a CPU.

    python train.py --config configs/tiny_shakespeare.py --data.path input.txt

input.txt is the file of that name in karpathy/char-rnn; its last tenth is held out. 3.4 M parameters, 1.1 M active. On
two cores 550 steps of 1,024 characters take 1.1 minutes, and 1.5 with compilation (8 s) and an evaluation: validation
1.821 nats per character at the last step; nanoGPT's recipe publishes 1.88 for about 3 minutes on a CPU. No row is
dropped.
"""

from moe_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, SampleConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            context_length=64,
            qk_norm=True,
            tie_embeddings=False,
            init_std=0.05,
            scan_unroll=4,
        ),
        data=DataConfig(tokenizer="char", val_fraction=0.1, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=60, final_fraction=0.02),
        train=TrainConfig(num_steps=550, eval_every=550, checkpoint_every=275),
        sample=SampleConfig(max_new_tokens=400),
    )
