"""From text of any kind to a dataset folder, in constant memory: python -m moe_jax.prepare; see --help."""

from moe_jax.errors import run


def main() -> None:
    from moe_jax.commands import prepare  # what it imports does not exist on native Windows

    prepare.main()


if __name__ == "__main__":
    run(main)
