"""Two real processes of one run: each writes its shards, and the first alone writes what is there once."""

import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.runs.checkpoint.record import newest_sound
from moe_jax.runs.checkpoint.restore import restore_items
from moe_jax.runs.layout import saved_steps
from moe_jax.runs.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]
PROGRAM = """
import errno, shutil, sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

index, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)

from moe_jax.config import Config
from moe_jax.runs.checkpoint import save
from moe_jax.runs.checkpoint.record import Record, newest_sound
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.log import log, start_log
from moe_jax.runs.metrics_file import MetricsFile

mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
run, retention = RunDirectory(folder), save.Retention(newest=1, best=0)

def items(value):
    w = (np.arange(256, dtype=np.float32) / 3 + value).reshape(64, 4)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    return {"params": {"w": jax.make_array_from_callback(w.shape, rows, lambda at: w[at])}}

def not_here(*arguments, **named):
    raise AssertionError("only the first process does this")

def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")

if index:
    save.seal = save.check_space = shutil.rmtree = Path.rename = Path.replace = not_here
run.check_unlocked()
with run.lock(), start_log(run.log_file), jax.set_mesh(mesh), MetricsFile(run, None) as metrics:
    run.save_config(Config())
    log.info(f"hello from {index}")
    metrics.write(10, {"train/loss": 1.0 + index})
    with save.Checkpoints(run.checkpoints, None, retention) as checkpoints:
        checkpoints.save(Record(step=10), items(1))
        checkpoints.check_saved(10)
        for name in ("seal", "check_space"):  # each process learns of what fails in the first
            original = getattr(save, name)
            if not index:
                setattr(save, name, full)
            checkpoints.save(Record(step=20), items(2))
            assert not checkpoints.wait() and not checkpoints.is_retry_due()
            setattr(save, name, original)
        checkpoints.save(Record(step=30), items(3))
        checkpoints.check_saved(30)
    with save.Checkpoints(run.checkpoints, newest_sound(run.checkpoints), retention) as checkpoints:
        restored = checkpoints.restore(items(0))["params"]["w"]
    for got, want in zip(restored.addressable_shards, items(3)["params"]["w"].addressable_shards, strict=True):
        np.testing.assert_array_equal(got.data, want.data)
print("done")
"""


@pytest.mark.slow
def test_two_processes_save_and_restore_a_checkpoint(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    run = tmp_path / "[run] a\\b"
    command = [sys.executable, "-c", PROGRAM]
    started = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, index, port, run], **started) for index in "01"]
    try:
        outputs = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert all("done" in out for out, _ in outputs)
    assert "hello from 0" in outputs[0][0]
    assert "hello" not in outputs[1][0]
    log = (run / "train.log").read_text()
    assert log.count("hello") == 1
    assert log.count("the checkpoint of step 20 is not saved (No space left on device)") == 2
    assert "step 20 is not saved (another process could not write it)" in outputs[1][0]
    assert [line["train/loss"] for line in read_metrics(run / "metrics.jsonl")] == [1.0]
    assert saved_steps(run / "checkpoints") == [30]
    # One process, with one device, reads the same bits; each process had written its own.
    saved = newest_sound(run / "checkpoints")
    shape = jax.ShapeDtypeStruct((64, 4), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    w = restore_items(saved.folder, saved.record, {"params": {"w": shape}})["params"]["w"]
    np.testing.assert_array_equal(w, (np.arange(256, dtype=np.float32) / 3 + 3).reshape(64, 4))
    written = sorted(file.name for file in (saved.folder / "params").glob("ocdbt.process_*"))
    assert written == ["ocdbt.process_0", "ocdbt.process_1"]
