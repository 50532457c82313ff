"""Checkpoints: what is kept, what comes back, and damage."""

import errno
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.errors import EnvironmentFault, UserError
from moe_jax.runs.checkpoint import save as checkpoint
from moe_jax.runs.checkpoint import seal as seal_module
from moe_jax.runs.checkpoint.record import Record, find_checkpoint, newest_sound
from moe_jax.runs.checkpoint.restore import restore_items
from moe_jax.runs.checkpoint.save import Checkpoints, Retention
from moe_jax.runs.checkpoint.seal import find_damage, seal
from moe_jax.runs.layout import saved_steps


def mesh_of(count):
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])


def trees(value, devices=1):
    rows = NamedSharding(mesh_of(devices), PartitionSpec("data"))
    params = {"w": jax.device_put(jnp.arange(64.0).reshape(8, 8) + value, rows)}
    return {"params": params, "optimizer_state": {"mu": jax.device_put(jnp.full((8,), value, jnp.float32), rows)}}


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


def fill(folder, losses, keep=2, best=1, for_good=()):
    """Saves steps 10, 20, ... with a validation loss each, None for one that was not evaluated."""
    with go_on(folder, keep, best) as checkpoints:
        for number, val_loss in enumerate(losses, start=1):
            step = 10 * number
            checkpoints.save(Record(step=step, val_loss=val_loss, for_good=step in for_good), trees(number))


def go_on(folder, keep=2, best=1):
    return Checkpoints(folder, newest_sound(folder), Retention(keep, best))


def restored(folder, devices=1):
    """(step, items) of the newest sound checkpoint."""
    saved = newest_sound(folder)
    with go_on(folder) as checkpoints:
        return saved.record.step, checkpoints.restore(abstract(trees(0, devices)))


def best_value(folder, which="best", leaf=None):
    found, items = find_checkpoint(folder, which), {"params": {"w": leaf} if leaf else abstract(trees(0)["params"])}
    found.check(items)
    return float(restore_items(found.folder, found.record, items)["params"]["w"][0, 0])


def largest_file(folder):
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ([3.0, 1.0, 2.0, 2.5, 2.4], [20, 40, 50]),
        ([3.0, 1.0, None, None], [20, 30, 40]),
        ([None, None, None], [20, 30]),
        ([3.0, 2.0, 1.0], [20, 30]),
        ([3.0, math.nan, math.inf, math.nan], [10, 30, 40]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, losses, kept):
    fill(tmp_path, losses)
    assert saved_steps(tmp_path) == kept
    assert not (tmp_path / ".unfinished").exists()
    assert newest_sound(tmp_path).record.step == 10 * len(losses)


def test_several_of_the_best_are_kept_and_some_for_good(tmp_path):
    fill(tmp_path, [5.0, 1.0, 4.0, 2.0, 3.0, 6.0, 7.0], keep=1, best=2, for_good=(10, 50))
    assert saved_steps(tmp_path) == [10, 20, 40, 50, 70]
    with go_on(tmp_path, 1, 0) as checkpoints:
        checkpoints.save(Record(step=80), trees(8))
    assert saved_steps(tmp_path) == [10, 50, 80]


def test_the_newest_comes_back_on_any_number_of_devices(tmp_path):
    fill(tmp_path, [1.0, 2.0])
    for devices in (1, 8):
        (step, items), want = restored(tmp_path, devices), trees(2)
        assert step == 20
        assert items.keys() == want.keys()
        np.testing.assert_array_equal(items["params"]["w"], want["params"]["w"])
        np.testing.assert_array_equal(items["optimizer_state"]["mu"], want["optimizer_state"]["mu"])
        assert items["params"]["w"].sharding.num_devices == devices


def test_parameters_of_the_best_and_of_the_newest(tmp_path):
    fill(tmp_path, [2.0, 1.0, 3.0])
    assert best_value(tmp_path) == 2.0
    assert best_value(tmp_path, "newest") == 3.0


