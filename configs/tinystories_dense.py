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

import dataclasses
from pathlib import Path

from moe_jax.cli import load_recipe
from moe_jax.config import Config


def get_config() -> Config:
    config = load_recipe(Path(__file__).with_name("tinystories_moe.py"))
    moe = dataclasses.replace(config.model.moe, num_experts=0)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe, mlp_dim=1024))
