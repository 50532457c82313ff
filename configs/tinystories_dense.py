"""The dense model that NanoGPT-MoE compares with: 12 layers of width 256, MLPs of width 1,024, on TinyStories.

Prepare the stories by a command in configs/tinystories.py (with --max-documents 30000 --val-documents 3000 for the
authors' short form), then

    python train.py --config configs/tinystories_dense.py
    python sample.py --workdir runs/tinystories_dense --prompt "Once upon a time"

10.8 M parameters, as its authors count; all else is as in configs/tinystories_moe.py.

For one GPU of 80 GB. Mixed precision is bfloat16 with float32 parameters: it has the range of float32, so float16 and
its loss scaling are not offered. 198,720 steps are six epochs of 64 stories in two microbatches, cut or padded to
1,080 tokens, with OneCycle and every block recomputed; the checkpoint of each epoch's end is kept. No minutes and no
loss are stated: the data set does not come with this package, and no GPU was at hand.
"""

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            context_length=1080,
            num_layers=12,
            embed_dim=256,
            num_heads=8,
            norm="layernorm",
            positions="learned",
            activation="relu",
            use_bias=True,
            dropout_rate=0.1,
            tie_embeddings=False,
            dtype="bfloat16",
            remat="full",
            mlp_dim=1024,
            moe=MoEConfig(num_experts=0),
        ),
        data=DataConfig(path="data/tinystories", mode="padded", batch_size=64),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            schedule="onecycle",
            warmup_steps=59_616,
            final_fraction=4e-6,
            beta2=0.999,
            weight_decay=0.01,
            clip_norm=None,
            accumulation_steps=2,
        ),
        train=TrainConfig(
            num_steps=198_720, eval_every=33_120, checkpoint_every=33_120, keep_checkpoints=6, log_every=100
        ),
    )
