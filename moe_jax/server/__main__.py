"""Serve a trained model: python -m moe_jax.server [--workdir runs/moe]; see --help, and docs/serving.md."""

from moe_jax.commands.server import main
from moe_jax.errors import run

if __name__ == "__main__":
    run(main)
