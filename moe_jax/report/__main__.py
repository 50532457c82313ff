"""Draw the pictures of a run again: python -m moe_jax.report --workdir runs/moe; see --help."""

from moe_jax.commands.report import main
from moe_jax.errors import run

if __name__ == "__main__":
    run(main)
