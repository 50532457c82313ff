"""MLflow: a run's settings, metrics, texts and pictures, in a SQLite file or on a server. Imported when used."""

import contextlib
import fcntl
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
from moe_jax.files import atomic_file, atomic_write_text, plain_name, read_json, remove_leftovers
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
        self._many = _REQUEST["metrics"]
        self._refused = 0
        self._is_down = False
        self._open = contextlib.ExitStack()
        store = _Store(config.train, run)
        with store.faults_as_user_errors():
            self._client = self._open.enter_context(store.client())
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
        """Sends what has gathered; while the server is away it gathers on. What is refused holds up nothing else."""
        while self._unsent:
            batch, refusals = self._unsent[: self._many], []
            if not self._try(lambda: self._log(batch, refusals)):  # noqa: B023 - called at once
                self._many = max(1, len(batch) // 2)  # it may have been too much at once
                return
            if refusals and len(batch) > 1:
                self._many = len(batch) // 2
                continue
            if refusals and not self._refused:
                what = f"{batch[0].key} of step {batch[0].step}"
                log.warning(f"warning: MLflow refuses {what} ({_one_line(refusals[0])}); the run goes on")
            self._refused += len(refusals)
            del self._unsent[: len(batch)]
            self._many = min(2 * self._many, _REQUEST["metrics"])

    def _log(self, metrics: list[Any], refusals: list[Exception]) -> None:
        """Adds what MLflow says to ``refusals`` where it would say the same again."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(self._id, metrics=metrics)
        except MlflowException as error:
            if error.get_http_status_code() != 400:
                raise
            refusals.append(error)

    def text(self, step: int, name: str, text: str) -> None:
        self._try(lambda: self._client.log_text(self._id, text, f"{name}/{step:08}.txt"))

    def close(self, ending: Ending, files: Sequence[Path]) -> None:
        for file in files:
            self._try(lambda file=file: self._client.log_artifact(self._id, str(file)))
        self._send()
        lacking = len(self._unsent) + self._refused
        if lacking:
            log.warning(f"warning: {lacking} values have not reached MLflow; metrics.jsonl has them all")
        status = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}[ending]
        self._try(lambda: self._client.set_terminated(self._id, status))
        self._open.close()

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
    try:
        str(run.path.resolve()).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"train.trackers mlflow needs a --workdir whose path is UTF-8 text, got {run.path.resolve()}; choose "
            "another, or leave mlflow out"
        ) from None
    store = _Store(train, run)
    if (store.named_uri or "").startswith("sqlite:///~"):  # a folder called ~ would be made
        raise UserError(f"train.mlflow_uri must be without ~, got {store.named_uri}; write the whole path")
    if store.named_uri is None and not store.default_database.exists():
        return  # it is made with the run, and not for one that something else is wrong with
    with store.faults_as_user_errors(), store.client() as client:
        experiment = client.get_experiment_by_name(train.mlflow_experiment)
        if experiment is not None and experiment.lifecycle_stage != "active":
            raise UserError(
                f"train.mlflow_experiment {train.mlflow_experiment} has been deleted in MLflow; restore it there, or "
                "name another"
            )
        saved = store.saved_run_id()
        if saved is not None:
            client.get_run(saved)


def end_what_was_left(config: Config, run: RunDirectory, step: int, files: Sequence[Path]) -> None:
    """Ends the MLflow run of a finished run that was killed before it could. Raises UserError."""
    store = _Store(config.train, run)
    saved = store.saved_run_id()
    if saved is None:
        return
    with store.faults_as_user_errors(), store.client() as client:
        is_left = client.get_run(saved).info.status == "RUNNING"
    if is_left:
        MLflow(config, run, step).close("finished", files)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Within it no other process is within it for the same ``folder``, where the file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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
        self.database: Path | None = self.default_database if self.named_uri is None else None
        """The file that it is, if it is one."""
        if self.named_uri is not None and re.fullmatch("sqlite:///[^?~][^?]*", self.named_uri):
            # Relative to the working directory of this start.
            self.database = Path(self.named_uri.removeprefix("sqlite:///")).resolve()
            self.named_uri = f"sqlite:///{self.database}"
        self.uri = self.named_uri or f"sqlite:///{self.database}"

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        """Of the server or the database, which is made if there is none."""
        # It would otherwise call home, and repeat a failed request for minutes.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it logs each table that it creates
        # It prints a traceback of every fault of the database beside raising it, which we report once.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        if self.database is None:
            yield MlflowClient(tracking_uri=self.uri)
            return
        if self.named_uri is None:
            self.database.parent.mkdir(parents=True, exist_ok=True)
        with plain_name(self.database.parent) as folder:  # an address, where ? and # have a meaning
            file = folder / self.database.name
            with _one_at_a_time(folder):
                if not file.exists():
                    remove_leftovers(file)
                    # MLflow cannot go on with half of the tables, as a kill would leave them.
                    with atomic_file(file) as beside:
                        MlflowClient(tracking_uri=f"sqlite:///{beside}").search_experiments(max_results=1)
            yield MlflowClient(tracking_uri=f"sqlite:///{file}")

    @contextlib.contextmanager
    def faults_as_user_errors(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - a store is anybody's plug-in, and raises what it likes
            file = self._run.mlflow_file
            begun = f", remove {file} for a new MLflow run" if file.exists() else ""
            remedy = "correct train.mlflow_uri, start the server"
            if self.named_uri is None:
                remedy = "move that file away for a new database, or set train.mlflow_uri"
            raise UserError(
                f"MLflow at {without_password(self.uri)} cannot be used ({_one_line(error)}); "
                f"{remedy}{begun}, or leave mlflow out of train.trackers"
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
        from mlflow.exceptions import MlflowException

        run = self._run
        if run.mlflow_file.exists():
            log.info(f"a new MLflow run begins: that of {run.mlflow_file} is of another server or of an earlier try")
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            # A server knows where artifacts go; beside a file they would otherwise go to the working directory.
            beside = run.path.resolve().parent / "mlflow-artifacts"
            location = beside.as_uri() if self.uri.startswith("sqlite:") else None
            with contextlib.suppress(MlflowException):  # another run may have made it just now
                client.create_experiment(self._experiment, artifact_location=location)
            experiment = client.get_experiment_by_name(self._experiment)
        run_id = client.create_run(experiment.experiment_id, run_name=run.name).info.run_id
        # A path may have bytes that are no text.
        values = {name: str(value).encode("utf-8", "backslashreplace").decode() for name, _, value in settings(config)}
        parameters = [Param(name, without_password(value)) for name, value in values.items()]
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
