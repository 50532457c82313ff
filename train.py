"""Train a model: python train.py --config configs/moe.py [--workdir runs/moe] [--section.field value ...]."""

from moe_jax.commands.train import main
from moe_jax.errors import run

if __name__ == "__main__":
    run(main)
