r"""LaMoE: blocks of Llama 2, 8 experts of which a token takes 2; news, dialogue, plays, physics and encyclopedia.

Prepare the five corpora by the command in configs/five_corpora.py, which is the same in a size for a CPU; then

    python train.py --config configs/lamoe.py
    python sample.py --workdir runs/lamoe --interactive

4 layers of width 512, 8 query and 4 key/value heads, RMSNorm, rotary positions, SwiGLU experts of width 2,048, noisy
top-k routing balanced by the squared coefficient of variation of its importance, in random windows of 300 tokens:
112.2 M parameters, 36.7 M active. For one GPU of 16 GB. No minutes and no loss are stated: the data sets do not come
with this package, and no GPU was at hand. On a CPU 60 steps of 4 windows were run, in float32: from 9.0 to 7.3
nats. No row is dropped.
"""

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            context_length=300,
            num_layers=4,
            embed_dim=512,
            num_heads=8,
            num_kv_heads=4,
            tie_embeddings=False,
            dtype="bfloat16",
            moe=MoEConfig(
                expert_dim=2048,
                router="noisy_top_k",
                load_balancing_weight=0.0,
                importance_weight=0.01,
                router_z_weight=0.0,
            ),
        ),
        data=DataConfig(path="data/five_corpora", batch_size=32),
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="constant", warmup_steps=0),
        train=TrainConfig(num_steps=1000, eval_every=100, checkpoint_every=100, trackers=("tensorboard", "mlflow")),
    )
