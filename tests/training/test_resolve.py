"""resolve: every mistake that can be known at the start is reported, and nothing is written."""

import shutil

import jax
import pytest

from moe_jax.errors import UserError
from moe_jax.prepare.cache import find_or_prepare
from moe_jax.runs.checkpoint.record import Record, Saved
from moe_jax.runs.checkpoint.seal import seal
from moe_jax.runs.layout import RunDirectory
from moe_jax.training.train import _progress_of, resolve
from tests.oracles.texts import VERSE
from tests.tiny import CONFIG, change, write_run

HERE = change(CONFIG, data={"batch_size": 8}, optimizer={"warmup_steps": 1}, train={"num_steps": 4})
ELSEWHERE = {"train": {"init_from": "source"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of the text verse.txt, as they are left and damaged, and one that others begin with."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "verse.txt").write_text(VERSE * 50)
    (folder / "short.txt").write_text(VERSE * 2)
    (folder / "file").write_text("mine")
    config = change(HERE, data={"path": str(folder / "verse.txt")})
    dataset = find_or_prepare(config.data, folder / "cache")
    write_run(folder / "source", config)
    write_run(folder / "begun", config, data_fingerprint=dataset.fingerprint)
    for name in ("damaged", "older", "corrupt"):
        shutil.copytree(folder / "begun", folder / name)
    files = [file for file in (folder / "damaged/checkpoints/2/params").rglob("*") if file.is_file()]
    for file in files:
        file.write_bytes(b"?" * file.stat().st_size)
    (folder / "older/checkpoints/2/record").rename(folder / "older/checkpoints/2/progress")
    seal(folder / "older/checkpoints/2")
    shutil.rmtree(folder / "corrupt/checkpoints")
    (folder / "corrupt/config.json").write_text("{")
    return folder


def resolve_here(monkeypatch, folder, workdir, sections):
    monkeypatch.chdir(folder)
    config = change(HERE, **sections)
    return resolve(config, lambda: find_or_prepare(config.data, folder / "cache"), folder / workdir)


@pytest.mark.parametrize(
    ("workdir", "sections", "message"),
    [
        ("file", {}, "file must be a folder, but is a file; remove it, or choose another --workdir"),
        ("cache", {"data": {"path": "cache"}}, "must be another folder than data.path, got .*cache for both"),
        ("corrupt", {}, "corrupt/config.json is corrupt"),
        ("older", {}, "must have checkpoint format 2, got 1; use the older moe_jax that wrote it"),
        ("damaged", {}, "every checkpoint in .* is damaged"),
        # Another run than the one that goes on.
        ("begun", {"train": {"seed": 5}}, "train.seed was 0, now 5"),
        ("begun", {"optimizer": {"learning_rate": 0.5}}, "optimizer.learning_rate was 0.01, now 0.5"),
        ("begun", {"data": {"batch_size": 16}}, "data.batch_size was 8, now 16"),
        ("begun", {"model": {"num_layers": 2}}, "model.num_layers was 1, now 2; use the old values, or start a new"),
        ("source", {}, "the text of verse.txt is not the one this run was trained on"),
        # What the text, the machine and the settings are together.
        ("new", {"data": {"path": "short.txt"}}, "must have at least model.context_length . 1 = 17 tokens, got"),
        ("new", {"mesh": {"data": 9}}, "at most the 8 devices here, got mesh.data=9"),
        ("new", {"data": {"batch_size": 4}}, r"the 8 devices that the batch is divided over \(mesh.data=8\), got 4"),
        ("new", {"moe": {"dispatch": "pallas"}}, "pallas needs a GPU, which this cpu is not"),
        # The run that another begins with.
        ("new", {"train": {"init_from": "nowhere"}}, "train.init_from nowhere: nowhere is not a run directory"),
        ("new", {"train": {"init_from": "damaged"}}, "train.init_from damaged: .* is damaged"),
        ("source/../new", {"train": {"init_from": "new"}}, "init_from must be another run than --workdir, got new"),
        (
            "new",
            {"model": {"embed_dim": 64, "num_layers": 2}, **ELSEWHERE},
            "model.num_layers is 1 there, 2 here; model.embed_dim is 16 there, 64 here; use its settings",
        ),
        ("new", {"model": {"activation": "gelu"}, **ELSEWHERE}, "model.activation is swiglu there, gelu here"),
        ("new", {"data": {"tokenizer": "byte"}, **ELSEWHERE}, "has other tokens than the text here; set data.tokeni"),
    ],
)
def test_a_mistake_is_reported_and_nothing_written(folder, monkeypatch, workdir, sections, message):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "cache" not in path.parts}
    with pytest.raises(UserError, match=message) as caught:
        resolve_here(monkeypatch, folder, workdir, sections)
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "cache" not in path.parts} == before


