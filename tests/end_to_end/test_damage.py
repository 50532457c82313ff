"""Every file of a checkpoint deleted, truncated and with one bit changed, one after the other."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.runs.checkpoint.record import Record, newest_sound
from moe_jax.runs.checkpoint.save import Checkpoints, Retention
from moe_jax.runs.checkpoint.seal import SUMS, find_damage

ITEMS = {
    "params": {"w": jnp.arange(64.0).reshape(8, 8), "b": jnp.ones(3)},
    "router_state": {"expert_bias": jnp.zeros((2, 4))},
    "optimizer_state": {"mu": jnp.full((8, 8), 0.5)},
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder with the checkpoints of the steps 10 and 20."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(folder, None, Retention(2, 1)) as checkpoints:
        for step in (10, 20):
            items = jax.tree.map(lambda leaf, step=step: leaf + step, ITEMS)
            checkpoints.save(Record(step=step, progress={"number": step}), items)
    return folder


def delete(file):
    file.unlink()


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1 << len(content) % 8
    file.write_bytes(content)


def check(sound, folder, name, damage):
    """Damages the file ``name`` of the newer checkpoint: it is found and named, and the older one restored."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder / "checkpoints")
    if (folder / "checkpoints" / "20" / name).stat().st_size == 0 and damage is not delete:
        return
    damage(folder / "checkpoints" / "20" / name)
    saved = newest_sound(folder / "checkpoints")
    assert saved is not None
    assert saved.record.step == saved.record.progress["number"] == 10, (name, damage)
    # Damage to the checksums themselves looks like that of the file whose sum was hit.
    assert name in saved.damaged[folder / "checkpoints" / "20"] or name == SUMS, (name, damage)
    if damage is delete:  # whatever happened to the newer one, it is moved and the older restored in the same way
        with Checkpoints(folder / "checkpoints", saved, Retention(2, 1)) as checkpoints:
            items = checkpoints.restore(jax.eval_shape(lambda: ITEMS))
        np.testing.assert_array_equal(items["params"]["w"], np.asarray(ITEMS["params"]["w"]) + 10)
        assert name in find_damage(folder / "damaged" / "20") or name == SUMS, name


def test_any_damage_to_any_file_is_found(sound, tmp_path):
    names = sorted(str(file.relative_to(sound / "20")) for file in (sound / "20").rglob("*") if file.is_file())
    assert {name.split("/")[0] for name in names} >= {*ITEMS, "record", "SHA256SUMS.json"}
    for name in names:
        for damage in (delete, truncate, flip_a_bit):
            check(sound, tmp_path / "run", name, damage)
