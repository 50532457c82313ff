"""Checkpoints: one folder a step, written in the background, sealed with checksums, and only then given its name.

A step holds the items params, router_state (where the router has one) and optimizer_state, arrays that Orbax writes,
and the record, a file of JSON: what else the run must remember. Sampling reads the first two items and the record.
"""

import contextlib
import gc
import logging
import math
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import orbax.checkpoint as ocp

from moe_jax.axes import PyTree
from moe_jax.errors import EnvironmentFault, UserError
from moe_jax.runs.checkpoint.faults import check_space, quiet_libraries, reason
from moe_jax.runs.checkpoint.restore import (
    FORMAT_VERSION,
    check_shapes,
    checked_record,
    losses_of,
    record_of,
    restore_step,
    shapes_of,
)
from moe_jax.runs.checkpoint.seal import find_damage, seal
from moe_jax.runs.layout import saved_steps

log = logging.getLogger("moe_jax")

_UNFINISHED = ".unfinished"
"""Where a step is written before it has its name, and where it goes to be removed."""
_RETRY_SECONDS = 60.0


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay, beside those that were saved for good."""

    newest: int
    best: int
    """Those of the lowest validation losses."""


@dataclass(frozen=True)
class Restored:
    step: int
    items: dict[str, PyTree]
    record: dict[str, Any]


class Checkpoints:
    """Saves into ``folder`` and restores from there.

    Newer checkpoints than the newest sound one are moved to ``damaged/`` beside it first, and told; UserError where
    all are damaged. What a killed save or removal left is removed. A save that fails, as on a full disk, is told and
    harms nothing that is there; ``is_retry_due`` says when to try again. Use it in a ``with`` block.
    """

    def __init__(self, folder: Path, retention: Retention):
        self._folder, self._retention = folder.absolute(), retention
        self._unfinished = self._folder / _UNFINISHED
        self._newest = _move_damaged_aside(self._folder)
        shutil.rmtree(self._unfinished, ignore_errors=True)
        self._unfinished.mkdir(parents=True)  # now, and not in hours, is the time to learn that it cannot be
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future[None]] | None = None
        self._failure: str | None = None
        self._retry_at = math.inf
        self.seconds = 0.0
        """How long saves have kept the caller waiting."""

    def __enter__(self) -> Self:
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(quiet_libraries())
        return self

    def __exit__(self, *exception: object) -> None:
        self.wait()
        self._thread.shutdown()
        self._checkpointer.close()
        self._quiet.close()
        shutil.rmtree(self._unfinished, ignore_errors=True)

    def save(
        self,
        step: int,
        items: Mapping[str, PyTree],
        record: Mapping[str, Any],
        *,
        val_loss: float | None,
        for_good: bool = False,
    ) -> None:
        """Starts to write the arrays ``items`` and the JSON ``record`` of ``step``; returns once they are copied.

        ``val_loss`` is None if the step was not evaluated; one that is not finite is never among the best. A step that
        is saved ``for_good`` is never removed.
        """
        started = time.perf_counter()
        self.wait()
        if step != self._newest:
            is_finite = val_loss is not None and math.isfinite(val_loss)
            known = {
                "format_version": FORMAT_VERSION,
                "step": step,
                "val_loss": val_loss if is_finite else None,
                "for_good": for_good,
                "shapes": shapes_of(items),
            }
            try:
                shutil.rmtree(self._unfinished, ignore_errors=True)
                check_space(self._folder, items)
                self._checkpointer.save(
                    self._unfinished / str(step),
                    args=ocp.args.Composite(
                        record=ocp.args.JsonSave(known | dict(record)),
                        **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                    ),
                )
                self._saving = step, self._thread.submit(self._commit, step)
            except Exception as error:  # noqa: BLE001 - a file system's faults have many types in Orbax
                self._tell_failure(step, error)
        self.seconds += time.perf_counter() - started

    def _commit(self, step: int) -> None:
        """Runs beside the training: gives the step its name once all of it is on disk, then removes old ones."""
        self._checkpointer.wait_until_finished()
        staged = self._unfinished / str(step)
        seal(staged)
        staged.rename(self._folder / str(step))
        for old in sorted(set(saved_steps(self._folder)) - _steps_to_keep(self._folder, self._retention)):
            try:
                # Renamed first: a kill in the middle leaves no half of a checkpoint.
                (self._folder / str(old)).rename(self._unfinished / f"removed-{old}")
                shutil.rmtree(self._unfinished / f"removed-{old}")
            except OSError as error:  # the new one is safe all the same
                log.warning(f"warning: the old checkpoint of step {old} cannot be removed ({reason(error)})")

    def wait(self) -> bool:
        """Waits until the last save has ended, well or not; whether it is on disk."""
        if self._saving is not None:
            step, future = self._saving
            self._saving = None
            error = future.exception()
            if error is None:
                self._newest, self._failure, self._retry_at = step, None, math.inf
            else:
                self._tell_failure(step, error)
        return self._failure is None

    def is_retry_due(self) -> bool:
        """Whether the last save has failed a while ago, so that another one may be tried."""
        if self._saving is not None and self._saving[1].done():
            self.wait()
        return time.monotonic() >= self._retry_at

    def check_saved(self, step: int) -> None:
        """EnvironmentFault unless ``step`` is on disk."""
        self.wait()
        if self._newest != step:
            newest = "none is on disk" if self._newest is None else f"the newest one on disk is of step {self._newest}"
            raise EnvironmentFault(
                f"the checkpoint of step {step} could not be saved ({self._failure}); {newest}: free space in "
                f"{self._folder} or mend what is wrong there, and run the same command to go on from it"
            )

    def restore(self, items: Mapping[str, PyTree]) -> Restored | None:
        """The newest checkpoint, in the shapes, types and shardings of ``items``; None without any."""
        if self._newest is None:
            return None
        folder = self._folder / str(self._newest)
        record = checked_record(folder)
        assert record is not None, "it was sound a moment ago"
        check_shapes(folder, record, items)
        return Restored(self._newest, restore_step(folder, items), record)

    def _tell_failure(self, step: int, error: BaseException) -> None:
        self._failure = reason(error)
        self._retry_at = time.monotonic() + _RETRY_SECONDS
        shutil.rmtree(self._unfinished, ignore_errors=True)  # half a checkpoint takes room that the next one needs
        newest = "none is on disk yet" if self._newest is None else f"the newest on disk is of step {self._newest}"
        log.warning(
            f"warning: the checkpoint of step {step} is not saved ({self._failure}); training goes on, and it is "
            f"tried again in {_RETRY_SECONDS:.0f} s; {newest}"
        )
        gc.collect()  # Orbax's futures refer to each other, and hold a copy of the whole state


def _steps_to_keep(folder: Path, retention: Retention) -> set[int]:
    steps, losses = saved_steps(folder), losses_of(folder)
    newest = steps[len(steps) - min(retention.newest, len(steps)) :]
    best = sorted(losses, key=lambda step: losses[step])[: retention.best]
    # One whose record cannot be read may have been saved for good.
    for_good = [step for step in steps if (record_of(folder / str(step)) or {"for_good": True}).get("for_good")]
    return {*newest, *best, *for_good}


def _move_damaged_aside(folder: Path) -> int | None:
    """The newest sound step; newer ones are moved away. None where no step is there, UserError where none is sound."""
    damages: dict[int, str] = {}
    for step in reversed(saved_steps(folder)):
        damage = find_damage(folder / str(step))
        if damage is None:
            break
        damages[step] = damage
    else:
        if damages:
            newest = max(damages)
            raise UserError(
                f"every checkpoint in {folder} is damaged, the newest one by {damages[newest]}; "
                "put a copy back, or start a new run in another --workdir"
            )
        return None
    for damaged, damage in damages.items():
        aside = folder.parent / "damaged" / str(damaged)
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        shutil.move(folder / str(damaged), aside)
        log.warning(f"the checkpoint of step {damaged} is damaged ({damage}) and was moved to {aside.parent}")
    return step