def test_a_setup_is_what_a_run_is_made_of(folder, monkeypatch):
    new = resolve_here(monkeypatch, folder, "new", {"train": {"num_epochs": 2}, "data": {"mode": "packed"}})
    assert new.config.train.num_steps == new.config.optimizer.decay_steps == 2 * new.steps_per_epoch
    assert (new.saved, new.source) == (None, None)
    assert new.mesh.size == 8
    assert new.backends.keys() == {"training", "evaluation"}
    assert "auto" not in (new.decoder.config.moe.dispatch, new.eval_decoder.config.moe.dispatch)
    assert resolve_here(monkeypatch, folder, "new", {"moe": {"num_experts": 0}}).backends == {}
    # Parameters fit another context, and dropout and memory are free.
    freely = {"model": {"context_length": 8, "dropout_rate": 0.3, "remat": "full"}, **ELSEWHERE}
    assert resolve_here(monkeypatch, folder, "new", freely).source.directory.path.name == "source"
    # The schedule ends where the first start had its end, however many steps there are now; the text may move.
    shutil.copy(folder / "verse.txt", folder / "moved.txt")
    longer = {"train": {"num_steps": 9}, "data": {"path": "moved.txt"}}
    begun = resolve_here(monkeypatch, folder, "begun", longer)
    assert (begun.saved.record.step, begun.config.train.num_steps, begun.config.optimizer.decay_steps) == (2, 9, 4)
    assert not (folder / "new").exists()


def test_a_start_that_died_before_its_first_checkpoint_binds_to_nothing(folder, monkeypatch):
    (folder / "died").mkdir()
    RunDirectory(folder / "died").save_config(change(HERE, train={"seed": 5}))
    assert resolve_here(monkeypatch, folder, "died", {}).config.train.seed == 0


def test_random_numbers_of_another_kind_are_refused(folder, monkeypatch):
    with (
        jax.default_prng_impl("rbg"),
        pytest.raises(UserError, match="cannot go on with other random numbers") as error,
    ):
        resolve_here(monkeypatch, folder, "begun", {})
    assert "unset JAX_DEFAULT_PRNG_IMPL" in str(error.value)


@pytest.mark.parametrize("sections", [{"train": {"seed": 5}}, {"mesh": {"data": 99}}, {"moe": {"dispatch": "pallas"}}])
def test_what_needs_no_text_is_checked_before_one_is_prepared(monkeypatch, folder, sections):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError):
        resolve(change(HERE, **sections), lambda: pytest.fail("the text was prepared"), folder / "begun")


@pytest.mark.parametrize("progress", [
    {},
    {"data_fingerprint": 3},
    {"data_fingerprint": "0", "next_batch": "3"},
    {"data_fingerprint": "0", "next_batch": -1},
    {"data_fingerprint": "0", "skipped_steps": 2**70},
    {"data_fingerprint": "0", "interval": 3},
    {"data_fingerprint": "0", "interval": {"loss": "much"}},
    {"data_fingerprint": "0", "interval": {"loss": [["much"]]}},
    {"data_fingerprint": "0", "interval": {"load": [[1.0], [1.0, 2.0]]}},
    {"data_fingerprint": "0", "interval": [1] * 7},
])  # fmt: skip
def test_a_made_up_record_is_no_start(tmp_path, progress):
    with pytest.raises(UserError, match=f"the record of {tmp_path} is not one of a training .*; put a copy"):
        _progress_of(Saved(tmp_path, Record(step=1, progress=progress), {}))
