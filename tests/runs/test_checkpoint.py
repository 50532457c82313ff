"""Checkpoints: what is kept, what comes back, damage, and saves that fail."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import shutil
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.errors import EnvironmentFault, UserError
from moe_jax.runs.checkpoint import record as record_module
from moe_jax.runs.checkpoint import save as checkpoint
from moe_jax.runs.checkpoint import seal as seal_module
from moe_jax.runs.checkpoint.record import Record, find_checkpoint, newest_sound
from moe_jax.runs.checkpoint.restore import restore_items
from moe_jax.runs.checkpoint.save import Checkpoints, Retention
from moe_jax.runs.checkpoint.seal import find_damage, seal
from moe_jax.runs.layout import saved_steps


def trees(value, devices=1):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params = {"w": jax.device_put(jnp.arange(64.0).reshape(8, 8) + value, rows)}
    return {"params": params, "optimizer_state": {"mu": jax.device_put(jnp.full((8,), value, jnp.float32), rows)}}


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


def go_on(folder, keep=2, best=1):
    return Checkpoints(folder, newest_sound(folder), Retention(keep, best))


def fill(folder, losses, keep=2, best=1, for_good=(), first=1):
    """Saves steps 10, 20, ... with a validation loss each, None for one that was not evaluated."""
    with go_on(folder, keep, best) as checkpoints:
        for number, val_loss in enumerate(losses, start=first):
            step = 10 * number
            checkpoints.save(Record(step=step, val_loss=val_loss, for_good=step in for_good), trees(number))


def restored(folder, devices=1):
    """(step, items) of the newest sound checkpoint."""
    saved = newest_sound(folder)
    with go_on(folder) as checkpoints:
        return saved.record.step, checkpoints.restore(abstract(trees(0, devices)))


def value_of(folder, which="best", leaf=None):
    """What was added to the parameters of a checkpoint; only they are read."""
    found, items = find_checkpoint(folder, which), {"params": {"w": leaf} if leaf else abstract(trees(0)["params"])}
    found.check(items)
    return float(restore_items(found.folder, found.record, items)["params"]["w"][0, 0])


def flip_a_bit(folder):
    """In the largest file."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    file = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(("losses", "retention", "for_good", "kept", "best"), [
    ([3.0, 1.0, 2.0, 2.5, 2.4], (2, 1), (), [20, 40, 50], 2),
    ([3.0, 1.0, None, None], (2, 1), (), [20, 30, 40], 2),
    ([None, None, None], (2, 1), (), [20, 30], 3),  # before any evaluation the best is the newest
    ([3.0, 2.0, 1.0], (2, 1), (), [20, 30], 3),
    ([3.0, math.nan, math.inf, math.nan], (2, 1), (), [10, 30, 40], 1),
    ([5.0, 1.0, 4.0, 2.0, 3.0, 6.0, 7.0], (1, 2), (10, 50), [10, 20, 40, 50, 70], 2),
])  # fmt: skip
def test_what_is_kept_and_which_is_the_best(tmp_path, losses, retention, for_good, kept, best):
    fill(tmp_path, losses, *retention, for_good=for_good)
    assert saved_steps(tmp_path) == kept
    assert not (tmp_path / ".unfinished").exists()
    assert newest_sound(tmp_path).record.step == 10 * len(losses)
    assert (value_of(tmp_path), value_of(tmp_path, "newest")) == (best, len(losses))


def test_the_best_and_those_for_good_are_kept_when_a_run_goes_on(tmp_path):
    fill(tmp_path, [2.0, 1.0, 3.0], for_good=(10,))
    fill(tmp_path, [1.5, None, 1.25], first=4)
    assert saved_steps(tmp_path) == [10, 20, 50, 60]
    assert value_of(tmp_path) == 2
    # One whose record cannot be read may be for good too.
    (tmp_path / "50" / "record" / "metadata").write_text("{")
    fill(tmp_path, [None], keep=1, best=0, first=7)
    assert saved_steps(tmp_path) == [10, 50, 70]


def test_the_newest_comes_back_on_any_number_of_devices(tmp_path):
    fill(tmp_path, [1.0, 2.0])
    for devices in (1, 8):
        (step, items), want = restored(tmp_path, devices), trees(2)
        assert step == 20
        jax.tree.map(np.testing.assert_array_equal, items, want)
        assert items["params"]["w"].sharding.num_devices == devices


def test_what_a_run_remembers_comes_back_bit_for_bit(tmp_path):
    progress = {"interval": [[0.1 + 0.2, 1e-300, math.inf, 2**40]], "best_val_loss": None}
    record = Record(step=3, val_loss=1 / 3, progress=progress, random={"key": [0, 2**32 - 1]}, config={"a": {"b": []}})
    with go_on(tmp_path) as checkpoints:
        checkpoints.save(record, trees(1))
    shapes = {"['optimizer_state']['mu']": "float32[8]", "['params']['w']": "float32[8, 8]"}
    assert newest_sound(tmp_path).record == dataclasses.replace(record, shapes=shapes)