def test_the_best_is_kept_when_a_run_goes_on(tmp_path):
    fill(tmp_path, [2.0, 1.0, 3.0])
    with go_on(tmp_path) as checkpoints:
        for step, val_loss in ((40, 1.5), (50, None), (60, 1.25)):
            checkpoints.save(Record(step=step, val_loss=val_loss), trees(step))
    assert saved_steps(tmp_path) == [20, 50, 60]
    assert best_value(tmp_path) == 2.0


def test_before_any_evaluation_the_best_is_the_newest(tmp_path):
    fill(tmp_path, [None, None])
    assert best_value(tmp_path) == 2.0


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_damage_is_found_and_the_older_checkpoint_restored(tmp_path):
    folder = tmp_path / "checkpoints"
    fill(folder, [1.0, 2.0])
    flip_a_bit(largest_file(folder / "20" / "params"))
    with pytest.raises(
        UserError, match=r"the newest checkpoint .* is damaged \(params/.* has changed\).*--checkpoint best"
    ):
        best_value(folder, "newest")
    assert best_value(folder) == 1.0
    assert restored(folder)[0] == 10
    assert (tmp_path / "damaged" / "20").is_dir()
    # The step can be saved anew.
    with go_on(folder) as checkpoints:
        checkpoints.save(Record(step=20, val_loss=0.5), trees(7))
    assert best_value(folder) == 7.0


def test_sampling_reads_neither_the_optimizer_nor_its_checksums(tmp_path):
    fill(tmp_path, [1.0])
    shutil.rmtree(tmp_path / "10" / "optimizer_state")
    assert best_value(tmp_path) == 1.0


def test_another_shape_or_type_is_refused(tmp_path):
    fill(tmp_path, [1.0])
    for leaf, words in (
        (
            jax.ShapeDtypeStruct((8, 9), jnp.float32),
            r"\['params'\]\['w'\] is float32\[8, 8\] there, float32\[8, 9\] here",
        ),
        (jax.ShapeDtypeStruct((8, 8), jnp.bfloat16), r"is float32\[8, 8\] there, bfloat16\[8, 8\] here"),
    ):
        with pytest.raises(UserError, match=words):
            best_value(tmp_path, leaf=leaf)


def test_what_is_older_than_the_newest_sound_one_is_left_alone(tmp_path):
    fill(tmp_path, [1.0, 2.0])
    flip_a_bit(largest_file(tmp_path / "10"))
    assert restored(tmp_path)[0] == 20
    assert saved_steps(tmp_path) == [10, 20]


@pytest.mark.parametrize(
    ("version", "words"),
    [(1, "got 1; use the older moe_jax that wrote it"), (3, "got 3; install the newer moe_jax that wrote it")],
)
def test_another_format_is_refused(tmp_path, version, words):
    fill(tmp_path, [1.0])
    file = tmp_path / "10" / "record" / "metadata"
    record = json.loads(file.read_text())
    assert record["format_version"] == 2
    file.write_text(json.dumps(record | {"format_version": version}))
    seal(tmp_path / "10")
    for read in (newest_sound, best_value):
        with pytest.raises(UserError, match=rf"must have checkpoint format 2, {words}"):
            read(tmp_path)


def test_the_first_format_had_no_record(tmp_path):
    fill(tmp_path, [1.0])
    (tmp_path / "10" / "record").rename(tmp_path / "10" / "progress")
    seal(tmp_path / "10")
    for read in (newest_sound, best_value):
        with pytest.raises(UserError, match="must have checkpoint format 2, got 1"):
            read(tmp_path)


def test_a_save_that_fails_harms_nothing_is_told_and_tried_again(tmp_path, monkeypatch, caplog):
    fill(tmp_path, [1.0])
    monkeypatch.setattr(checkpoint, "_RETRY_SECONDS", 0.0)
    with go_on(tmp_path) as checkpoints:
        with monkeypatch.context() as full:
            full.setattr(checkpoint, "seal", raise_no_space)
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
    with go_on(tmp_path) as checkpoints:
        checkpoints.save(Record(step=20), trees(2))
        assert not checkpoints.wait()
    assert "step 20 is not saved (0.0 MB are needed and 0.0 MB free)" in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=288))  # 72 numbers of 4 bytes
    fill(tmp_path, [None, None])
    assert saved_steps(tmp_path) == [10, 20]


