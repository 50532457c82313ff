"""Checkpoints: Orbax steps with checksums; the newest ones and the one of the lowest validation loss are kept."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from moe_jax.axes import PyTree
from moe_jax.command import UserError
from moe_jax.runs.layout import atomic_write_text

log = logging.getLogger("moe_jax")

_SUMS = "SHA256SUMS.json"
_ITEMS = ("params", "optimizer_state", "progress")


@dataclass(frozen=True)
class Restored:
    step: int
    params: PyTree
    optimizer_state: PyTree
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints in ``folder``; ``keep`` of the newest are kept beside the best, None opens them for reading.

    Each holds three items: params, optimizer_state and progress (JSON). The parameters are an item of their own, so
    that sampling reads nothing else. Use it in a ``with`` block, whose end waits for the last save.
    """

    def __init__(self, folder: Path, keep: int | None):
        self._folder, self._is_writer = folder.absolute(), keep is not None
        orbax_log = logging.getLogger("absl")
        level = orbax_log.level
        if keep is None:
            if not folder.is_dir():
                raise UserError(f"there is no checkpoint in {folder.parent}; train a model there first")
            orbax_log.setLevel(logging.ERROR)  # it warns that what is opened for reading is opened for reading
            options = ocp.CheckpointManagerOptions(read_only=True, best_fn=_val_loss, best_mode="min")
        else:
            # A save that a kill cut short; Orbax ignores it but leaves it there.
            for half in folder.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(half)
            # max_to_keep with best_fn would remove the newest checkpoint where it is not among the best.
            policy = preservation_policy.AnyPreservationPolicy(
                [
                    preservation_policy.LatestN(keep),
                    preservation_policy.BestN(
                        get_metric_fn=_val_loss, n=1, reverse=True, keep_checkpoints_without_metrics=False
                    ),
                ]
            )
            options = ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=_val_loss, best_mode="min")
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=_ITEMS)
        orbax_log.setLevel(level)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_writer:
            self._seal()
        self._manager.close()

    def steps(self) -> list[int]:
        """The steps on disk, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        params: PyTree,
        optimizer_state: PyTree,
        *,
        progress: Mapping[str, Any],
        val_loss: float | None,
    ) -> None:
        """Starts to write ``step`` and returns once the arrays are copied; ``val_loss`` is None if not evaluated."""
        self._seal()
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                optimizer_state=ocp.args.StandardSave(optimizer_state),
                progress=ocp.args.JsonSave(dict(progress)),
            ),
            metrics=None if val_loss is None else {"val_loss": val_loss},
        )

    def read_progress(self) -> dict[str, Any] | None:
        """The progress item of the newest checkpoint; None without a checkpoint."""
        steps = self.steps()
        if not steps:
            return None
        return self._manager.restore(steps[-1], args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]

    def restore(self, params: PyTree, optimizer_state: PyTree) -> Restored | None:
        """The newest sound checkpoint, in the shapes, types and shardings of the two trees; None without any.

        A damaged one is moved aside, to ``damaged/`` in the run directory, and told. UserError where all are.
        """
        steps = self.steps()
        for step in reversed(steps):
            damage = self._damage(step)
            if damage is None:
                items = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        params=ocp.args.StandardRestore(params),
                        optimizer_state=ocp.args.StandardRestore(optimizer_state),
                        progress=ocp.args.JsonRestore(),
                    ),
                )
                return Restored(step, items["params"], items["optimizer_state"], items["progress"])
            if step == steps[0]:
                raise UserError(
                    f"every checkpoint in {self._folder} is damaged, the oldest one by {damage}; "
                    "put a copy back, or start a new run in another --workdir"
                )
            self._move_aside(step)
            log.warning(f"checkpoint {step} is damaged ({damage}): moved to damaged/, going on from an older one")
        return None

    def restore_params(self, which: Literal["best", "newest"], params: PyTree) -> PyTree:
        """The parameters of the checkpoint of the lowest validation loss, or of the newest. Raises UserError.

        Before the first evaluation the best is the newest.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"there is no checkpoint in {self._folder}; train a model there first")
        best = self._manager.best_step() if which == "best" else None
        step = steps[-1] if best is None else best
        damage = self._damage(step)
        if damage is not None:
            raise UserError(
                f"the {which} checkpoint {self._folder / str(step)} is damaged ({damage}); put a copy back, "
                f"or use --checkpoint {'newest' if which == 'best' else 'best'}"
            )
        return self._manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(params)))["params"]

    def _move_aside(self, step: int) -> None:
        aside = self._folder.parent / "damaged"
        aside.mkdir(exist_ok=True)
        shutil.rmtree(aside / str(step), ignore_errors=True)
        shutil.move(self._folder / str(step), aside / str(step))
        self._manager.reload()

    def _seal(self) -> None:
        """Writes the checksums of every finished step that has none: Orbax restores a flipped bit without a word."""
        self._manager.wait_until_finished()
        for step in self._manager.all_steps():
            folder = self._folder / str(step)
            if not (folder / _SUMS).exists():
                sums = {
                    str(file.relative_to(folder)): _sha256(file)
                    for file in sorted(folder.rglob("*"))
                    if file.is_file()
                }
                atomic_write_text(folder / _SUMS, json.dumps(sums, indent=1) + "\n")

    def _damage(self, step: int) -> str | None:
        """What is wrong with a sealed step's files; None where all are as written, or it was killed before sealing."""
        folder = self._folder / str(step)
        if not (folder / _SUMS).exists():
            return None
        try:
            sums = json.loads((folder / _SUMS).read_text(encoding="utf-8"))
        except ValueError:
            return f"{_SUMS} is not JSON"
        for name, expected in sums.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _sha256(folder / name) != expected:
                return f"{name} has changed"
        return None


def _val_loss(metrics: Mapping[str, float]) -> float:
    return metrics["val_loss"]


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
