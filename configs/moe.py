from moe_jax.config import Config


def get_config() -> Config:
    return Config()
