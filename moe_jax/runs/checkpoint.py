"""Checkpoints: Orbax steps with checksums; the newest ones and the one of the lowest validation loss are kept.

A step's folder holds the items params, router_state (where the router has one), optimizer_state and progress (JSON).
The first two are items of their own, so that sampling reads nothing else. Orbax restores a flipped bit without a word,
so each finished step is sealed with the checksums of its files, and they are compared before anything is read.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from moe_jax.axes import PyTree
from moe_jax.command import UserError
from moe_jax.files import atomic_write_text
from moe_jax.runs.layout import saved_steps

log = logging.getLogger("moe_jax")

_SUMS = "SHA256SUMS.json"


@dataclass(frozen=True)
class Restored:
    step: int
    items: dict[str, PyTree]
    progress: dict[str, Any]


def read_progress(folder: Path) -> dict[str, Any] | None:
    """The progress item of the newest sound checkpoint in ``folder``; None without one."""
    for step in reversed(saved_steps(folder)):
        if _damage(folder / str(step)) is None:
            return _progress(folder / str(step))
    return None


def restore_items(folder: Path, which: Literal["best", "newest"], items: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The named items of the checkpoint of the lowest validation loss, or of the newest one.

    Before the first evaluation the best is the newest. ``items`` gives shapes, types and shardings. UserError where
    there is no checkpoint, or it is damaged.
    """
    steps = saved_steps(folder)
    if not steps:
        raise UserError(f"there is no checkpoint in {folder}; train a model there first")
    losses = {step: loss for step in steps if (loss := _val_loss_of(folder / str(step))) is not None}
    step = min(losses, key=lambda each: losses[each]) if which == "best" and losses else steps[-1]
    damage = _damage(folder / str(step))
    if damage is not None:
        sound = [each for each in steps if _damage(folder / str(each)) is None]
        others = {"newest": steps[-1], "best": min(losses, key=lambda each: losses[each], default=steps[-1])}
        remedy = [f", or use --checkpoint {name}" for name, other in others.items() if other in sound]
        raise UserError(
            f"the {which} checkpoint {folder / str(step)} is damaged ({damage}); put a copy of it back"
            + (remedy[0] if remedy else ", or train on: the same train.py command goes on from the newest sound one")
        )
    return _restore(folder / str(step), items)


class Checkpoints:
    """Saves into ``folder`` and keeps ``keep`` of the newest checkpoints beside the best.

    Damaged ones are moved to ``damaged/`` beside it first, and told; UserError where all are. Use it in a ``with``
    block, whose end waits for the last save.
    """

    def __init__(self, folder: Path, keep: int):
        self._folder = folder.absolute()
        _move_damaged_aside(self._folder)
        # A save that a kill cut short; Orbax ignores it but leaves it there.
        for half in folder.glob("*.orbax-checkpoint-tmp"):
            shutil.rmtree(half)
        # Orbax writes the loss down because of best_fn; max_to_keep with it would remove the newest checkpoint where
        # that is not among the best.
        policy = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(keep),
                preservation_policy.BestN(
                    get_metric_fn=_val_loss,
                    n=1,
                    reverse=True,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=_val_loss, best_mode="min"),
            item_names=("params", "router_state", "optimizer_state", "progress"),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.wait()
        self._manager.close()

    def save(
        self,
        step: int,
        items: Mapping[str, PyTree],
        *,
        progress: Mapping[str, Any],
        val_loss: float | None,
    ) -> None:
        """Starts to write the arrays ``items`` of ``step`` and returns once they are copied.

        ``val_loss`` is None if the step was not evaluated; one that is not finite is never the best.
        """
        self.wait()
        self._manager.save(
            step,
            args=ocp.args.Composite(
                progress=ocp.args.JsonSave(dict(progress)),
                **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
            ),
            metrics={"val_loss": val_loss} if val_loss is not None and math.isfinite(val_loss) else None,
        )

    def restore(self, items: Mapping[str, PyTree]) -> Restored | None:
        """The newest checkpoint, in the shapes, types and shardings of ``items``; None without any."""
        steps = saved_steps(self._folder)
        if not steps:
            return None
        folder = self._folder / str(steps[-1])
        return Restored(steps[-1], _restore(folder, items), _progress(folder))

    def wait(self) -> None:
        """Waits until the last save is on disk, and writes the checksums of every step that has none."""
        self._manager.wait_until_finished()
        for step in saved_steps(self._folder):
            folder = self._folder / str(step)
            if not (folder / _SUMS).exists():
                files = sorted(file for file in folder.rglob("*") if file.is_file())
                sums = {str(file.relative_to(folder)): _sha256(file) for file in files}
                atomic_write_text(folder / _SUMS, json.dumps(sums, indent=1) + "\n")


def _move_damaged_aside(folder: Path) -> None:
    steps = saved_steps(folder)
    damages = {step: damage for step in steps if (damage := _damage(folder / str(step))) is not None}
    if steps and len(damages) == len(steps):
        raise UserError(
            f"every checkpoint in {folder} is damaged, the newest one by {damages[steps[-1]]}; "
            "put a copy back, or start a new run in another --workdir"
        )
    for step, damage in damages.items():
        aside = folder.parent / "damaged" / str(step)
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        shutil.move(folder / str(step), aside)
        log.warning(f"the checkpoint of step {step} is damaged ({damage}) and was moved to {aside.parent}")


def _damage(step_folder: Path) -> str | None:
    """What is wrong with the files of a step; None where all are as written, or a kill came before the checksums."""
    if not (step_folder / _SUMS).exists():
        return None
    try:
        sums = json.loads((step_folder / _SUMS).read_text(encoding="utf-8"))
        expected = {step_folder / name: str(value) for name, value in sums.items()}
    except (ValueError, AttributeError):
        return f"{_SUMS} cannot be read"
    for file, value in expected.items():
        if not file.is_file():
            return f"{file.relative_to(step_folder)} is missing"
        if _sha256(file) != value:
            return f"{file.relative_to(step_folder)} has changed"
    return None


def _restore(step_folder: Path, items: Mapping[str, PyTree]) -> dict[str, PyTree]:
    with ocp.StandardCheckpointer() as checkpointer:
        return {name: checkpointer.restore((step_folder / name).absolute(), tree) for name, tree in items.items()}


def _progress(step_folder: Path) -> dict[str, Any]:
    return json.loads((step_folder / "progress" / "metadata").read_text(encoding="utf-8"))


def _val_loss_of(step_folder: Path) -> float | None:
    """The validation loss that a step was saved with; None where it was not evaluated, or that file is damaged."""
    try:
        return json.loads((step_folder / "metrics" / "metrics").read_text(encoding="utf-8"))["val_loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _val_loss(metrics: Mapping[str, float]) -> float:
    return metrics["val_loss"]


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
