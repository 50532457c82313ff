"""The arrays of a checkpoint: their shapes, and reading them."""

import gc
from collections.abc import Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from moe_jax.axes import PyTree
from moe_jax.errors import UserError
from moe_jax.files import plain_name
from moe_jax.runs.checkpoint.faults import quiet_libraries, reason
from moe_jax.runs.checkpoint.record import Record, Saved, checked_record, newest_sound
from moe_jax.sharding.processes import exchanged, first_then_all, is_first_process


def newest_sound_for_all(folder: Path) -> Saved | None:
    """``newest_sound`` as the first process finds it, which alone reads and hashes all files."""
    saved = first_then_all(lambda: newest_sound(folder) if is_first_process() else None)
    step = exchanged("" if saved is None else str(saved.record.step))[0]
    if is_first_process() or not step:
        return saved
    record = checked_record(folder / step)
    if isinstance(record, str):
        raise UserError(f"the checkpoint {folder / step} is sound to the first process, but not here: {record}")
    return Saved(folder / step, record, {})


def restore_items(step_folder: Path, record: Record, items: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The named items of a checkpoint that was found sound; no other file is read.

    ``items`` gives shapes, types and shardings. UserError where they are not those of the checkpoint, or where its
    files, though sealed, hold no arrays.
    """
    # Orbax would convert types silently.
    changes = [
        f"{name} is {record.shapes.get(name)} there, {value} here"
        for name, value in shapes_of(items).items()
        if value != record.shapes.get(name)
    ]
    if changes:
        raise UserError(
            f"{step_folder} is not of the model that its run's config.json and tokenizer/ describe ({changes[0]}); "
            "put back the ones that it was trained with"
        )
    try:
        with (
            quiet_libraries(is_saving=False),
            plain_name(step_folder) as folder,
            ocp.StandardCheckpointer() as checkpointer,
        ):
            return {name: checkpointer.restore(folder / name, tree) for name, tree in items.items()}
    except Exception as error:
        cause = error.__cause__ or error  # Orbax wraps what tensorstore and jax raise in a bare Exception
        if isinstance(cause, OSError | MemoryError | jax.errors.JaxRuntimeError):
            raise
        gc.collect()  # the parts that nobody waited for complain, while that is kept quiet
        raise UserError(
            f"{step_folder} cannot be restored, although its checksums are right ({reason(cause)}); put a copy of it "
            "back, or take another checkpoint"
        ) from error


def shapes_of(items: Mapping[str, PyTree]) -> dict[str, str]:
    """The type and the shape of every array, by its place in ``items``."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(items))
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
