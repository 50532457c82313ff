"""Checkpoints: one folder a step, written in the background, sealed with checksums, and only then given its name.

A step holds the items params, router_state (where the router has one) and optimizer_state, arrays that Orbax writes,
and the record, a file of JSON: what else the run must remember. Sampling reads the first two items and the record.

In a run of several processes each writes its own shards, in a folder that all see; the first one alone cleans, seals,
names and removes. All of them call everything here at the same places of the program.
"""

import contextlib
import dataclasses
import errno
import gc
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import jax
import orbax.checkpoint as ocp

from moe_jax.axes import PyTree
from moe_jax.errors import EnvironmentFault, UserError
from moe_jax.files import plain_name, refuse_link
from moe_jax.runs.checkpoint.faults import check_space, quiet_libraries, reason
from moe_jax.runs.checkpoint.record import Record, Saved, losses_of, read_records
from moe_jax.runs.checkpoint.restore import restore_items, shapes_of
from moe_jax.runs.checkpoint.seal import seal
from moe_jax.runs.layout import saved_steps
from moe_jax.sharding.processes import all_well, exchanged, is_first_process

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


class Checkpoints:
    """Saves into ``folder``, whose newest sound checkpoint is ``saved`` (``newest_sound``), and restores that one.

    Newer ones, which are damaged, are moved to ``damaged/`` beside ``folder`` first. What a killed save or removal
    left is removed. A save that fails, as on a full disk, is logged and harms nothing that is there;
    ``is_retry_due`` says when to try again. Use it in a ``with`` block.
    """

    def __init__(self, folder: Path, saved: Saved | None, retention: Retention):
        self._folder, self._saved, self._retention = folder.absolute(), saved, retention
        self._unfinished = self._folder / _UNFINISHED
        self._plain = self._folder
        self._newest = None if saved is None else saved.record.step
        self._is_first, self._is_alone = is_first_process(), jax.process_count() == 1
        all_well(True)  # no process still looks at what is moved now
        fault: Exception | None = None
        if self._is_first:
            try:
                self._clean()
            except (UserError, OSError) as error:
                fault = error
        if not all_well(fault is None):
            raise fault or EnvironmentFault("the first process cannot save; its own error says why")
        self._check_shared()
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future[None]] | None = None
        self._failure: str | None = None
        self._retry_at = math.inf

    def _clean(self) -> None:
        """Moves damaged checkpoints away, and removes what a process that was killed left."""
        for folder in (self._unfinished, self._folder.parent / "damaged"):  # what is in them is removed
            refuse_link(folder)
        for damaged, damage in ({} if self._saved is None else self._saved.damaged).items():
            aside = self._folder.parent / "damaged" / damaged.name
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            shutil.move(damaged, aside)
            log.warning(f"the checkpoint of step {damaged.name} is damaged ({damage}) and was moved to {aside.parent}")
        if next(reversed(saved_steps(self._folder)), None) != self._newest:
            raise UserError(f"{self._folder.parent} was trained on by another process; run the same command again")
        shutil.rmtree(self._unfinished, ignore_errors=True)
        self._unfinished.mkdir(parents=True)  # now, and not in hours, is the time to learn that it cannot be

    def _check_shared(self) -> None:
        """UserError where the processes of the run do not write into one folder: no save would ever end."""
        if self._is_alone:
            return
        mark = self._unfinished / uuid.uuid4().hex
        if self._is_first:
            mark.touch()
        mark = self._unfinished / exchanged(mark.name)[0]
        # By the folder's list, for NFS may remember that a name was missing.
        if not all_well(self._unfinished.is_dir() and mark.name in os.listdir(self._unfinished)):
            raise UserError(
                f"--workdir must be a folder that all processes of the run see, but {self._folder.parent} is not the "
                "same one everywhere; name one on a file system that they share"
            )

    def __enter__(self) -> Self:
        self._open = contextlib.ExitStack()
        self._open.enter_context(quiet_libraries(is_saving=True))
        self._plain = self._open.enter_context(plain_name(self._folder))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or self._is_alone:
            self.wait()  # after an exception in this process the others may never come to agree
        self._thread.shutdown()
        self._checkpointer.close()
        self._open.close()
        self._remove_unfinished()

    def save(self, record: Record, items: Mapping[str, PyTree]) -> None:
        """Starts to write the arrays ``items`` and the ``record`` of a step; returns once the arrays are copied.

        The record's shapes are filled in. A step that is on disk is not written again.
        """
        self.wait()
        if record.step == self._newest:
            return
        future: Future[None] = Future()
        try:
            self._make_room(items)
            self._write(record, items)
            future = self._thread.submit(self._commit, record.step)
        except Exception as error:  # noqa: BLE001 - a file system's faults have many types in Orbax
            future.set_exception(error)
        self._saving = record.step, future

    def _make_room(self, items: Mapping[str, PyTree]) -> None:
        """Raises in every process where the first one cannot begin."""
        fault = None
        self._remove_unfinished()
        try:
            if self._is_first:
                check_space(self._folder, items)
        except OSError as error:
            fault = error
        if not all_well(fault is None):
            raise fault or EnvironmentFault("the first process cannot write")

    def _write(self, record: Record, items: Mapping[str, PyTree]) -> None:
        is_finite = record.val_loss is not None and math.isfinite(record.val_loss)
        val_loss = record.val_loss if is_finite else None
        record = dataclasses.replace(record, val_loss=val_loss, shapes=shapes_of(items))
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._checkpointer.save(
            self._plain / _UNFINISHED / str(record.step),
            args=ocp.args.Composite(record=ocp.args.JsonSave(dataclasses.asdict(record)), **arguments),
        )

    def _commit(self, step: int) -> None:
        """Runs beside the training: gives the step its name once all of it is on disk, then removes old ones."""
        self._checkpointer.wait_until_finished()  # for the writes of all processes
        if not self._is_first:
            return
        staged = self._unfinished / str(step)
        for item in staged.iterdir():
            # Orbax passes over what it does not find, and without this file no array can be read again.
            if item.is_dir() and item.name != "record" and not (item / "manifest.ocdbt").exists():
                raise FileNotFoundError(errno.ENOENT, f"Orbax wrote no {item.name}/manifest.ocdbt")
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
            if all_well(error is None):
                self._newest, self._failure, self._retry_at = step, None, math.inf
            else:
                self._fail(step, "another process could not write it" if error is None else reason(error))
        return self._failure is None

    def is_retry_due(self) -> bool:
        """Whether the last save has failed a while ago, so that another one may be tried.

        Never with several processes: their clocks differ, and they must all save at the same step.
        """
        if not self._is_alone:
            return False
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

    def restore(self, items: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """The arrays of ``saved``, in the shapes, types and shardings of ``items``; each process reads its shards."""
        assert self._saved is not None, "there is nothing to restore"
        return restore_items(self._saved.folder, self._saved.record, items)

    def _remove_unfinished(self) -> None:
        if self._is_first:
            shutil.rmtree(self._unfinished, ignore_errors=True)

    def _fail(self, step: int, why: str) -> None:
        self._failure = why
        self._retry_at = time.monotonic() + _RETRY_SECONDS
        self._remove_unfinished()  # half a checkpoint takes room that the next one needs
        newest = "none is on disk yet" if self._newest is None else f"the newest on disk is of step {self._newest}"
        again = f"in {_RETRY_SECONDS:.0f} s" if self._is_alone else "at the next checkpoint"
        log.warning(
            f"warning: the checkpoint of step {step} is not saved ({why}); training goes on, and it is "
            f"tried again {again}; {newest}"
        )
        gc.collect()  # Orbax's futures refer to each other, and hold a copy of the whole state


def _steps_to_keep(folder: Path, retention: Retention) -> set[int]:
    records = read_records(folder)
    losses = losses_of(records)
    newest = sorted(records, reverse=True)[: retention.newest]
    best = sorted(losses, key=lambda step: losses[step])[: retention.best]
    # One whose record cannot be read may have been saved for good.
    for_good = [step for step, record in records.items() if record is None or record.for_good]
    return {*newest, *best, *for_good}
