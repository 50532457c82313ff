"""Which checkpoints a run has, whether they are sound, and what each remembers beside its arrays. Imports no jax."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from moe_jax.errors import UserError
from moe_jax.files import MOST_BYTES, decode_json, read_bytes
from moe_jax.runs.checkpoint.seal import find_damage
from moe_jax.runs.layout import saved_steps

FORMAT_VERSION = 2
"""1 had no version, no settings and no state of the data in it."""

Which = Literal["best", "newest"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a checkpoint remembers beside its arrays: a file of JSON in it."""

    format_version: int = FORMAT_VERSION
    step: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
    val_loss: float | None = None
    """None: not evaluated, or not finite, and so never among the best."""
    for_good: bool = False
    """Never removed."""
    shapes: dict[str, Annotated[str, msgspec.Meta(max_length=200)]] = field(default_factory=dict)
    """Type and shape of every array, by its place; filled in by the save."""
    progress: dict[str, Any] = field(default_factory=dict)
    """The training's counters and the state of its data."""
    random: dict[str, Any] = field(default_factory=dict)
    """The key that all random keys are made from, and what is drawn with it."""
    config: dict[str, Any] = field(default_factory=dict)
    """``Config.to_dict`` of the run."""
    tokenizer: str | None = None
    """``fingerprint`` of the run's tokenizer; None in checkpoints of before."""

    @property
    def most_bytes(self) -> int:
        """More than any file of the checkpoint can have: what its arrays take, in the widest type, and room."""
        sizes = [re.findall(r"\d+", text.partition("[")[2]) for text in self.shapes.values()]
        return 8 * sum(math.prod(map(int, size)) for size in sizes) + (64 << 20)


@dataclass(frozen=True)
class Saved:
    """The newest sound checkpoint of a run: each of its files is as it was when it was sealed."""

    folder: Path
    record: Record
    damaged: dict[Path, str]
    """Newer checkpoints, and what is wrong with each."""


@dataclass(frozen=True)
class Found:
    """The checkpoint that was asked for; its record is sound, and so are the items that were checked."""

    which: Which
    folders: Mapping[Which, Path]
    """That of either choice."""
    record: Record
    _sound: set[str] = field(default_factory=set, repr=False)

    @property
    def folder(self) -> Path:
        return self.folders[self.which]

    def check(self, items: Iterable[str]) -> None:
        """UserError where one of ``items`` is damaged; each is read and hashed once."""
        unchecked = set(items) - self._sound
        damage = find_damage(self.folder, unchecked, most_bytes=self.record.most_bytes)
        if damage is not None:
            raise _damaged(self.which, self.folders, damage, unchecked, self.record.most_bytes)
        self._sound.update(unchecked)


def newest_sound(folder: Path) -> Saved | None:
    """The newest checkpoint in ``folder`` that is sound; None where there is none at all. Changes nothing.

    UserError where all are damaged, or one on the way was written by another version of this package.
    """
    damaged: dict[Path, str] = {}
    for step in reversed(saved_steps(folder)):
        step_folder = folder / str(step)
        record = checked_record(step_folder)
        damage = record if isinstance(record, str) else find_damage(step_folder, most_bytes=record.most_bytes)
        if isinstance(record, Record) and damage is None:
            return Saved(step_folder, record, damaged)
        damaged[step_folder] = str(damage)
    if damaged:
        raise UserError(
            f"every checkpoint in {folder} is damaged, the newest one by {next(iter(damaged.values()))}; "
            "put a copy back, or start a new run in another --workdir"
        )
    return None


def find_checkpoint(folder: Path, which: Which) -> Found:
    """The checkpoint of the lowest validation loss, or the newest; before the first evaluation both are the newest.

    UserError where there is none, its record is damaged, or it was written by another version of this package.
    """
    while True:
        records = read_records(folder)
        if not records:
            raise UserError(f"there is no checkpoint in {folder}; train a model there first")
        losses, newest = losses_of(records), max(records)
        best = min(losses, key=lambda step: losses[step], default=newest)
        folders: dict[Which, Path] = {"best": folder / str(best), "newest": folder / str(newest)}
        record: Record | str | UserError | OSError
        try:
            record = checked_record(folders[which])
        except (UserError, OSError) as error:
            record = error
        # Where a training has removed one of them meanwhile, it has also saved another, which is to be chosen among.
        if all((folder / str(step)).is_dir() for step in records):
            if isinstance(record, Record):
                return Found(which, folders, record)
            raise _damaged(which, folders, record, (), MOST_BYTES) if isinstance(record, str) else record


def read_records(folder: Path) -> dict[int, Record | None]:
    """The records of all steps as they stand, oldest first, where a wrong one can do no harm; None: unreadable."""
    return {step: read_record(folder / str(step)) for step in saved_steps(folder)}


def losses_of(records: Mapping[int, Record | None]) -> dict[int, float]:
    """The validation losses of the steps that were evaluated and whose records can be read."""
    return {step: record.val_loss for step, record in records.items() if record and record.val_loss is not None}


def read_record(step_folder: Path) -> Record | None:
    """The record as it stands, None where it cannot be read."""
    try:
        return _read(step_folder, Record)
    except (OSError, ValueError):
        return None


def _read(step_folder: Path, kind: type[T]) -> T:
    # Sums of metrics may not be finite, and Orbax writes such numbers as they are.
    return decode_json(read_bytes(step_folder / "record" / "metadata", MOST_BYTES), kind, is_lenient=True)


class _Version(msgspec.Struct):
    format_version: int = 1


def checked_record(step_folder: Path) -> Record | str:
    """The record of a step, or what is damaged in it. UserError where it was written by another version."""
    version = 1  # its record was called progress
    if (step_folder / "record").exists() or not (step_folder / "progress").is_dir():
        damage = find_damage(step_folder, ["record"], most_bytes=MOST_BYTES)
        if damage is not None:
            return damage
        try:
            version = _read(step_folder, _Version).format_version
            if version == FORMAT_VERSION:
                return _read(step_folder, Record)
        except ValueError as error:
            return f"record/metadata: {error}"
    remedy = (
        "use the older moe_jax that wrote it, or start a new run in another --workdir"
        if version < FORMAT_VERSION
        else "install the newer moe_jax that wrote it"
    )
    raise UserError(f"{step_folder} must have checkpoint format {FORMAT_VERSION}, got {version}; {remedy}")


def _damaged(
    which: Which, folders: Mapping[Which, Path], damage: str, items: Iterable[str], most_bytes: int
) -> UserError:
    items, folder = ("record", *items), folders[which].parent
    others = [name for name, each in folders.items() if find_damage(each, items, most_bytes=most_bytes) is None]
    remedy = "start a new run in another --workdir"
    if others:
        remedy = f"use --checkpoint {others[0]}"
    elif any(
        record and find_damage(folder / str(step), most_bytes=record.most_bytes) is None
        for step, record in read_records(folder).items()
    ):
        remedy = "train on: the same train.py command goes on from the newest sound one"
    return UserError(
        f"the {which} checkpoint {folders[which]} is damaged ({damage}); put a copy of it back, or {remedy}"
    )
