"""The dense model of the same active parameters as configs/moe.py, for comparison."""

import dataclasses
from pathlib import Path

from moe_jax.command_line import load_recipe
from moe_jax.config import Config


def get_config() -> Config:
    config = load_recipe(Path(__file__).with_name("moe.py"))
    moe = dataclasses.replace(config.model.moe, num_experts=0)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
