"""The files of a run directory, written whole or not at all. Imports no jax."""

import dataclasses
import json
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from moe_jax.config import Config
from moe_jax.config.fields import settings
from moe_jax.config.rules import check
from moe_jax.errors import UserError
from moe_jax.files import atomic_write_text, locked_folder, refuse_locked_folder


@dataclass(frozen=True)
class RunDirectory:
    """Names of everything in the run directory ``path``; creates nothing by itself."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log_file(self) -> Path:
        return self.path / "train.log"

    @property
    def stacks(self) -> Path:
        return self.path / "stacks.log"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def mlflow_file(self) -> Path:
        return self.path / "mlflow.json"

    @property
    def loss_curve(self) -> Path:
        return self.path / "loss_curve.png"

    @property
    def expert_load(self) -> Path:
        return self.path / "expert_load.png"

    @property
    def generated_text(self) -> Path:
        return self.path / "generated_text.txt"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    def save_config(self, config: Config) -> None:
        atomic_write_text(self.config_file, json.dumps(config.to_dict(), indent=2) + "\n")

    def load_config(self) -> Config:
        """The validated configuration of the run. UserError where it is missing, damaged or of other settings."""
        file = self.config_file
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{self.path} is not a run directory (it has no config.json); "
                "train one with train.py, or name another by --workdir"
            ) from None
        except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
            raise UserError(f"{file} is corrupt ({error}); put a copy of it back, or name another --workdir") from None
        config = Config.from_dict(values, str(file))
        data = config.data
        if isinstance(data.tokenizer, str):
            # The run has a copy of its own: the file that it was trained with need not be here any more.
            data = dataclasses.replace(data, tokenizer=None)
        try:
            check(dataclasses.replace(config, data=data))
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        return config

    def check_unlocked(self) -> None:
        """UserError where another process trains in the folder; creates nothing."""
        refuse_locked_folder(self.path, "--workdir", "training in")

    def lock(self) -> AbstractContextManager[None]:
        """Creates the folder and keeps other processes from training in it. UserError where one already does."""
        return locked_folder(self.path, "--workdir", "training in")


def saved_steps(folder: Path) -> list[int]:
    """The steps whose checkpoints in ``folder`` are finished, oldest first."""
    return sorted(
        int(item.name) for item in folder.glob("*") if re.fullmatch("0|[1-9][0-9]*", item.name) and item.is_dir()
    )


def latest_run(folder: Path = Path("runs")) -> RunDirectory:
    """Of the runs in ``folder`` with a checkpoint, the one whose files changed last. UserError where there is none."""
    runs = [RunDirectory(file.parent) for file in folder.glob("*/config.json")]
    runs = [run for run in runs if saved_steps(run.checkpoints)]
    if not runs:
        raise UserError(
            f"there is no run with a checkpoint in {folder.resolve()}; train one with: "
            "python train.py --config configs/moe.py, or name one by --workdir"
        )
    return max(runs, key=_last_change)


def _last_change(run: RunDirectory) -> float:
    files = (run.config_file, run.checkpoints, run.metrics_file, run.log_file)
    return max(file.stat().st_mtime for file in files if file.exists())


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
