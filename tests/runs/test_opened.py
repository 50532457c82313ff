"""A trained run, opened for reading."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, SampleConfig
from moe_jax.data.tokenizer import ByteTokenizer, CharTokenizer
from moe_jax.data.tokenizer_file import fingerprint, save_tokenizer
from moe_jax.errors import UserError
from moe_jax.runs.checkpoint import restore
from moe_jax.runs.checkpoint.record import Found, Record
from moe_jax.runs.checkpoint.save import Checkpoints, Retention
from moe_jax.runs.checkpoint.seal import seal
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.opened import open_run

PARAMS = {"params": {"w": jax.ShapeDtypeStruct((8,), jnp.float32)}}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The run runs/tiny of the working folder, whose better checkpoint is the older one."""
    monkeypatch.chdir(tmp_path)
    run = RunDirectory(tmp_path / "runs" / "tiny")
    run.path.mkdir(parents=True)
    run.save_config(Config())
    tokenizer = ByteTokenizer("endoftext")
    save_tokenizer(tokenizer, run.tokenizer)
    remembered = {"config": Config().to_dict(), "tokenizer": fingerprint(tokenizer)}
    with Checkpoints(run.checkpoints, None, Retention(2, 1)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(
                Record(step=step, val_loss=1.0 * step, **remembered), {"params": {"w": jnp.full(8, 1.0 * step)}}
            )
    return run


@pytest.mark.parametrize(("which", "step"), [("best", 1), ("newest", 2)])
def test_an_opened_run_has_all_that_sampling_needs(run, which, step):
    for workdir in (run.path, None):
        opened = open_run(workdir, which)
        assert (opened.directory.path.resolve(), opened.is_latest) == (run.path, workdir is None)
        assert (opened.config, opened.tokenizer.name, opened.checkpoint.record.step) == (Config(), "byte", step)
        assert opened.restore(PARAMS)["params"]["w"][0] == step


@pytest.mark.parametrize(("name", "words"), [
    ("config.json", "is not a run directory"),
    ("tokenizer/tokenizer.json", "no tokenizer at"),
    ("checkpoints/2/record/metadata", r"newest .* is damaged \(record/metadata is missing\).*--checkpoint best"),
])  # fmt: skip
def test_what_is_missing_is_found_before_any_array_is_read(run, name, words):
    (run.path / name).unlink()
    with pytest.raises(UserError, match=words):
        open_run(run.path, "newest")


def test_damaged_arrays_are_found_when_they_are_asked_for(run):
    next((run.checkpoints / "1" / "params").rglob("d/*")).unlink()
    opened = open_run(run.path, "best")
    with pytest.raises(UserError, match=r"is damaged \(params/.* is missing\).*, or use --checkpoint newest"):
        opened.restore(PARAMS)


def test_what_a_user_puts_beside_the_items_of_a_checkpoint_is_no_damage(run):
    (run.checkpoints / "2" / "NOTES.md").write_text("the one of the paper")
    assert open_run(run.path, "newest").restore(PARAMS)["params"]["w"][0] == 2


def test_arrays_of_another_model_are_refused(run):
    another = {"params": {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}}
    words = r"checkpoints/1 is not of the model that .* \(\['params'\]\['w'\] is float32\[8\] there, float32\[4\] here"
    with pytest.raises(UserError, match=words):
        open_run(run.path, "best").restore(another)


@pytest.mark.parametrize(("owner", "name"), [(Found, "check"), (restore, "restore_items")])
def test_a_checkpoint_that_a_training_removes_meanwhile_is_chosen_anew(run, monkeypatch, owner, name):
    opened, read = open_run(run.path, "best"), getattr(owner, name)

    def late(*arguments):
        shutil.rmtree(run.checkpoints / "1", ignore_errors=True)
        return read(*arguments)

    monkeypatch.setattr(owner, name, late)
    opened.check(PARAMS)
    assert opened.restore(PARAMS)["params"]["w"][0] == 2
    assert opened.checkpoint.record.step == 2


def test_checkpoints_that_come_and_go_faster_than_they_are_read(run, monkeypatch):
    opened = open_run(run.path, "newest")
    monkeypatch.setattr(Path, "exists", lambda path: False)
    with pytest.raises(UserError, match=r"replaces the checkpoints of .* faster than they can be read; wait for it"):
        opened.check(["params"])


@pytest.mark.parametrize(("changed", "words"), [
    (Config(ModelConfig(moe=MoEConfig(top_k=1))), "model.moe.top_k was 2, now 1; put the old"),
    (Config(ModelConfig(moe=MoEConfig(renormalise=False))), "model.moe.renormalise was True, now False"),
    (Config(ModelConfig(moe=MoEConfig(routed_scaling_factor=2.0))), "routed_scaling_factor was 1.0, now 2.0"),
    (Config(ModelConfig(rope_theta=500.0)), "model.rope_theta was 10000.0, now 500.0"),
    (Config(data=DataConfig(mode="padded")), "data.mode was windows, now padded"),
])  # fmt: skip
def test_a_configuration_that_was_changed_behind_the_checkpoint_is_refused(run, changed, words):
    run.save_config(changed)
    with pytest.raises(UserError, match=rf"config.json is not the one that the checkpoint was made with: .*{words}"):
        open_run(run.path, "newest")


def test_what_decides_no_number_may_be_changed(run):
    free = Config(
        ModelConfig(remat="full", moe=MoEConfig(dispatch="ragged")),
        DataConfig(path="elsewhere", batch_size=8),
        sample=SampleConfig(temperature=0.5),
    )
    run.save_config(free)
    assert open_run(run.path, "newest").config == free


def reseal(run, **values):
    """Changes the record of the newest checkpoint as somebody who seals it again can; None takes a value out."""
    folder = run.checkpoints / "2"
    content = json.loads((folder / "record" / "metadata").read_text()) | values
    content = {name: value for name, value in content.items() if value is not None}
    (folder / "record" / "metadata").write_text(json.dumps(content))
    seal(folder)


def test_a_tokenizer_that_was_changed_behind_the_checkpoint_is_refused(run):
    save_tokenizer(CharTokenizer("ab", "endoftext"), run.tokenizer)
    with pytest.raises(UserError, match=r"tokenizer in .*/tokenizer is not the one that the checkpoint was made with"):
        open_run(run.path, "newest")
    reseal(run, tokenizer=None)  # a checkpoint of before does not know
    assert open_run(run.path, "newest").tokenizer.name == "char"


def deep(levels):
    return [deep(levels - 1)] if levels else 0


MADE_UP = [
    ({"format_version": 3}, "must have checkpoint format 2, got 3; install the newer moe_jax"),
    ({"format_version": "2"}, "record/metadata: Expected `int`, got `str`"),
    ({"step": None}, "missing required field `step`"),
    *(({"step": value}, "record/metadata: Expected `int`") for value in ("2", [], -1, 2**40, 1.5)),
    *(({"val_loss": value}, "record/metadata: Expected `float") for value in ("low", {}, [1.0])),
    *(({"for_good": value}, "record/metadata: Expected `bool`") for value in (1, "yes")),
    *(({"shapes": value}, "record/metadata: Expected") for value in ([], 3, {"a": 3}, {"a": None})),
    *(
        ({name: value}, "record/metadata: Expected `object`")
        for name in ("progress", "random")
        for value in ([], 3, "x")
    ),
    ({"progress": {"interval": [[[]]] * 3}, "random": {"a": deep(70)}}, "more than 64 levels deep"),
    ({"shapes": {"a": f"float32[{'9' * 5000}]"}}, "record/metadata: Expected `str` of length <= 200"),
    ({"config": []}, "record/metadata: Expected `object`"),
    ({"config": {"model": 3}}, "model must be an object of settings, got 3"),
    ({"config": {"modell": {}}}, "there is no setting modell; did you mean model?"),
    ({"config": {"model": {"moe": []}}}, "model.moe must be an object of settings"),
    ({"config": {"model": {"embed_dim": "128"}}}, "model.embed_dim was 128, now 128"),
    ({"tokenizer": 5}, "record/metadata: Expected `str | null`"),
]


def test_a_made_up_record_is_an_error_whatever_its_checksums_say(run):
    whole = (run.checkpoints / "2" / "record" / "metadata").read_text()
    for values, words in MADE_UP:
        (run.checkpoints / "2" / "record" / "metadata").write_text(whole)
        reseal(run, **values)
        with pytest.raises(UserError) as raised:
            open_run(run.path, "newest")
        assert words in str(raised.value), values
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "words"), [
    ("config.json", "config.json must be a regular file, got a FIFO"),
    ("tokenizer/tokenizer.json", "tokenizer.json must be a regular file, got a FIFO"),
    ("checkpoints/2/SHA256SUMS.json", "SHA256SUMS.json cannot be read"),
    ("checkpoints/2/record/metadata", "record/metadata is no regular file"),
    ("checkpoints/2/params/_METADATA", "params/_METADATA is no regular file"),
    ("checkpoints/2/params/more", "params/more is not in SHA256SUMS.json"),
])  # fmt: skip
def test_what_would_hang_is_refused_at_once(run, name, words):
    (run.path / name).unlink(missing_ok=True)
    os.mkfifo(run.path / name)
    with pytest.raises(UserError, match=words):
        open_run(run.path, "newest").restore(PARAMS)


