"""From text to token streams on disk, in constant memory: python -m moe_jax.prepare --help."""

from moe_jax.errors import run


def main() -> None:
    from moe_jax.prepare import command

    command.main()


if __name__ == "__main__":
    run(main)
