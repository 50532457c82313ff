"""What a run directory holds, which run is the latest, and what may change when a run goes on. Imports no jax."""

import contextlib
import dataclasses
import json
import os
import re
from contextlib import AbstractContextManager
from pathlib import Path

from moe_jax.config import Config
from moe_jax.config.rules import check
from moe_jax.errors import UserError
from moe_jax.files import atomic_write_text, locked_folder, read_json, refuse_link, refuse_locked_folder
from moe_jax.sharding.processes import is_first_process


class RunDirectory:
    """Names of everything in the run directory ``path``; creates nothing by itself."""

    def __init__(self, path: Path):
        self.path = path
        self.config_file = path / "config.json"
        self.tokenizer = path / "tokenizer"
        self.checkpoints = path / "checkpoints"
        self.metrics_file = path / "metrics.jsonl"
        self.log_file = path / "train.log"
        self.stacks = path / "stacks.log"
        self.tensorboard = path / "tensorboard"
        self.mlflow_file = path / "mlflow.json"
        self.loss_curve = path / "loss_curve.png"
        self.expert_load = path / "expert_load.png"
        self.generated_text = path / "generated_text.txt"
        self.profile = path / "profile"

    @property
    def name(self) -> str:
        """The folder's name as text: what of it is no UTF-8 is escaped."""
        return os.fsencode(self.path.resolve().name).decode("utf-8", "backslashreplace")

    def save_config(self, config: Config) -> None:
        if is_first_process():
            atomic_write_text(self.config_file, json.dumps(config.to_dict(), indent=2) + "\n")

    def load_config(self) -> Config:
        """The validated configuration of the run. UserError where it is missing, damaged or of other settings."""
        file = self.config_file
        try:
            values = read_json(file, dict, "put a copy of it back, or name another --workdir", is_lenient=True)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{self.path} is not a run directory (it has no config.json); "
                "train one with train.py, or name another by --workdir"
            ) from None
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

    def check_folders(self) -> None:
        """UserError where a file, or a link to nothing, is in the place of the folder or of one in it."""
        inner = (self.checkpoints, self.tensorboard, self.tokenizer, self.profile)
        hidden = (self.checkpoints / ".unfinished", self.path / "damaged", self.tokenizer / "huggingface")
        for folder in (self.path, *inner, *hidden):
            if not folder.is_dir() and os.path.lexists(folder):
                what = "a file" if folder.exists() else "a link to nothing"
                raise UserError(f"{folder} must be a folder, but is {what}; remove it, or choose another --workdir")

    def check_unlocked(self) -> None:
        """UserError where another process trains in the folder, or a link in it leads away what is written.

        Creates nothing. Checkpoints and TensorBoard's files may be on another disk, through a link to their folder.
        """
        if is_first_process():
            damaged = self.metrics_file.with_suffix(".damaged.jsonl")
            for path in (self.metrics_file, damaged, self.log_file, self.stacks, self.tokenizer):
                refuse_link(path)
            refuse_locked_folder(self.path, "--workdir", "training in")

    def lock(self) -> AbstractContextManager[None]:
        """Creates the folder and keeps other runs from training in it. UserError where one already does.

        In a run of several processes the first one holds the lock.
        """
        if not is_first_process():
            return contextlib.nullcontext()
        return locked_folder(self.path, "--workdir", "training in")


def saved_steps(folder: Path) -> list[int]:
    """The steps whose checkpoints in ``folder`` are finished, oldest first."""
    return sorted(
        int(item.name) for item in folder.glob("*") if re.fullmatch("0|[1-9][0-9]*", item.name) and item.is_dir()
    )


def latest_run(folder: Path = Path("runs")) -> RunDirectory:
    """Of the runs in ``folder`` with a checkpoint, the one that changed last. UserError where there is none."""
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
