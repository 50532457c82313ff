"""Score a trained model: python -m moe_jax.evaluate --workdir runs/moe [--data DIR]; see --help."""

from moe_jax.commands.evaluate import main
from moe_jax.errors import run

if __name__ == "__main__":
    run(main)
