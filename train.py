"""Train a model: python train.py --config configs/moe.py [--workdir runs/moe] [--section.field value ...]."""

import sys

from moe_jax import command


def main() -> None:
    from moe_jax.command_line import parse_train

    config, workdir = parse_train(sys.argv[1:])
    command.use_huge_pages()

    from moe_jax.training.run import train

    train(config, workdir)


if __name__ == "__main__":
    command.run(main)
