"""makeMoE (github.com/AviSoori1x/makeMoE) as it is: Tiny Shakespeare by characters, 5,000 steps of 16 x 32 of them.

    python train.py --config configs/makemoe.py --data.path input.txt
    python sample.py --workdir runs/makemoe

input.txt is the file of that name in karpathy/char-rnn; its last tenth is held out. 8 layers of width 128, 8 experts
of which a token takes 2, noisy top-k routing, Kaiming initialisation: 9.0 M parameters, 2.7 M active. makeMoE
publishes a validation loss of 1.751 (one seed, over random windows, the router's noise left on). Here three seeds
reach 1.734 in the mean (1.724 to 1.743) at the last step; on one core of a busy machine 5,000 steps take 25 minutes.
No row is dropped.

Unlike the original, attention scores are divided by the root of the head's width instead of the model's, the noise
matrix starts at zero, biases, norms and embeddings do not decay, and the output has no bias.
--model.moe.capacity-factor 1.0 is its later version, with capacity; a context of 32 then drops a tenth of all rows
even in good balance. configs/makemoe_best.py is our own of the same size.
"""

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, SampleConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            context_length=32,
            num_layers=8,
            embed_dim=128,
            num_heads=8,
            norm="layernorm",
            positions="learned",
            activation="relu",
            use_bias=True,
            dropout_rate=0.1,
            embedding_dropout=False,
            tie_embeddings=False,
            init="kaiming",
            init_std=1.0,
            moe=MoEConfig(
                num_experts=8,
                top_k=2,
                expert_dim=512,
                router="noisy_top_k",
                load_balancing_weight=0.0,
                router_z_weight=0.0,
            ),
        ),
        data=DataConfig(tokenizer="char", val_fraction=0.1, batch_size=16),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, schedule="constant", warmup_steps=0, beta2=0.999, weight_decay=0.01, clip_norm=None
        ),
        train=TrainConfig(num_steps=5000, eval_every=1000, checkpoint_every=1000),
        sample=SampleConfig(max_new_tokens=400),
    )
