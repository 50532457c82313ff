"""Whether settings, text and tokenizer are those that a checkpoint was made with. Imports no jax."""

from collections.abc import Callable

from moe_jax.config import Config, DataConfig
from moe_jax.config.fields import settings
from moe_jax.data.dataset import Dataset
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.tokenizer_file import fingerprint
from moe_jax.errors import UserError
from moe_jax.runs.checkpoint.record import Record
from moe_jax.runs.layout import RunDirectory


def check_same_run(saved: Config, config: Config) -> None:
    """UserError unless ``config`` may go on with the run begun as ``saved``: it names every field that may not change.

    Free to change are mesh.*, sample.*, train.* but the seed, the number of microbatches, and data.path (whose content
    is compared by its fingerprint). optimizer.decay_steps and train.init_from stay what they were where they are None.
    """
    changes = _changes(saved, config, _is_fixed)
    if changes:
        raise UserError(
            f"a run cannot go on with other settings: {changes}; use the old values, or start a new run in another "
            "--workdir"
        )


def check_same_model(record: Record, run: RunDirectory, config: Config, tokenizer: Tokenizer) -> None:
    """UserError unless ``config`` and ``tokenizer``, read from ``run``, are those that the checkpoint was made with.

    Checksums protect the checkpoint alone. Free are the settings that decide no number, or only how it is computed on
    a machine.
    """
    saved = Config.from_dict(record.config, str(run.checkpoints))
    changes = _changes(saved, config, lambda name, _: name.startswith(("model.", "data.")) and name not in _HOW)
    if changes:
        raise UserError(
            f"{run.config_file} is not the one that the checkpoint was made with: {changes}; put the old values back"
        )
    if record.tokenizer is not None and record.tokenizer != fingerprint(tokenizer):
        raise UserError(
            f"the tokenizer in {run.tokenizer} is not the one that the checkpoint was made with; put a copy of that "
            "back, or run the same train.py command again, which writes it"
        )


_HOW = frozenset(
    {"data.path", "data.batch_size", "model.attention", "model.remat", "model.scan_unroll", "model.moe.dispatch"}
)


def _changes(saved: Config, config: Config, is_compared: Callable[[str, object], bool]) -> str:
    before = {name: value for name, _, value in settings(saved)}
    return "; ".join(
        f"{name} was {before[name]}, now {value}"
        for name, _, value in settings(config)
        if is_compared(name, value) and value != before[name]
    )


def _is_fixed(name: str, value: object) -> bool:
    if name in ("data.path", "optimizer.accumulation_steps"):
        return False
    if name in ("optimizer.decay_steps", "train.init_from"):
        return value is not None
    return name == "train.seed" or name.startswith(("model.", "data.", "optimizer."))


def check_same_text(record: Record, config: DataConfig, dataset: Dataset) -> None:
    """UserError where a checkpoint was trained on other text: its vocabulary, too, would be another."""
    before = record.progress.get("data_fingerprint")
    if before != dataset.fingerprint:
        text = "the text of the embedded plays" if config.path is None else f"the text of {config.path}"
        raise UserError(
            f"{text} is not the one this run was trained on (fingerprint {dataset.fingerprint}, was {before}); "
            "name the old text, or start a new run in another --workdir"
        )
