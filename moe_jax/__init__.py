"""Sparse Mixture-of-Experts language models in JAX/Flax: prepare text, train, look inside, sample."""

__version__ = "0.1.0"

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from moe_jax.sampling.api import Model


def load(
    workdir: str | Path,
    checkpoint: Literal["best", "newest"] = "best",
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> "Model":
    """The trained model of the run directory ``workdir``, to generate text with. Raises UserError.

    ``checkpoint`` is that of the lowest validation loss, or the newest; ``dtype`` that of activations and matrices,
    None: as the run was trained.
    """
    # Only here: importing the package stays quick and starts no jax.
    from moe_jax.sampling.api import load_model

    return load_model(workdir, checkpoint, dtype)
