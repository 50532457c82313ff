"""What a training needs of each device: python -m moe_jax.estimate --config configs/moe.py; see --help."""

from moe_jax.commands.estimate import main
from moe_jax.errors import run

if __name__ == "__main__":
    run(main)
