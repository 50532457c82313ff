"""Reading checkpoints: which one, whether it is sound and of this version, and its arrays. Orbax reads the arrays."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp

from moe_jax.axes import PyTree
from moe_jax.errors import UserError
from moe_jax.runs.checkpoint.seal import find_damage
from moe_jax.runs.layout import saved_steps

FORMAT_VERSION = 2
"""1 had no version, no settings and no state of the data in it."""


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of the newest checkpoint in ``folder`` whose record is sound; None without one.

    Raises UserError where it was written by another version of this package.
    """
    for step in reversed(saved_steps(folder)):
        record = checked_record(folder / str(step))
        if record is not None:
            return record
    return None


def find_checkpoint(folder: Path, which: Literal["best", "newest"], items: Iterable[str]) -> Path:
    """The folder of the step of the lowest validation loss, or of the newest one; its record and ``items`` are sound.

    Before the first evaluation the best is the newest. UserError where there is no checkpoint, it is damaged, or of
    another version of this package.
    """
    steps = saved_steps(folder)
    if not steps:
        raise UserError(f"there is no checkpoint in {folder}; train a model there first")
    losses = losses_of(folder)
    chosen = {"newest": steps[-1], "best": min(losses, key=lambda each: losses[each], default=steps[-1])}
    step_folder = folder / str(chosen[which])
    checked_record(step_folder)
    needed = ("record", *items)
    damage = find_damage(step_folder, needed)
    if damage is not None:
        others = [name for name, step in chosen.items() if find_damage(folder / str(step), needed) is None]
        raise UserError(
            f"the {which} checkpoint {step_folder} is damaged ({damage}); put a copy of it back"
            + (
                f", or use --checkpoint {others[0]}"
                if others
                else ", or train on: the same train.py command goes on from the newest sound one"
            )
        )
    return step_folder


def restore_items(folder: Path, which: Literal["best", "newest"], items: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The named items of the checkpoint that ``find_checkpoint`` finds; no other file is read.

    ``items`` gives shapes, types and shardings. UserError where they are not those of the checkpoint.
    """
    step_folder = find_checkpoint(folder, which, items)
    record = checked_record(step_folder)
    assert record is not None, "it was sound a moment ago"
    check_shapes(step_folder, record, items)
    return restore_step(step_folder, items)


def losses_of(folder: Path) -> dict[int, float]:
    """The validation losses of the steps that were evaluated and whose records can be read."""
    records = {step: record_of(folder / str(step)) or {} for step in saved_steps(folder)}
    losses = {step: record.get("val_loss") for step, record in records.items()}
    return {step: loss for step, loss in losses.items() if isinstance(loss, float)}


def shapes_of(items: Mapping[str, PyTree]) -> dict[str, str]:
    """The type and the shape of every array, by its place in ``items``."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(items))
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def check_shapes(step_folder: Path, record: Mapping[str, Any], items: Mapping[str, PyTree]) -> None:
    """UserError where ``items`` are not what was saved; Orbax would convert types without a word."""
    saved, asked = record["shapes"], shapes_of(items)
    changes = [
        f"{name} is {saved.get(name)} there, {value} here" for name, value in asked.items() if value != saved.get(name)
    ]
    if changes:
        raise UserError(
            f"{step_folder} is not of the model that its run's config.json and tokenizer/ describe ({changes[0]}); "
            "put back the ones that it was trained with"
        )


def restore_step(step_folder: Path, items: Mapping[str, PyTree]) -> dict[str, PyTree]:
    with ocp.StandardCheckpointer() as checkpointer:
        return {name: checkpointer.restore((step_folder / name).absolute(), tree) for name, tree in items.items()}


def checked_record(step_folder: Path) -> dict[str, Any] | None:
    """The record of a step, None where it is damaged. UserError where it was written by another version."""
    if (step_folder / "progress").is_dir() and not (step_folder / "record").exists():
        version = 1
    elif find_damage(step_folder, ["record"]) is not None:
        return None
    else:
        record = record_of(step_folder) or {}
        version = record.get("format_version", 1)
        if version == FORMAT_VERSION:
            return record
    remedy = (
        "use the older moe_jax that wrote it, or start a new run in another --workdir"
        if version < FORMAT_VERSION
        else "install the newer moe_jax that wrote it"
    )
    raise UserError(f"{step_folder} must have checkpoint format {FORMAT_VERSION}, got {version}; {remedy}")


def record_of(step_folder: Path) -> dict[str, Any] | None:
    """The record as it stands, for what a wrong one can do no harm to; None where it cannot be read."""
    try:
        return json.loads((step_folder / "record" / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
