"""NanoGPT-MoE on TinyStories, as its count says: experts of width 2,640 instead of the 1,024 of its table.

Prepare the stories by a command in configs/tinystories.py (with --max-documents 30000 --val-documents 3000 for the
authors' short form), then

    python train.py --config configs/tinystories_moe_135m.py
    python sample.py --workdir runs/tinystories_moe_135m --prompt "Once upon a time"

134.6 M parameters, 37.1 M active. The authors' table (8 experts, four times the width of 256) makes 55.0 M, their
count is 134.6 M: the two disagree, and this is the model of the count. All else is as in configs/tinystories_moe.py.

For one GPU of 80 GB. Mixed precision is bfloat16 with float32 parameters: it has the range of float32, so float16 and
its loss scaling are not offered. 198,720 steps are six epochs of 64 stories in two microbatches, cut or padded to
1,080 tokens, with OneCycle and every block recomputed; the checkpoint of each epoch's end is kept. No minutes and no
loss are stated: the data set does not come with this package, and no GPU was at hand. @STEP No row is dropped.
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
            moe=MoEConfig(expert_dim=2640, router="noisy_top_k", load_balancing_weight=0.0, router_z_weight=0.0),
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