def test_a_terabyte_without_content_is_not_read(run):
    for name in ("record/metadata", "params/_METADATA"):
        with open(run.checkpoints / "2" / name, "r+b") as file:
            file.truncate(1 << 40)
        with pytest.raises(UserError, match=f"damaged .*{name} must have at most .* bytes, and has 1,099,511"):
            open_run(run.path, "newest").restore(PARAMS)
        (run.checkpoints / "2" / name).unlink()
        shutil.copy(run.checkpoints / "1" / name, run.checkpoints / "2" / name)
        seal(run.checkpoints / "2")


def test_a_checkpoint_may_be_made_of_links(run, tmp_path):
    """As in folders that are shared, or on another disk."""
    (tmp_path / "store").mkdir()
    for number, file in enumerate(file for file in run.path.rglob("*") if file.is_file()):
        file.rename(tmp_path / "store" / str(number))
        file.symlink_to(tmp_path / "store" / str(number))
    run.checkpoints.rename(tmp_path / "store" / "checkpoints")
    run.checkpoints.symlink_to(tmp_path / "store" / "checkpoints")
    assert open_run(run.path, "newest").restore(PARAMS)["params"]["w"][0] == 2


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_sealed_files_that_are_no_arrays_are_one_line(run, name):
    (run.checkpoints / "2" / "params" / name).write_bytes(b"\xff" * 100)
    seal(run.checkpoints / "2")
    with pytest.raises(
        UserError, match=r"2 cannot be restored, although its checksums are right \([^\n]*\); put a copy"
    ):
        open_run(run.path, "newest").restore(PARAMS)
