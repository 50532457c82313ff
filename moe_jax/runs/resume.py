"""Whether a run may be resumed: with these settings, on this text. Imports no jax."""

from moe_jax.config import Config, DataConfig
from moe_jax.config.fields import settings
from moe_jax.data.dataset import Dataset
from moe_jax.errors import UserError
from moe_jax.runs.checkpoint.record import Record


def check_same_run(saved: Config, config: Config) -> None:
    """UserError unless ``config`` may go on with the run begun as ``saved``: it names every field that may not change.

    Free to change are mesh.*, sample.*, train.* but the seed, the number of microbatches, and data.path (whose content
    is compared by its fingerprint). optimizer.decay_steps and train.init_from stay what they were where they are None.
    """
    before = {name: value for name, _, value in settings(saved)}
    changes = [
        f"{name} was {before[name]}, now {value}"
        for name, _, value in settings(config)
        if _is_fixed(name, value) and value != before[name]
    ]
    if changes:
        raise UserError(
            "a run cannot go on with other settings: "
            + "; ".join(changes)
            + "; use the old values, or start a new run in another --workdir"
        )


def _is_fixed(name: str, value: object) -> bool:
    if name in ("data.path", "optimizer.accumulation_steps"):
        return False
    if name in ("optimizer.decay_steps", "train.init_from"):
        return value is not None
    return name == "train.seed" or name.startswith(("model.", "data.", "optimizer."))


def check_same_text(record: Record, config: DataConfig, dataset: Dataset) -> None:
    """UserError where a checkpoint was trained on other text: its vocabulary, too, would be another."""
    before = record.progress["data_fingerprint"]
    if before != dataset.fingerprint:
        text = "the text of the embedded plays" if config.path is None else f"the text of {config.path}"
        raise UserError(
            f"{text} is not the one this run was trained on (fingerprint {dataset.fingerprint}, was {before}); "
            "name the old text, or start a new run in another --workdir"
        )
