r"""TinyStories (arXiv 2305.07759): 2.1 million stories for children, in packed rows that keep them apart.

Prepare it once, by name (the extra "hub": pip install 'datasets>=4'; it downloads 1 GB),

    python -m moe_jax.prepare --out data/tinystories --tokenizer bpe:2048 --delimiters chat \
      --input hf:roneneldan/TinyStories --val-input hf:roneneldan/TinyStories:validation

or from its parquet files (the extra "text": pip install 'pyarrow>=20'),

    python -m moe_jax.prepare --out data/tinystories --tokenizer bpe:2048 --delimiters chat \
      --input "TinyStories/data/train-*.parquet" --val-input "TinyStories/data/validation-*.parquet"

and train:

    python train.py --config configs/tinystories.py

<|im_start|> stands before each story and <|im_end|> after it, as NanoGPT-MoE has them; sampling starts at the one and
ends at the other. 4 layers of width 128, 8 experts of which a token takes 2: 3.9 M parameters, 1.6 M active, in a
context of 256. No loss is stated: the data set does not come with this package, and the recipe was run on stand-ins of
its format only. No row is dropped.
"""

from moe_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            context_length=256,
            qk_norm=True,
            tie_embeddings=False,
            init_std=0.05,
            scan_unroll=4,
        ),
        data=DataConfig(path="data/tinystories", mode="packed", batch_size=16),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100, final_fraction=0.02),
        train=TrainConfig(num_steps=5000, eval_every=1000, checkpoint_every=500),
    )
