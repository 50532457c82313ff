"""MLflow, the real library on a real SQLite file."""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from moe_jax.config import Config, TrainConfig
from moe_jax.config.fields import settings
from moe_jax.errors import UserError
from moe_jax.runs.layout import RunDirectory
from moe_jax.trackers import mlflow
from moe_jax.trackers.mlflow import MLflow, check_mlflow, end_what_was_left
from tests.end_to_end.faulty import no_file_over
from tests.tiny import ROOT, change

CONFIG = Config(train=TrainConfig(trackers=("mlflow",), mlflow_experiment="tests"))


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of runs: they share one database, whose tables take seconds to create."""
    return tmp_path_factory.mktemp("runs")


def run_in(folder, name):
    run = RunDirectory(folder / name)
    run.path.mkdir()
    return run


def client(folder):
    return MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")


def id_of(run):
    return json.loads(run.mlflow_file.read_text())["run_id"]


@contextlib.contextmanager
def tracked(config, run, restored_step, ending="finished", files=()):
    """The tracker of one start of ``run``, which is closed at the end."""
    tracker = MLflow(config, run, restored_step)
    yield tracker
    tracker.close(ending, files)


def points(folder, run, name):
    return [(point.step, point.value) for point in client(folder).get_metric_history(id_of(run), name)]


def test_settings_metrics_texts_and_pictures_arrive_and_a_resumed_run_goes_on_in_the_same(folder):
    run = run_in(folder, "first")
    picture = run.path / "loss_curve.png"
    with tracked(CONFIG, run, None, "interrupted", [picture]) as tracker:
        tracker.line(5, {"train/loss": 2.5, "moe/load": [[0.5]]})
        tracker.line(5, {"val/loss/a: b?": math.nan})
        tracker.line(10, {"train/loss": 1.5})
        tracker.text(10, "sample", "To be")
        picture.write_bytes(b"picture")
    first_id = id_of(run)
    found = client(folder).get_run(first_id)
    assert (found.info.run_name, found.info.status) == ("first", "KILLED")
    assert found.data.params == {name: str(value) for name, _, value in settings(CONFIG)}
    assert points(folder, run, "train/loss") == [(5, 2.5), (10, 1.5)]
    assert math.isnan(points(folder, run, "val/loss/a: b_")[0][1])
    assert {item.path for item in client(folder).list_artifacts(first_id)} == {"loss_curve.png", "sample"}
    # From the checkpoint of step 5: step 10 comes again, and is the same.
    with tracked(change(CONFIG, train={"num_steps": 2000}), run, 5) as tracker:
        assert client(folder).get_run(first_id).info.status == "RUNNING"
        tracker.line(10, {"train/loss": 1.5})
        tracker.line(15, {"train/loss": 1.0})
    assert id_of(run) == first_id
    assert points(folder, run, "train/loss") == [(5, 2.5), (10, 1.5), (15, 1.0)]
    assert client(folder).get_run(first_id).info.status == "FINISHED"


def test_a_run_that_ends_in_an_error_has_failed(folder):
    run = run_in(folder, "failed")
    with tracked(CONFIG, run, None, "failed"):
        pass
    assert client(folder).get_run(id_of(run)).info.status == "FAILED"


def test_a_server_that_is_away_for_a_while_gets_everything_later(folder, monkeypatch, caplog):
    run = run_in(folder, "away")
    caplog.set_level("WARNING", logger="moe_jax")
    with tracked(CONFIG, run, None) as tracker:
        with monkeypatch.context() as away:

            def refuse(*_arguments, **_values):
                raise MlflowException("the server\nis away")

            away.setattr(MlflowClient, "log_batch", refuse)
            tracker.line(5, {"train/loss": 2.5})
            tracker.line(10, {"train/loss": 1.5})
        assert [record.message for record in caplog.records] == [
            "warning: MLflow does not take what is logged (the server is away); the run goes on"
        ]
        tracker.line(15, {"train/loss": 1.0})
    assert points(folder, run, "train/loss") == [(5, 2.5), (10, 1.5), (15, 1.0)]


def a_nan(metrics):
    return any(math.isnan(metric.value) for metric in metrics)


@pytest.mark.parametrize(("is_refused", "number"), [(a_nan, 1), (lambda metrics: len(metrics) > 200, 0)])
def test_what_a_server_refuses_holds_up_nothing_else(folder, monkeypatch, caplog, is_refused, number):
    run = run_in(folder, f"refused {number}")
    caplog.set_level("WARNING", logger="moe_jax")
    log_batch = MlflowClient.log_batch

    def strict(self, run_id, metrics=(), **others):
        if is_refused(metrics):
            raise MlflowException("Got an invalid value", INVALID_PARAMETER_VALUE)
        log_batch(self, run_id, metrics=metrics, **others)

    monkeypatch.setattr(MlflowClient, "log_batch", strict)
    values = {f"loss/{index}": 1.0 * index for index in range(250)}
    with tracked(CONFIG, run, None) as tracker:
        for step in (5, 10):
            tracker.line(step, values | {"loss/7": math.nan})
    assert points(folder, run, "loss/249") == [(5, 249.0), (10, 249.0)]
    assert len(client(folder).get_run(id_of(run)).data.metrics) == 250 - number
    assert caplog.messages == [
        "warning: MLflow refuses loss/7 of step 5 (Got an invalid value); the run goes on",
        "warning: 2 values have not reached MLflow; metrics.jsonl has them all",
    ] * number  # fmt: skip


def test_a_database_has_its_name_once_its_tables_are_there(tmp_path, monkeypatch):
    run, database = run_in(tmp_path, "a?b#c"), tmp_path / "mlflow.db"
    (tmp_path / ".mlflow.db.123").touch()  # of a start that was killed

    class Client:
        def __init__(self, tracking_uri):
            self.file = Path(tracking_uri.removeprefix("sqlite:///"))

        def search_experiments(self, max_results):
            assert self.file.name != database.name
            assert not database.exists()
            assert [item.name for item in tmp_path.iterdir() if item.name.startswith(".mlflow")] == []
            self.file.write_text("tables")

    monkeypatch.setattr("mlflow.MlflowClient", Client)
    for _ in range(2):
        with mlflow._Store(CONFIG.train, run).client() as found:
            assert found.file.read_text() == database.read_text() == "tables"


def test_an_experiment_that_another_run_has_just_made_is_used(folder, monkeypatch):
    run, find, found = run_in(folder, "at once"), MlflowClient.get_experiment_by_name, []

    def late(self, name):
        found.append(find(self, name))
        if len(found) == 1:
            self.create_experiment(name)
        return found[-1]

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", late)
    MLflow(change(CONFIG, train={"mlflow_experiment": "at once"}), run, None).close("finished", ())
    assert client(folder).get_run(id_of(run)).info.experiment_id == found[-1].experiment_id


@pytest.mark.slow
def test_four_runs_that_start_together_share_a_new_database(tmp_path):
    program = (
        "import sys; from pathlib import Path; from tests.trackers.test_mlflow import *\n"
        "run = run_in(Path(sys.argv[1]), sys.argv[2])\n"
        "with tracked(CONFIG, run, None) as tracker: tracker.line(5, {'train/loss': 2.5})"
    )
    started = [subprocess.Popen([sys.executable, "-c", program, tmp_path, name], cwd=ROOT) for name in "abcd"]
    assert [process.wait(300) for process in started] == [0, 0, 0, 0]
    runs = [RunDirectory(tmp_path / name) for name in "abcd"]
    assert [points(tmp_path, run, "train/loss") for run in runs] == [[(5, 2.5)]] * 4
    assert len({client(tmp_path).get_run(id_of(run)).info.experiment_id for run in runs}) == 1


def test_what_a_killed_run_left_in_mlflow_is_ended_by_its_next_start(folder):
    run, picture = run_in(folder, "killed"), folder / "killed" / "loss_curve.png"
    picture.write_bytes(b"picture")
    end_what_was_left(CONFIG, run, 10, [picture])
    assert not run.mlflow_file.exists(), "no run is begun to end it"
    MLflow(CONFIG, run, None)
    for _ in range(2):
        end_what_was_left(CONFIG, run, 10, [picture])
        assert client(folder).get_run(id_of(run)).info.status == "FINISHED"
    assert [item.path for item in client(folder).list_artifacts(id_of(run))] == ["loss_curve.png"]


@pytest.mark.parametrize("name", ["what? #1 100%", "[a]\\b"])
def test_any_name_of_a_folder_will_do(folder, tmp_path, name):
    other = tmp_path / name
    other.mkdir()
    shutil.copy(folder / "mlflow.db", other)
    run = run_in(other, "$A_$B?")
    (run.path / "picture").touch()
    check_mlflow(CONFIG.train, run)
    config = change(CONFIG, train={"mlflow_experiment": "new"})
    with tracked(config, run, None, files=[run.path / "picture"]) as tracker:
        tracker.line(5, {"train/loss": 2.5})
    assert sorted(item.name for item in other.iterdir()) == ["$A_$B?", "mlflow-artifacts", "mlflow.db"]
    assert len(list((other / "mlflow-artifacts").rglob("picture"))) == 1
    shutil.copy(other / "mlflow.db", tmp_path)
    assert points(tmp_path, run, "train/loss") == [(5, 2.5)]


def test_a_name_that_is_no_text_is_refused_at_the_start(tmp_path):
    with pytest.raises(UserError, match="mlflow needs a --workdir whose path is UTF-8 text"):
        check_mlflow(CONFIG.train, RunDirectory(tmp_path / os.fsdecode(b"\xff")))


URIS = ["http://127.0.0.1:9", "nonsense://x", "sqlite:////dev/null/mlflow.db", "postgresql://127.0.0.1/none"]


@pytest.mark.parametrize("uri", [*URIS, "http://[::1", "postgresql+x://y/z"])
def test_a_server_that_cannot_be_used_is_told_at_the_start(tmp_path, uri):
    config = change(CONFIG, train={"mlflow_uri": uri})
    with pytest.raises(UserError, match=r"MLflow at .* cannot be used .*; correct train.mlflow_uri") as error:
        check_mlflow(config.train, RunDirectory(tmp_path))
    assert "\n" not in str(error.value)


def test_a_full_disk_is_told_once_and_ends_no_run(folder, caplog, capfd):
    run = run_in(folder, "full")
    caplog.set_level("WARNING", logger="moe_jax")
    with tracked(CONFIG, run, None) as tracker:
        tracker.line(5, {"train/loss": 2.5})
        capfd.readouterr()
        with no_file_over(2000):
            for step in (10, 15):
                tracker.line(step, {"train/loss": 1.5})
                tracker.text(step, "sample", "To be " * 1000)
    (said,) = [record.message for record in caplog.records]
    assert re.match(r"warning: MLflow does not take what is logged \(.*disk.*; the run goes on$", said), said
    assert capfd.readouterr().err == "", "no traceback beside it"
    assert points(folder, run, "train/loss") == [(5, 2.5), (10, 1.5), (15, 1.5)]
    assert client(folder).get_run(id_of(run)).info.status == "FINISHED"


def test_a_store_that_fails_in_its_own_way_does_not_end_the_run(folder, monkeypatch, caplog):
    run = run_in(folder, "plugin")
    caplog.set_level("WARNING", logger="moe_jax")

    def refuse(*_arguments, **_values):
        raise ModuleNotFoundError("No module named 'boto3'")

    with tracked(CONFIG, run, None) as tracker:
        monkeypatch.setattr(MlflowClient, "log_text", refuse)
        tracker.text(10, "sample", "To be")
    assert "does not take what is logged (No module named 'boto3'); the run goes on" in caplog.text
    assert client(folder).get_run(id_of(run)).info.status == "FINISHED"


def test_a_file_that_is_no_database_is_told_at_the_start(tmp_path):
    (tmp_path / "mlflow.db").write_text("what is this?" * 100)
    with pytest.raises(UserError, match="cannot be used"):
        check_mlflow(CONFIG.train, RunDirectory(tmp_path / "run"))
    (tmp_path / "mlflow.db").unlink()
    check_mlflow(CONFIG.train, RunDirectory(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == [], "nothing is made before the run is"


def test_an_experiment_that_was_deleted_is_told_at_the_start(folder):
    run = run_in(folder, "orphan")
    client(folder).delete_experiment(client(folder).create_experiment("gone"))
    with pytest.raises(UserError, match=r"train.mlflow_experiment gone has been deleted in MLflow; restore it"):
        check_mlflow(change(CONFIG, train={"mlflow_experiment": "gone"}).train, run)


def test_a_run_begun_on_one_server_begins_anew_on_another(folder, monkeypatch):
    run = run_in(folder, "moved")
    run.mlflow_file.write_text(json.dumps({"uri": "http://old", "run_id": "1"}))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    check_mlflow(CONFIG.train, run)
    MLflow(CONFIG, run, 5).close("finished", ())
    assert client(folder).get_run(id_of(run)).info.status == "FINISHED"
    assert json.loads(run.mlflow_file.read_text())["uri"] == f"sqlite:///{folder / 'mlflow.db'}"


def test_what_the_run_directory_knows_of_mlflow_may_be_removed(folder):
    run = run_in(folder, "damaged")
    run.mlflow_file.write_text("{")
    with pytest.raises(UserError, match=r"mlflow.json is corrupt .*; remove it"):
        check_mlflow(CONFIG.train, run)
    run.mlflow_file.write_text(json.dumps({"uri": None, "run_id": "gone"}))
    with pytest.raises(UserError, match=r"cannot be used .* remove .*mlflow.json for a new MLflow run"):
        check_mlflow(CONFIG.train, run)
    # Before its first checkpoint a run begins anew.
    MLflow(CONFIG, run, None).close("finished", ())
    assert id_of(run) != "gone"


def test_runs_and_their_database_may_move_together(folder, tmp_path):
    run = run_in(folder, "before")
    with tracked(CONFIG, run, None) as tracker:
        tracker.line(5, {"train/loss": 2.5})
    shutil.copytree(folder, tmp_path / "moved")
    moved = RunDirectory(tmp_path / "moved" / "before")
    with tracked(CONFIG, moved, 5) as tracker:
        tracker.line(10, {"train/loss": 1.5})
    assert id_of(moved) == id_of(run)
    assert points(tmp_path / "moved", moved, "train/loss") == [(5, 2.5), (10, 1.5)]


def test_a_password_is_not_kept_nor_shown(folder, monkeypatch, caplog):
    run = run_in(folder, "secret")
    caplog.set_level("INFO", logger="moe_jax")
    address = "postgresql://me:pa:ss@host/db"
    assert mlflow.without_password(address) == "postgresql://me:***@host/db"
    assert mlflow.without_password("sqlite:////home/me/mlflow.db") == "sqlite:////home/me/mlflow.db"
    secret = change(CONFIG, train={"mlflow_uri": address})
    with pytest.raises(UserError) as error:
        check_mlflow(secret.train, run)
    assert "pa:ss" not in str(error.value)
    here = client(folder)
    monkeypatch.setattr(mlflow._Store, "client", lambda self: contextlib.nullcontext(here))  # no such database
    MLflow(secret, run, None).close("finished", ())
    kept = json.dumps(client(folder).get_run(id_of(run)).data.params) + run.mlflow_file.read_text() + caplog.text
    assert "me:***@host" in kept
    assert "pa:ss" not in kept


def test_a_missing_library_is_told_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(mlflow.importlib.util, "find_spec", lambda name: None if name == "alembic" else name)
    with pytest.raises(UserError, match="mlflow needs alembic installed; pip install"):
        check_mlflow(CONFIG.train, RunDirectory(tmp_path))
