"""Sample text from a trained model: python sample.py [--workdir runs/moe] [--prompt "..."]; see --help."""

from moe_jax.commands.sample import main
from moe_jax.errors import run

if __name__ == "__main__":
    run(main)