def test_damage_is_found_and_the_older_checkpoint_restored(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    fill(folder, [1.0, 2.0])
    flip_a_bit(folder / "20" / "params")
    assert newest_sound(folder).record.step == 10
    assert saved_steps(folder) == [10, 20], "nothing is moved before a training goes on"
    assert restored(folder)[0] == 10
    assert (tmp_path / "damaged" / "20").is_dir()
    assert "the checkpoint of step 20 is damaged (params/" in caplog.text
    # The step can be saved anew, and what is older than the newest sound one is left alone.
    fill(folder, [0.5], first=2)
    flip_a_bit(folder / "10")
    assert restored(folder)[0] == 20
    assert saved_steps(folder) == [10, 20]
    assert value_of(folder) == 2


@pytest.mark.parametrize("name", ["checkpoints/.unfinished", "damaged"])
def test_nothing_is_removed_through_a_link(tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "10").touch()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=f"{name} is a link, through which nothing is written; remove it"):
        go_on(tmp_path / "checkpoints")
    assert (tmp_path / "mine" / "10").exists()


def test_no_sound_checkpoint_is_an_error_and_nothing_is_moved(tmp_path):
    fill(tmp_path, [1.0])
    flip_a_bit(tmp_path / "10" / "params")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged, the newest one by params"):
        newest_sound(tmp_path)
    assert saved_steps(tmp_path) == [10]
    for which in ("best", "newest"):
        with pytest.raises(UserError, match=r"is damaged .* put a copy of it back, or start a new run"):
            value_of(tmp_path, which)


def test_only_a_sound_checkpoint_is_one_to_train_on_from(tmp_path):
    fill(tmp_path, [3.0, 1.0, 2.0], keep=3)
    for step in ("20", "30"):
        flip_a_bit(tmp_path / step / "params")
    for which in ("best", "newest"):
        with pytest.raises(UserError, match=r"put a copy of it back, or train on: the same train.py command goes on"):
            value_of(tmp_path, which)


def test_what_is_removed_while_it_is_read_is_not_chosen(tmp_path, monkeypatch):
    fill(tmp_path, [1.0, 3.0, 4.0])
    read, saved = record_module.read_record, []

    def late(step_folder):
        if not saved:  # the training saves a better one and removes the first
            saved.append(40)
            fill(tmp_path, [0.5], first=4)
        return read(step_folder)

    monkeypatch.setattr(record_module, "read_record", late)
    found = find_checkpoint(tmp_path, "best")
    assert (found.folder.name, found.record.val_loss) == ("40", 0.5)


@pytest.mark.parametrize("fault", [FileNotFoundError("gone"), UserError("must have checkpoint format 2, got 1")])
def test_a_fault_of_what_is_gone_is_none(tmp_path, monkeypatch, fault):
    fill(tmp_path, [1.0, 3.0])
    check = record_module.checked_record

    def late(step_folder):
        if step_folder.name == "10":
            shutil.rmtree(step_folder)
            raise fault
        return check(step_folder)

    monkeypatch.setattr(record_module, "checked_record", late)
    assert find_checkpoint(tmp_path, "best").folder.name == "20"


def test_each_array_is_hashed_once_and_of_no_item_that_is_not_asked_for(tmp_path, monkeypatch):
    fill(tmp_path, [1.0])
    arrays = [str(file) for name in trees(0) for file in (tmp_path / "10" / name).rglob("*") if file.is_file()]
    hashed, digest = [], seal_module.hashlib.file_digest

    def noted(file, kind):
        hashed.extend({file.name} & set(arrays))
        return digest(file, kind)

    monkeypatch.setattr(seal_module.hashlib, "file_digest", noted)
    with go_on(tmp_path) as checkpoints:
        checkpoints.restore(abstract(trees(0)))
    assert sorted(hashed) == sorted(arrays)
    hashed.clear()
    shutil.rmtree(tmp_path / "10" / "optimizer_state")
    found = find_checkpoint(tmp_path, "best")
    for _ in range(2):
        found.check(["params"])
    assert sorted(hashed) == sorted(name for name in arrays if "optimizer_state" not in name)


def test_what_the_disk_cannot_read_is_damage(tmp_path, monkeypatch):
    fill(tmp_path, [1.0, 2.0])
    bad = flip_a_bit(tmp_path / "20" / "params")

    def failing(file):
        if file == bad:
            raise OSError(errno.EIO, "Input/output error", str(file))
        return open(file, "rb")

    monkeypatch.setattr(seal_module, "open_regular", failing)
    assert "cannot be read: Input/output error" in find_damage(tmp_path / "20")
    assert restored(tmp_path)[0] == 10


@pytest.mark.parametrize(("shape", "dtype"), [((8, 9), jnp.float32), ((8, 8), jnp.bfloat16)])
def test_another_shape_or_type_is_refused(tmp_path, shape, dtype):
    fill(tmp_path, [1.0])
    words = f"['params']['w'] is float32[8, 8] there, {dtype.__name__}{list(shape)} here"
    with pytest.raises(UserError, match=re.escape(words)):
        value_of(tmp_path, leaf=jax.ShapeDtypeStruct(shape, dtype))


