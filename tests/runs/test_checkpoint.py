"""Checkpoints: what is kept, what comes back, and damage."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.command import UserError
from moe_jax.runs.checkpoint import Checkpoints, read_progress, restore_items
from moe_jax.runs.layout import saved_steps


def mesh_of(count):
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])


def trees(value, devices=1):
    rows = NamedSharding(mesh_of(devices), PartitionSpec("data"))
    params = {"w": jax.device_put(jnp.arange(64.0).reshape(8, 8) + value, rows)}
    return {"params": params, "optimizer_state": {"mu": jax.device_put(jnp.full((8,), value, jnp.float32), rows)}}


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


def fill(folder, losses, keep=2):
    """Saves steps 10, 20, ... with a validation loss each, None for one that was not evaluated."""
    with Checkpoints(folder, keep=keep) as checkpoints:
        for number, val_loss in enumerate(losses, start=1):
            checkpoints.save(10 * number, trees(number), progress={"number": number}, val_loss=val_loss)


def restored(folder, devices=1):
    with Checkpoints(folder, keep=2) as checkpoints:
        return checkpoints.restore(abstract(trees(0, devices)))


def best_value(folder, which="best"):
    items = {"params": abstract(trees(0)["params"])}
    return float(restore_items(folder, which, items)["params"]["w"][0, 0])


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
    assert read_progress(tmp_path) == {"number": len(losses)}


def test_the_newest_comes_back_on_any_number_of_devices(tmp_path):
    fill(tmp_path, [1.0, 2.0])
    for devices in (1, 8):
        found = restored(tmp_path, devices)
        assert (found.step, found.progress) == (20, {"number": 2})
        want = trees(2)
        assert found.items.keys() == want.keys()
        np.testing.assert_array_equal(found.items["params"]["w"], want["params"]["w"])
        np.testing.assert_array_equal(found.items["optimizer_state"]["mu"], want["optimizer_state"]["mu"])
        assert found.items["params"]["w"].sharding.num_devices == devices


def test_parameters_of_the_best_and_of_the_newest(tmp_path):
    fill(tmp_path, [2.0, 1.0, 3.0])
    assert best_value(tmp_path) == 2.0
    assert best_value(tmp_path, "newest") == 3.0


def test_the_best_is_kept_when_a_run_goes_on(tmp_path):
    fill(tmp_path, [2.0, 1.0, 3.0])
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, val_loss in ((40, 1.5), (50, None), (60, 1.25)):
            checkpoints.save(step, trees(step), progress={}, val_loss=val_loss)
    assert saved_steps(tmp_path) == [20, 50, 60]
    assert best_value(tmp_path) == 2.0


def test_before_any_evaluation_the_best_is_the_newest(tmp_path):
    fill(tmp_path, [None, None])
    assert best_value(tmp_path) == 2.0


def flip_a_bit(folder):
    file = largest_file(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda step: flip_a_bit(step / "params"), "params/.* has changed"),
        (lambda step: largest_file(step / "optimizer_state").unlink(), "optimizer_state/.* is missing"),
        (lambda step: (step / "progress" / "metadata").write_text('{"num'), "progress/metadata has changed"),
        (lambda step: (step / "metrics" / "metrics").write_text("{"), "metrics/metrics has changed"),
        (lambda step: (step / "SHA256SUMS.json").write_text("{"), r"SHA256SUMS.json cannot be read"),
    ],
)
def test_damage_is_found_and_the_older_checkpoint_restored(tmp_path, damage, words):
    folder = tmp_path / "checkpoints"
    fill(folder, [1.0, 2.0])
    damage(folder / "20")
    with pytest.raises(UserError, match=rf"the newest checkpoint .* is damaged \({words}\).*--checkpoint best"):
        best_value(folder, "newest")
    assert best_value(folder) == 1.0
    assert read_progress(folder) == {"number": 1}
    assert restored(folder).step == 10
    assert (tmp_path / "damaged" / "20").is_dir()
    # The step can be saved anew.
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(20, trees(7), progress={}, val_loss=0.5)
    assert best_value(folder) == 7.0


def test_no_sound_checkpoint_is_told_and_nothing_moved(tmp_path):
    folder = tmp_path / "checkpoints"
    fill(folder, [1.0])
    flip_a_bit(folder / "10" / "params")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged, the newest one by params"):
        restored(folder)
    assert (folder / "10").is_dir()
    for which in ("best", "newest"):
        with pytest.raises(UserError, match=r"is damaged .* put a copy of it back, or train on"):
            best_value(folder, which)


def test_half_a_checkpoint_is_removed_and_ignored(tmp_path):
    fill(tmp_path, [1.0])
    (tmp_path / "20.orbax-checkpoint-tmp").mkdir()
    assert restored(tmp_path).step == 10
    assert not (tmp_path / "20.orbax-checkpoint-tmp").exists()


def test_sums_hold_every_file(tmp_path):
    fill(tmp_path, [1.0])
    sums = json.loads((tmp_path / "10" / "SHA256SUMS.json").read_text())
    files = {str(file.relative_to(tmp_path / "10")) for file in (tmp_path / "10").rglob("*") if file.is_file()}
    assert set(sums) == files - {"SHA256SUMS.json"}
    assert any(name.startswith("optimizer_state") for name in sums)


def test_nothing_to_restore(tmp_path):
    assert restored(tmp_path / "new") is None
    assert read_progress(tmp_path / "none") is None
    for name in ("new", "none"):
        with pytest.raises(UserError, match="there is no checkpoint in"):
            best_value(tmp_path / name)
