r"""A mixture of five corpora of different kinds, in the manner of LaMoE: news, dialogue, plays, physics, encyclopedia.

LaMoE's own are Kaggle data sets: pariza/bbc-news-summary, divaxshah/avengers-and-iron-man-movies-dataset,
kingburrito666/shakespeare-plays, judehunt23/llm-science-exam-training-data-wiki-pages and
ffatty/plaintext-wikipedia-full-english. Unpack them under these names, or put others in their place, and prepare
them once; --text-key names the column of each CSV file that holds the text (the error lists the columns):

    python -m moe_jax.prepare --out data/five_corpora --tokenizer bpe:8192 --errors replace \
      --input news=text/bbc dialogue=text/avengers.csv plays=plays: physics=text/physics.csv wiki=text/wikipedia \
      --text-key dialogue=dialogue physics=text wiki=text \
      --weights news=2 dialogue=1 plays=2 physics=2 wiki=3

    python train.py --config configs/five_corpora.py

The plays are those that come with the installation, whole, instead of single lines of a CSV file. Weights are shares
of the training rows, whatever the sizes of the corpora; validation reports each one's loss and that of all. RMSNorm,
rotary positions, grouped-query attention and SwiGLU experts, as LaMoE has them, in a size for a CPU: 4 layers of width
128, 8 experts of which a token takes 2: 5.4 M parameters, in random windows of 256 tokens. No loss is stated: the data
sets do not come with this package, and the recipe was run on stand-ins of their format only. No row is dropped.
"""

from moe_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            context_length=256,
            num_heads=8,
            num_kv_heads=4,
            tie_embeddings=False,
            init_std=0.05,
            scan_unroll=4,
        ),
        data=DataConfig(path="data/five_corpora", batch_size=16),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100, final_fraction=0.02),
        train=TrainConfig(num_steps=5000, eval_every=1000, checkpoint_every=500),
    )
