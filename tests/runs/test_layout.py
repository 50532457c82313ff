"""The run directory: its configuration, lock and which run is the last."""

import errno
import fcntl
import os
import re
from unittest.mock import Mock

import pytest

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig
from moe_jax.errors import UserError
from moe_jax.runs.layout import RunDirectory, latest_run
from moe_jax.runs.resume import check_same_run


@pytest.mark.parametrize("config", [
    Config(model=ModelConfig(num_layers=2, moe=MoEConfig(capacity_factor=None)), data=DataConfig(path="x")),
    Config(data=DataConfig(tokenizer="gone/tokenizer.json")),  # a run has a copy of the tokenizer's file
    Config(data=DataConfig(path=os.fsdecode(b"\xff"))),
])  # fmt: skip
def test_a_configuration_comes_back_as_it_was_saved(tmp_path, config):
    RunDirectory(tmp_path).save_config(config)
    assert RunDirectory(tmp_path).load_config() == config
    assert [item.name for item in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(("content", "words"), [
    (b"{ not json", "is corrupt"),
    (b"\xff\xfe", "is corrupt"),
    (b"", "is corrupt"),
    (b"[]", "is corrupt"),
    (b'{"model": ' * 100_000, "is corrupt"),
    (b'{"model": 3}', "model must be an object"),
    (b'{"model": {"num_layer": 3}}', "did you mean model.num_layers?"),
    (b'{"model": {"num_layers": "3"}}', "model.num_layers must be of type int"),
    (b'{"model": {"moe": {"top_k": 99}}}', "top_k must be in"),
    (b'{"data": {"tokenizer": 3}}', "data.tokenizer must be of type str or None"),
])  # fmt: skip
def test_a_damaged_configuration_is_an_error(tmp_path, content, words):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path}/config.json.*{re.escape(words)}"):
        RunDirectory(tmp_path).load_config()


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


def test_a_directory_is_trained_in_once_at_a_time(tmp_path):
    run = RunDirectory(tmp_path)
    (run.path / ".lock").write_text("1234567890")  # of a process that was killed
    for _ in range(2):
        with run.lock():
            assert (run.path / ".lock").read_text() == str(os.getpid())
            with pytest.raises(UserError, match=f"process {os.getpid()} is training in"), run.lock():
                pass
            with pytest.raises(UserError, match=f"process {os.getpid()} is training in"):
                run.check_unlocked()


@pytest.mark.parametrize("name", ["", "tensorboard", "checkpoints/.unfinished", "tokenizer/huggingface", "damaged"])
def test_what_is_in_the_place_of_a_folder_is_named(tmp_path, name):
    run = RunDirectory(tmp_path / "run")
    place = run.path / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.touch()
    with pytest.raises(UserError, match=f"{place} must be a folder, but is a file; remove it, or choose another"):
        run.check_folders()
    place.unlink()
    place.symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match=f"{place} must be a folder, but is a link to nothing; remove it"):
        run.check_folders()
    (tmp_path / "other").mkdir()
    run.check_folders()


@pytest.mark.parametrize("name", ["metrics.jsonl", "train.log", "stacks.log", "tokenizer", "metrics.damaged.jsonl"])
def test_a_run_whose_files_lead_elsewhere_is_not_trained_in(tmp_path, name):
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.check_unlocked()
    (tmp_path / "mine").mkdir()
    (run.path / name).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=f"{name} is a link, through which nothing is written; remove it"):
        run.check_unlocked()


def config_of(**sections):
    return Config.from_dict(sections, "here")


SAVED = config_of(optimizer={"decay_steps": 1000})


def test_what_may_change_between_two_starts():
    check_same_run(SAVED, Config())
    free = {"optimizer": {"accumulation_steps": 4}, "train": {"num_steps": 5000, "eval_every": 7, "log_every": 3}}
    check_same_run(SAVED, config_of(data={"path": "elsewhere"}, mesh={"data": 1}, **free))


def test_what_may_not_change_between_two_starts_is_named():
    fixed = {"data": {"seed": 4}, "optimizer": {"decay_steps": 7}, "train": {"seed": 4}}
    with pytest.raises(UserError) as caught:
        check_same_run(SAVED, config_of(model={"num_layers": 5, "moe": {"top_k": 1}}, **fixed))
    assert str(caught.value) == (
        "a run cannot go on with other settings: model.num_layers was 4, now 5; model.moe.top_k was 2, now 1; "
        "data.seed was 0, now 4; optimizer.decay_steps was 1000, now 7; train.seed was 0, now 4; "
        "use the old values, or start a new run in another --workdir"
    )


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_warning(tmp_path, monkeypatch, caplog, code):
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(code, os.strerror(code))))
    run = RunDirectory(tmp_path / "run")
    for _ in range(2):
        run.check_unlocked()
        with run.lock():
            assert (run.path / ".lock").read_text() == str(os.getpid())
    warning = r"warning: the file system of .*/run has no locks, .* second process .*; start only one"
    assert [bool(re.fullmatch(warning, line)) for line in caplog.messages] == [True, True]
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO))))
    with pytest.raises(OSError, match="Input/output error"), run.lock():
        pass