@pytest.mark.parametrize(("version", "words"), [
    (None, "got 1; use the older moe_jax that wrote it"),
    (1, "got 1; use the older moe_jax that wrote it"),
    (3, "got 3; install the newer moe_jax that wrote it"),
])  # fmt: skip
def test_another_format_is_refused(tmp_path, version, words):
    fill(tmp_path, [1.0])
    record = tmp_path / "10" / "record"
    assert json.loads((record / "metadata").read_text())["format_version"] == 2
    if version is None:  # the first format had no record
        record.rename(tmp_path / "10" / "progress")
    else:
        (record / "metadata").write_text(json.dumps({"format_version": version, "what_is_new": 0}))
    seal(tmp_path / "10")
    for read in (newest_sound, value_of):
        with pytest.raises(UserError, match=rf"must have checkpoint format 2, {words}"):
            read(tmp_path)


def test_a_save_that_fails_harms_nothing_is_logged_and_tried_again(tmp_path, monkeypatch, caplog):
    fill(tmp_path, [1.0])
    monkeypatch.setattr(checkpoint, "_RETRY_SECONDS", 0.0)
    with go_on(tmp_path) as checkpoints:
        with monkeypatch.context() as full:
            full.setattr(checkpoint, "seal", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
            checkpoints.save(Record(step=20), trees(2))
            assert not checkpoints.wait()
            assert checkpoints.is_retry_due()
            with pytest.raises(EnvironmentFault, match=r"step 20 could not be saved \(.*No space left.*is of step 10"):
                checkpoints.check_saved(20)
        assert "the checkpoint of step 20 is not saved" in caplog.text
        assert saved_steps(tmp_path) == [10]
        assert not (tmp_path / ".unfinished").exists()
        checkpoints.save(Record(step=21), trees(3))
        checkpoints.check_saved(21)
        assert not checkpoints.is_retry_due()
    assert saved_steps(tmp_path) == [10, 21]


def test_a_save_that_would_not_fit_is_not_begun(tmp_path, monkeypatch, caplog):
    fill(tmp_path, [1.0])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=287))
    fill(tmp_path, [None], first=2)
    assert "step 20 is not saved (0.0 MB are needed and 0.0 MB free)" in caplog.text
    assert saved_steps(tmp_path) == [10]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=288))  # 72 numbers of 4 bytes
    fill(tmp_path, [None], first=2)
    assert saved_steps(tmp_path) == [10, 20]


def test_an_old_checkpoint_that_cannot_be_removed_is_logged_and_others_are(tmp_path, monkeypatch, caplog):
    fill(tmp_path, [None, None, None], keep=3)
    remove = shutil.rmtree

    def stubborn(path, **named):
        if "removed-10" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        remove(path, **named)

    monkeypatch.setattr(shutil, "rmtree", stubborn)
    fill(tmp_path, [None], keep=1, best=0, first=4)
    assert saved_steps(tmp_path) == [40]
    assert "the old checkpoint of step 10 cannot be removed (Permission denied)" in caplog.text
    assert "is not saved" not in caplog.text


def test_what_stands_in_the_way_of_checkpoints_is_found_at_the_start(tmp_path):
    file = tmp_path / "checkpoints"
    file.write_text("a file")
    with pytest.raises(OSError, match="checkpoints"):
        Checkpoints(file, None, Retention(1, 1))
    fill(tmp_path, [1.0])
    with pytest.raises(UserError, match="was trained on by another process; run the same command again"):
        Checkpoints(tmp_path, None, Retention(1, 1))


NAMES = ["lr[0.1]", "[project] x/run", "a\\b", "a?b*#c%20", "$M_$S", os.fsdecode(b"\xff"), "日本"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_folder_will_do(tmp_path, name):
    fill(tmp_path / name, [2.0, 1.0])
    assert restored(tmp_path / name)[0] == 20
    assert value_of(tmp_path / name) == 2


def test_what_orbax_left_out_is_no_checkpoint(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint, "plain_name", contextlib.nullcontext)
    fill(tmp_path / "[a]", [1.0])
    assert saved_steps(tmp_path / "[a]") == []
    assert "step 10 is not saved (Orbax wrote no " in caplog.text


def test_half_a_checkpoint_and_other_folders_are_none(tmp_path):
    fill(tmp_path, [1.0])
    half = tmp_path / ".unfinished" / "20.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    for name in ("²", "020", "-1", "1e3", "x"):
        (tmp_path / name).mkdir()
    assert saved_steps(tmp_path) == [10]
    assert restored(tmp_path)[0] == 10
    assert not half.exists()


def test_nothing_to_restore(tmp_path):
    with go_on(tmp_path / "new"):
        assert newest_sound(tmp_path / "new") is None
    assert newest_sound(tmp_path / "none") is None
