"""NanoGPT-MoE on TinyStories, as its table says: 12 layers of width 256, 8 experts of width 1,024, 2 a token.

Prepare the stories by a command in configs/tinystories.py (with --max-documents 30000 --val-documents 3000 for the
authors' short form), then

    python train.py --config configs/tinystories_moe.py
    python sample.py --workdir runs/tinystories_moe --prompt "Once upon a time"

55.0 M parameters, 17.2 M active; LayerNorm, learned positions, ReLU, noisy top-k routing and no other balance. Its
authors state 134.6 M for this table, which takes wider experts: configs/tinystories_moe_135m.py.

For one GPU of 80 GB. Mixed precision is bfloat16 with float32 parameters: it has the range of float32, so float16 and
its loss scaling are not offered. 198,720 steps are six epochs of 64 stories in two microbatches, cut or padded to
1,080 tokens, with OneCycle and every block recomputed; the checkpoint of each epoch's end is kept. No minutes and no
loss are stated: the data set does not come with this package, and no GPU was at hand. No row is dropped.
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
            moe=MoEConfig(expert_dim=1024, router="noisy_top_k", load_balancing_weight=0.0, router_z_weight=0.0),
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
            num_steps=198_720, eval_every=33_120, checkpoint_every=5_520, keep_epochs=True, log_every=100
        ),
    )
