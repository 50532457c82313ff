"""From text of any kind to a dataset folder: python -m moe_jax.prepare."""
