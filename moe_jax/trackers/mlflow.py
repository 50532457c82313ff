"""MLflow: a run's settings, metrics, texts and pictures, in a SQLite file or on a server. Imported when used."""

import contextlib
import importlib.util
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.config import Config, TrainConfig
from moe_jax.config.fields import settings
from moe_jax.errors import UserError
from moe_jax.files import atomic_write_text, read_json
from moe_jax.runs.layout import RunDirectory
from moe_jax.trackers.tracker import Tracker
from moe_jax.training.observers import Ending

log = logging.getLogger("moe_jax")

_REQUEST = {"metrics": 1000, "params": 100}
"""As many as MLflow takes in one request."""


class MLflow(Tracker):
    """A run of MLflow: the settings as parameters, metrics by step, pictures and texts as artifacts.

    By default it is in the SQLite file mlflow.db beside the run directory, so that the runs of one folder are compared
    in one place; train.mlflow_uri or MLFLOW_TRACKING_URI name a server. The run's id is kept in the run directory, and
    a resumed run goes on in it. What was logged once is not logged again, for MLflow keeps every point.
    """

    def __init__(self, config: Config, run: RunDirectory, restored_step: int | None):
        self._unsent: list[Any] = []
        self._is_down = False
        store = _Store(config.train, run)
        with store.faults_as_user_errors():
            self._client = store.client()
            # Before its first checkpoint a run binds to nothing, and what it logged was of another one.
            going_on = None if restored_step is None else store.saved_run_id()
            self._id = going_on or store.new_run(self._client, config)
            self._client.update_run(self._id, status="RUNNING")
            names = self._client.get_run(self._id).data.metrics
            self._logged = {
                name: max(point.step for point in self._client.get_metric_history(self._id, name)) for name in names
            }
        log.info(f"MLflow: run {self._id} at {without_password(store.uri)}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for name, value in values.items():
            name = re.sub(r"[^\w\-. /:]", "_", name)
            if step > self._logged.get(name, -1):
                self._unsent.append(Metric(name, value, now, step))
        self._send()

    def _send(self) -> None:
        """Sends what has gathered; while the server is away it gathers on."""
        many = _REQUEST["metrics"]
        while self._unsent and self._try(lambda: self._client.log_batch(self._id, metrics=self._unsent[:many])):
            self._unsent = self._unsent[many:]

    def text(self, step: int, name: str, text: str) -> None:
        self._try(lambda: self._client.log_text(self._id, text, f"{name}/{step:08}.txt"))

    def close(self, ending: Ending, files: Sequence[Path]) -> None:
        for file in files:
            self._try(lambda file=file: self._client.log_artifact(self._id, str(file)))
        self._send()
        if self._unsent:
            log.warning(f"warning: {len(self._unsent)} values have not reached MLflow; metrics.jsonl has them all")
        status = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}[ending]
        self._try(lambda: self._client.set_terminated(self._id, status))

    def _try(self, call: Any) -> bool:
        """Whether ``call`` went through. The first fault in a row is logged; none ends the run."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 - a store is anybody's plug-in, and raises what it likes
            if not self._is_down:
                log.warning(f"warning: MLflow does not take what is logged ({_one_line(error)}); the run goes on")
            self._is_down = True
            return False
        self._is_down = False
        return True


def check_mlflow(train: TrainConfig, run: RunDirectory) -> None:
    """UserError where MLflow is not installed, or its server cannot take this run."""
    missing = [name for name in ("mlflow", "sqlalchemy", "alembic") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"train.trackers mlflow needs {', '.join(missing)} installed; "
            "pip install 'mlflow-skinny>=3.17' alembic 'sqlalchemy<2.1', or leave mlflow out"
        )
    store = _Store(train, run)
    if store.named_uri is None and not store.default_database.exists():
        return  # it is made with the run, and not for one that something else is wrong with
    with store.faults_as_user_errors():
        client = store.client()
        experiment = client.get_experiment_by_name(train.mlflow_experiment)
        if experiment is not None and experiment.lifecycle_stage != "active":
            raise UserError(
                f"train.mlflow_experiment {train.mlflow_experiment} has been deleted in MLflow; restore it there, or "
                "name another"
            )
        saved = store.saved_run_id()
        if saved is not None:
            client.get_run(saved)


@dataclass(frozen=True)
class _Saved:
    """What mlflow.json remembers."""

    uri: str | None
    """None: the default database, wherever the run directory is now."""
    run_id: str


class _Store:
    """The place of a run's metrics in MLflow."""

    def __init__(self, train: TrainConfig, run: RunDirectory):
        self._experiment, self._run = train.mlflow_experiment, run
        self.default_database = run.path.resolve().parent / "mlflow.db"
        self.named_uri = train.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or None
        if self.named_uri is not None and re.match("sqlite:///[^/]", self.named_uri):
            # Relative to the working directory of this start.
            self.named_uri = f"sqlite:///{Path(self.named_uri.removeprefix('sqlite:///')).resolve()}"
        self.uri = self.named_uri or f"sqlite:///{self.default_database}"

    def client(self) -> Any:
        # It would otherwise call home, and repeat a failed request for minutes.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it logs each table that it creates
        # It prints a traceback of every fault of the database beside raising it, which we report once.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        return MlflowClient(tracking_uri=self.uri)

    @contextlib.contextmanager
    def faults_as_user_errors(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - a store is anybody's plug-in, and raises what it likes
            file = self._run.mlflow_file
            begun = f", remove {file} for a new MLflow run" if file.exists() else ""
            raise UserError(
                f"MLflow at {without_password(self.uri)} cannot be used ({_one_line(error)}); "
                f"correct train.mlflow_uri, start the server{begun}, or leave mlflow out of train.trackers"
            ) from None

    def _shown_uri(self) -> str | None:
        return None if self.named_uri is None else without_password(self.named_uri)

    def saved_run_id(self) -> str | None:
        """The MLflow run that an earlier start began in the same place; None without one."""
        file = self._run.mlflow_file
        if not file.exists():
            return None
        saved = read_json(file, _Saved, "remove it for a new MLflow run")
        return saved.run_id if saved.uri == self._shown_uri() else None

    def new_run(self, client: Any, config: Config) -> str:
        """Creates a run, and its experiment if there is none; its id is kept in the run directory."""
        from mlflow.entities import Param

        run = self._run
        if run.mlflow_file.exists():
            log.info(f"a new MLflow run begins: that of {run.mlflow_file} is of another server or of an earlier try")
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            # A server knows where artifacts go; beside a file they would otherwise go to the working directory.
            beside = run.path.resolve().parent / "mlflow-artifacts"
            location = beside.as_uri() if self.uri.startswith("sqlite:") else None
            experiment_id = client.create_experiment(self._experiment, artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
        run_id = client.create_run(experiment_id, run_name=run.path.resolve().name).info.run_id
        parameters = [Param(name, without_password(str(value))) for name, _, value in settings(config)]
        for start in range(0, len(parameters), _REQUEST["params"]):
            client.log_batch(run_id, params=parameters[start : start + _REQUEST["params"]])
        saved = json.dumps({"uri": self._shown_uri(), "run_id": run_id})
        atomic_write_text(run.mlflow_file, saved + "\n")
        return run_id


def without_password(uri: str) -> str:
    """``uri`` as it may be shown and kept."""
    return re.sub(r"//([^/@:]*):[^/@]*@", r"//\1:***@", uri)


def _one_line(error: BaseException) -> str:
    return without_password(" ".join(str(error).split())[:300])