def test_an_old_checkpoint_that_cannot_be_removed_is_told_and_others_are(tmp_path, monkeypatch, caplog):
    fill(tmp_path, [None, None, None], keep=3)
    remove = shutil.rmtree

    def stubborn(path, **named):
        if "removed-10" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        remove(path, **named)

    monkeypatch.setattr(shutil, "rmtree", stubborn)
    with go_on(tmp_path, 1, 0) as checkpoints:
        checkpoints.save(Record(step=40), trees(4))
        checkpoints.check_saved(40)
        assert not checkpoints.is_retry_due()
    assert saved_steps(tmp_path) == [40]
    assert "the old checkpoint of step 10 cannot be removed (Permission denied)" in caplog.text
    assert "is not saved" not in caplog.text


def test_what_the_disk_cannot_read_is_damage(tmp_path, monkeypatch):
    fill(tmp_path, [1.0, 2.0])
    bad, original = str(largest_file(tmp_path / "20" / "params")), open

    def failing(file, *arguments, **named):
        if str(file) == bad:
            raise OSError(errno.EIO, "Input/output error", bad)
        return original(file, *arguments, **named)

    monkeypatch.setattr(seal_module, "open", failing, raising=False)
    assert "cannot be read: Input/output error" in find_damage(tmp_path / "20")
    assert restored(tmp_path)[0] == 10


def test_a_checkpoint_whose_record_cannot_be_read_may_be_for_good_and_stays(tmp_path):
    fill(tmp_path, [None, None], keep=2)
    (tmp_path / "10" / "record" / "metadata").write_text("{")
    fill(tmp_path, [None, None, None, None], keep=1)
    assert saved_steps(tmp_path) == [10, 40]


def test_a_folder_where_nothing_can_be_written_is_told_at_once(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(OSError, match="checkpoints"):
        Checkpoints(tmp_path / "checkpoints", None, Retention(1, 1))


@pytest.mark.parametrize("name", ["²", "020", "-1", "1e3", "x"])
def test_other_names_are_no_steps(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / "0").mkdir()
    assert saved_steps(tmp_path) == [0]


def raise_no_space(folder):
    raise OSError(errno.ENOSPC, "No space left on device", str(folder))


def test_no_sound_checkpoint_is_told_and_nothing_moved(tmp_path):
    folder = tmp_path / "checkpoints"
    fill(folder, [1.0])
    flip_a_bit(largest_file(folder / "10" / "params"))
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged, the newest one by params"):
        restored(folder)
    assert (folder / "10").is_dir()
    for which in ("best", "newest"):
        with pytest.raises(UserError, match=r"is damaged .* put a copy of it back, or train on"):
            best_value(folder, which)


def test_half_a_checkpoint_is_removed_and_ignored(tmp_path):
    fill(tmp_path, [1.0])
    half = tmp_path / ".unfinished" / "20.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    assert restored(tmp_path)[0] == 10
    assert not half.exists()


def test_sums_hold_every_file(tmp_path):
    fill(tmp_path, [1.0])
    sums = json.loads((tmp_path / "10" / "SHA256SUMS.json").read_text())
    files = {str(file.relative_to(tmp_path / "10")) for file in (tmp_path / "10").rglob("*") if file.is_file()}
    assert set(sums) == files - {"SHA256SUMS.json"}
    assert any(name.startswith("optimizer_state") for name in sums)


def test_nothing_to_restore(tmp_path):
    with go_on(tmp_path / "new"):
        assert newest_sound(tmp_path / "new") is None
    assert newest_sound(tmp_path / "none") is None
    for name in ("new", "none"):
        with pytest.raises(UserError, match="there is no checkpoint in"):
            best_value(tmp_path / name)
