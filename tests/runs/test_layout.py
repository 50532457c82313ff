"""The run directory: its configuration, lock and which run is the last."""

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.config import Config, DataConfig, MeshConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from moe_jax.errors import UserError
from moe_jax.files import atomic_file, atomic_write_text
from moe_jax.runs.layout import RunDirectory, latest_run
from moe_jax.runs.resume import check_same_run


@pytest.mark.parametrize(
    "config",
    [
        Config(model=ModelConfig(num_layers=2, moe=MoEConfig(capacity_factor=None)), data=DataConfig(path="x")),
        Config(data=DataConfig(tokenizer="gone/tokenizer.json")),  # a run has a copy of the tokenizer's file
    ],
)
def test_a_configuration_comes_back_as_it_was_saved(tmp_path, config):
    RunDirectory(tmp_path).save_config(config)
    assert RunDirectory(tmp_path).load_config() == config
    assert [item.name for item in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{ not json", "is corrupt"),
        (b"\xff\xfe", "is corrupt"),
        (b"", "is corrupt"),
        (b"[]", "is corrupt"),
        (b'{"model": 3}', "model must be an object"),
        (b'{"model": {"num_layer": 3}}', "did you mean model.num_layers?"),
        (b'{"model": ' * 100_000, "is corrupt"),
        (b'{"data": {"tokenizer": 3}}', "data.tokenizer must be of type str or None"),
        (b'{"model": {"num_layers": "3"}}', "model.num_layers must be of type int"),
        (b'{"model": {"moe": {"top_k": 99}}}', "top_k must be in"),
    ],
)
def test_a_damaged_configuration_is_an_error(tmp_path, content, words):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        RunDirectory(tmp_path).load_config()
    assert words in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="is not a run directory"):
            RunDirectory(path).load_config()


def test_the_last_run_is_the_one_whose_files_changed_last(tmp_path):
    with pytest.raises(UserError, match="there is no run with a checkpoint in"):
        latest_run(tmp_path)
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    for name, time in (("a", 100), ("b", 50)):
        RunDirectory(tmp_path / name).save_config(Config())
        (tmp_path / name / "checkpoints" / "10").mkdir(parents=True)
        os.utime(tmp_path / name / "checkpoints", (time, time))
        os.utime(tmp_path / name / "config.json", (time, time))
    assert latest_run(tmp_path).path == tmp_path / "a"
    (tmp_path / "b" / "metrics.jsonl").touch()
    assert latest_run(tmp_path).path == tmp_path / "b"
    # One that has just started has nothing to sample from.
    RunDirectory(tmp_path / "c").save_config(Config())
    (tmp_path / "c" / "checkpoints" / "10.orbax-checkpoint-tmp").mkdir(parents=True)
    assert latest_run(tmp_path).path == tmp_path / "b"


def test_two_processes_cannot_train_in_one_directory(tmp_path):
    run = RunDirectory(tmp_path / "run")
    program = f"""
from pathlib import Path
from moe_jax.runs.layout import RunDirectory
with RunDirectory(Path({str(run.path)!r})).lock():
    print("locked", flush=True)
    input()
"""
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"process {other.pid} is training in"), run.lock():
            pass
        other.communicate("\n")
    with run.lock():
        assert (run.path / ".lock").read_text() == str(os.getpid())


SAVED = Config(optimizer=OptimizerConfig(decay_steps=1000))


def test_what_may_change_between_two_starts():
    check_same_run(SAVED, Config())
    check_same_run(
        SAVED,
        Config(
            data=DataConfig(path="elsewhere"),
            optimizer=OptimizerConfig(accumulation_steps=4),
            mesh=MeshConfig(data=1),
            train=TrainConfig(num_steps=5000, eval_every=7, log_every=3),
        ),
    )


def test_what_may_not_change_between_two_starts_is_named():
    changed = Config(
        model=ModelConfig(num_layers=5, moe=MoEConfig(top_k=1)),
        data=DataConfig(seed=4),
        optimizer=OptimizerConfig(decay_steps=7),
        train=TrainConfig(seed=4),
    )
    with pytest.raises(UserError) as caught:
        check_same_run(SAVED, changed)
    assert str(caught.value) == (
        "a run cannot go on with other settings: model.num_layers was 4, now 5; model.moe.top_k was 2, now 1; "
        "data.seed was 0, now 4; optimizer.decay_steps was 1000, now 7; train.seed was 0, now 4; "
        "use the old values, or start a new run in another --workdir"
    )


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "file"
    atomic_write_text(file, "old")

    def fill_the_disk():
        with atomic_file(file) as beside:
            beside.write_text("half")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fill_the_disk()
    assert file.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
    atomic_write_text(file, json.dumps({}))
    assert file.read_text() == "{}"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_warning(tmp_path, monkeypatch, caplog, code):
    def refuse(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    run = RunDirectory(tmp_path / "run")
    for _ in range(2):
        run.check_unlocked()
        with run.lock():
            assert (run.path / ".lock").read_text() == str(os.getpid())
    warning = r"warning: the file system of .*/run has no locks, .* second process .*; start only one"
    assert [bool(re.fullmatch(warning, line)) for line in caplog.messages] == [True, True]
    code = errno.EIO  # any other fault is one
    with pytest.raises(OSError, match="Input/output error"), run.lock():
        pass
