"""What moe_jax.evaluate prints of a run: the loss of its own log, that of other texts, and what it refuses."""

import json
import math
import shutil

import numpy as np
import pytest

from moe_jax.commands import scoring
from moe_jax.commands.scoring import _dataset, score
from moe_jax.commands.training import train
from moe_jax.config import Config, DataConfig
from moe_jax.data.dataset import open_dataset
from moe_jax.data.tokenizer import ByteTokenizer
from moe_jax.errors import EnvironmentFault, UserError
from moe_jax.files import cache_folder
from moe_jax.prepare import cache
from moe_jax.prepare.cache import find_or_prepare
from moe_jax.prepare.folder import prepare_folder
from moe_jax.prepare.settings import PrepareConfig
from moe_jax.runs.checkpoint.record import Found, Record
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.metrics_file import read_metrics
from moe_jax.runs.opened import OpenedRun, open_run
from tests import tiny as runs
from tests.oracles.texts import VERSE


def scores_of(run, path, split, which):
    return score(open_run(run.path, which), path, split)


def last_evaluation(run):
    return [line for line in read_metrics(run.metrics_file) if "val/loss" in line][-1]


def test_it_finds_the_loss_that_the_run_logged(finished):
    logged = last_evaluation(finished)
    scores = scores_of(finished, None, "val", "newest")
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert scores[name] == pytest.approx(logged[f"val/{name}"], rel=1e-6)
    assert scores["moe/load"] == logged["moe/load"]
    assert scores["tokens"] == 450
    assert "loss_over_padding" not in scores


def test_a_device_with_too_little_memory_is_one_line(finished, monkeypatch):
    def exhausted(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8.00GiB.")

    monkeypatch.setattr(scoring, "evaluate", exhausted)
    with pytest.raises(EnvironmentFault, match=r"allocate 8\.00GiB; leave a GPU with JAX_PLATFORMS=cpu"):
        scores_of(finished, None, "val", "newest")


def test_a_run_of_another_machine_is_scored_here(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "copy")
    run = RunDirectory(tmp_path / "copy")
    run.save_config(runs.change(run.load_config(), moe={"dispatch": "pallas"}))
    here = scores_of(run, None, "val", "newest")
    assert here["loss"] == pytest.approx(last_evaluation(run)["val/loss"], rel=1e-6)


def test_the_best_checkpoint_is_the_default_of_what_is_best(finished):
    losses = [line["val/loss"] for line in read_metrics(finished.metrics_file) if "val/loss" in line]
    assert scores_of(finished, None, "val", "best")["loss"] == pytest.approx(min(losses), rel=1e-6)


def test_another_text_is_tokenized_as_the_runs_was(finished, tmp_path):
    text = tmp_path / "other.txt"
    text.write_text("lazy dogs jump over foxes; " * 200)
    raw = scores_of(finished, str(text), "val", "best")
    made = PrepareConfig(
        input=(str(text),), tokenizer=str(finished.tokenizer), val_fraction=0.1, out=str(tmp_path / "made")
    )
    prepare_folder(made)
    assert scores_of(finished, made.out, "val", "best") == raw
    assert raw["loss"] > last_evaluation(finished)["val/loss"] + 0.5
    assert raw["tokens"] < scores_of(finished, made.out, "train", "best")["tokens"]


@pytest.mark.slow
def test_a_text_is_delimited_and_split_as_the_runs_was(small, tmp_path):
    text = tmp_path / "verse.txt"
    text.write_text(VERSE * 60)
    prepare_folder(
        PrepareConfig(
            input=(str(text),), tokenizer="char", delimiters="chat", val_fraction=0.3, out=str(tmp_path / "made")
        )
    )
    config = small(
        data={"path": str(tmp_path / "made"), "tokenizer": None, "val_fraction": 0.3},
    )
    made = open_dataset(tmp_path / "made")
    run = runs.write_run(tmp_path / "run", config, data_fingerprint=made.fingerprint, tokenizer=made.tokenizer)
    own = scores_of(run, None, "val", "newest")
    assert scores_of(run, str(text), "val", "newest") == own
    trained_on = scores_of(run, None, "train", "newest")
    every = scores_of(run, str(text), "all", "newest")
    assert every["tokens"] == own["tokens"] + trained_on["tokens"]
    mean = (own["loss"] * own["tokens"] + trained_on["loss"] * trained_on["tokens"]) / every["tokens"]
    assert every["loss"] == pytest.approx(mean, rel=1e-9)
    assert every["bits_per_byte"] == pytest.approx(every["loss"] * every["tokens"] / (60 * len(VERSE) * math.log(2)))


def test_a_short_text_is_scored_and_the_part_that_is_scored_is_named(finished, tmp_path, capsys):
    text, prepared = tmp_path / "q.txt", tmp_path / "prepared"
    text.write_text("the lazy dog jumps over the quick fox now")
    assert scores_of(finished, str(text), "all", "best")["tokens"] == 41
    assert capsys.readouterr().err == f"note: scoring {text}: all of it\n"
    scores_of(finished, str(text), "val", "best")
    assert capsys.readouterr().err == f"note: scoring {text}: the val split, 5 of 43 tokens\n"
    # A test set, whose training part is there only because every folder has one.
    (tmp_path / "few.txt").write_text("a")
    inputs = {"input": (str(tmp_path / "few.txt"),), "val_input": (str(text),), "tokenizer": str(finished.tokenizer)}
    prepare_folder(PrepareConfig(**inputs, out=str(prepared)))
    assert scores_of(finished, str(prepared), "val", "best")["tokens"] == 41
    assert scores_of(finished, str(prepared), "train", "best")["tokens"] == 1
    # Nothing can be held out of one character.
    assert scores_of(finished, str(tmp_path / "few.txt"), "all", "best")["tokens"] == 1
    with pytest.raises(UserError, match=r"few.txt has no token to score in val; give more text, or set --split all"):
        scores_of(finished, str(tmp_path / "few.txt"), "val", "best")


def test_a_text_that_has_changed_since_is_refused(finished, change, tmp_path):
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(finished.path, run.path)
    (tmp_path / "verse.txt").write_text(VERSE[::-1] * 100)
    run.save_config(change(data={"path": str(tmp_path / "verse.txt")}))
    with pytest.raises(UserError, match="is not the one this run was trained on"):
        scores_of(run, None, "val", "newest")


def test_rows_of_documents_are_scored_without_their_padding_and_with_it(small, tmp_path):
    folder = tmp_path / "stories"
    folder.mkdir()
    for index in range(40):
        (folder / f"{index}.txt").write_text(VERSE[: 5 + index])
    config = small(data={"path": str(folder), "mode": "padded"}, train={"num_steps": 2})
    train(config, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    interval = read_metrics(run.metrics_file)[0]
    assert interval["train/positions_per_second"] > interval["train/tokens_per_second"]
    scores = scores_of(run, None, "val", "newest")
    assert scores["loss"] == pytest.approx(last_evaluation(run)["val/loss"], rel=1e-6)
    # A document's characters and its end are scored, up to 16 of them in a row of 16 places.
    (split,) = find_or_prepare(config.data, cache_folder("data")).splits("val")
    lengths = np.asarray(split.lengths())
    assert scores["tokens"] == lengths.sum()
    filled = lengths.sum() / (16 * np.ceil(lengths / 16).sum())
    assert scores["loss_over_padding"] == pytest.approx(scores["loss"] * filled, rel=1e-9)


def test_the_command_prints_one_json_object(finished, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(finished.path)
    done = runs.command(tmp_path, "-m", "moe_jax.evaluate", "--split", "train")
    assert (done.returncode, done.stderr) == (0, "note: scoring runs/mine, the run that changed last\n")
    scores = json.loads(done.stdout)
    assert (done.stdout.count("\n"), scores["tokens"]) == (1, 4050)


def test_no_data_set_is_fetched_that_only_the_settings_of_a_run_name(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "prepare_folder", None)
    config, found = Config(data=DataConfig(path="hf:somebody/something")), Found("best", {}, Record(step=1))
    opened = OpenedRun(RunDirectory(tmp_path), config, ByteTokenizer("endoftext"), found, False)
    with pytest.raises(UserError, match=r"not on this machine .*; add --data hf:somebody/something"):
        _dataset(opened, None)
