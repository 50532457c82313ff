"""Where metrics go beside metrics.jsonl: TensorBoard and MLflow. Imports no jax, and a tracker's library when used."""

import contextlib
import importlib.util
import json
import logging
import os
import re
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from moe_jax.config import Config, TrainConfig
from moe_jax.config.fields import settings
from moe_jax.errors import UserError
from moe_jax.files import GrowingFile, atomic_write_text
from moe_jax.runs.layout import RunDirectory

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("moe_jax")

Ending = Literal["finished", "interrupted", "failed"]


class Tracker(Protocol):
    """What a place for metrics can be asked for; a fault of it after its start is told and ends no run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def files(self, files: Iterable[Path]) -> None: ...

    def close(self, ending: Ending) -> None: ...


def check_trackers(train: TrainConfig, run: RunDirectory) -> None:
    """UserError where a tracker's library is not installed, or its server cannot take this run."""
    if "mlflow" not in train.trackers:
        return
    missing = [name for name in ("mlflow", "sqlalchemy", "alembic") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"train.trackers mlflow needs {', '.join(missing)} installed; "
            "pip install 'mlflow-skinny>=3.17' alembic 'sqlalchemy<2.1', or leave mlflow out"
        )
    if _named_uri(train) is None and not _default_database(run).exists():
        return  # it is made with the run, and not for one that something else is wrong with
    with _faults_as_user_errors(train, run):
        client = _mlflow_client(train, run)
        experiment = client.get_experiment_by_name(train.mlflow_experiment)
        if experiment is not None and experiment.lifecycle_stage != "active":
            raise UserError(
                f"train.mlflow_experiment {train.mlflow_experiment} has been deleted in MLflow; restore it there, or "
                "name another"
            )
        saved = _saved_run_id(train, run)
        if saved is not None:
            client.get_run(saved)


def open_trackers(config: Config, run: RunDirectory, restored_step: int | None) -> list[Tracker]:
    """The trackers of ``config.train.trackers``, going on where an earlier start stopped. Raises UserError."""
    opened: list[Tracker] = []
    if "mlflow" in config.train.trackers:
        opened.append(MLflow(config, run, restored_step))
    if "tensorboard" in config.train.trackers:
        opened.append(TensorBoard(run, restored_step))
    return opened


class TensorBoard:
    """Event files in the run directory; what a start that died wrote past the restored step is purged.

    tensorboardX makes the events. Its own writer is not used: on a full disk its thread dies, and the run waits for
    that thread forever.
    """

    def __init__(self, run: RunDirectory, restored_step: int | None):
        run.tensorboard.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self._file = GrowingFile(run.tensorboard / name, log.warning)
        first = (restored_step or 0) + 1
        self._append(first, file_version="brain.Event:2")
        self._append(first, session_log={"status": "START"})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._append(step, summary=scalar(name, value))

    def text(self, step: int, name: str, text: str) -> None:
        from tensorboardX.summary import text as text_summary

        # Indented, it is shown as it is.
        indented = "\n".join("    " + line for line in text.splitlines())
        self._append(step, summary=text_summary(name, indented))

    def _append(self, step: int, **what: Any) -> None:
        """An event as a record of a TFRecord file: its length and itself, with a checksum behind each."""
        from tensorboardX.proto.event_pb2 import Event  # type: ignore[missing-module-attribute] - made on import
        from tensorboardX.record_writer import masked_crc32c

        event = Event(wall_time=time.time(), step=step, **what).SerializeToString()
        length = struct.pack("<Q", len(event))
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, event)]
        self._file.append(length + sums[0] + event + sums[1])

    def files(self, files: Iterable[Path]) -> None:
        """TensorBoard draws its own curves."""

    def close(self, ending: Ending) -> None:
        lost = self._file.close()
        if lost:
            log.warning(f"warning: TensorBoard lacks the last {len(lost)} values, which could not be written")


class MLflow:
    """A run of MLflow: the settings as parameters, metrics by step, pictures and texts as artifacts.

    By default it is in the SQLite file mlflow.db beside the run directory, so that the runs of one folder are compared
    in one place; train.mlflow_uri or MLFLOW_TRACKING_URI name a server. The run's id is kept in the run directory, and
    a resumed run goes on in it: what was logged once is not logged again, for MLflow keeps every point.
    """

    def __init__(self, config: Config, run: RunDirectory, restored_step: int | None):
        self._unsent: list[Any] = []
        self._is_down = False
        with _faults_as_user_errors(config.train, run):
            self._client = _mlflow_client(config.train, run)
            # Before its first checkpoint a run binds to nothing, and what it logged was of another one.
            going_on = None if restored_step is None else _saved_run_id(config.train, run)
            self._id = going_on or _new_mlflow_run(self._client, config, run)
            self._client.update_run(self._id, status="RUNNING")
            names = self._client.get_run(self._id).data.metrics
            self._logged = {
                name: max(point.step for point in self._client.get_metric_history(self._id, name)) for name in names
            }
        log.info(f"MLflow: run {self._id} at {without_password(_mlflow_uri(config.train, run))}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for name, value in values.items():
            name = re.sub(r"[^\w\-. /:]", "_", name)
            if step > self._logged.get(name, -1):
                self._unsent.append(Metric(name, value, now, step))
        self._send()

    def _send(self) -> None:
        """Sends what has gathered; where the server is away it gathers on."""
        many = 1000  # as many as one request may hold
        while self._unsent and self._try(lambda: self._client.log_batch(self._id, metrics=self._unsent[:many])):
            self._unsent = self._unsent[many:]

    def text(self, step: int, name: str, text: str) -> None:
        self._try(lambda: self._client.log_text(self._id, text, f"{name}/{step:08}.txt"))

    def files(self, files: Iterable[Path]) -> None:
        for file in files:
            self._try(lambda file=file: self._client.log_artifact(self._id, str(file)))

    def close(self, ending: Ending) -> None:
        self._send()
        if self._unsent:
            log.warning(f"warning: {len(self._unsent)} values have not reached MLflow; metrics.jsonl has them all")
        status = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}[ending]
        self._try(lambda: self._client.set_terminated(self._id, status))

    def _try(self, call: Any) -> bool:
        """Whether ``call`` went through. The first fault in a row is told; none ends the run."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 - a store is anybody's plug-in, and raises what it likes
            if not self._is_down:
                log.warning(f"warning: MLflow does not take what is logged ({_one_line(error)}); the run goes on")
            self._is_down = True
            return False
        self._is_down = False
        return True


def _named_uri(train: TrainConfig) -> str | None:
    """The server or database that the user named; None: the file beside the run directory, wherever that is."""
    named = train.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or None
    if named is not None and re.match("sqlite:///[^/]", named):  # relative to the working directory of this start
        return f"sqlite:///{Path(named.removeprefix('sqlite:///')).resolve()}"
    return named


def without_password(uri: str) -> str:
    """``uri`` as it may be shown and kept."""
    return re.sub(r"//([^/@:]*):[^/@]*@", r"//\1:***@", uri)


def _place(train: TrainConfig) -> str | None:
    """What mlflow.json remembers of where a run is."""
    named = _named_uri(train)
    return None if named is None else without_password(named)


def _default_database(run: RunDirectory) -> Path:
    return run.path.resolve().parent / "mlflow.db"


def _mlflow_uri(train: TrainConfig, run: RunDirectory) -> str:
    return _named_uri(train) or f"sqlite:///{_default_database(run)}"


def _mlflow_client(train: TrainConfig, run: RunDirectory) -> "MlflowClient":
    # It would otherwise call home, and repeat a failed request for minutes.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of each table that it creates
    # It prints a traceback of every fault of the database beside raising it, which is told once by us.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    return MlflowClient(tracking_uri=_mlflow_uri(train, run))


@contextlib.contextmanager
def _faults_as_user_errors(train: TrainConfig, run: RunDirectory) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - a store is anybody's plug-in, and raises what it likes
        begun = f", remove {run.mlflow_file} for a new MLflow run" if run.mlflow_file.exists() else ""
        raise UserError(
            f"MLflow at {without_password(_mlflow_uri(train, run))} cannot be used ({_one_line(error)}); "
            f"correct train.mlflow_uri, start the server{begun}, or leave mlflow out of train.trackers"
        ) from None


def _saved_run_id(train: TrainConfig, run: RunDirectory) -> str | None:
    """The MLflow run that an earlier start of ``run`` began in the same place; None without one."""
    if not run.mlflow_file.exists():
        return None
    try:
        saved_uri, run_id = itemgetter("uri", "run_id")(json.loads(run.mlflow_file.read_text("utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run.mlflow_file} is corrupt ({error}); remove it for a new MLflow run") from None
    return run_id if saved_uri == _place(train) else None


def _new_mlflow_run(client: "MlflowClient", config: Config, run: RunDirectory) -> str:
    """Creates a run, and its experiment where there is none; its id is kept in the run directory."""
    from mlflow.entities import Param

    if run.mlflow_file.exists():
        log.info(f"a new MLflow run begins: that of {run.mlflow_file} is of another server or of an earlier try")
    name = config.train.mlflow_experiment
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # A server knows where artifacts go; beside a file they would otherwise go to the working directory.
        beside = run.path.resolve().parent / "mlflow-artifacts"
        is_file = _mlflow_uri(config.train, run).startswith("sqlite:")
        experiment_id = client.create_experiment(name, artifact_location=beside.as_uri() if is_file else None)
    else:
        experiment_id = experiment.experiment_id
    run_id = client.create_run(experiment_id, run_name=run.path.resolve().name).info.run_id
    parameters = [Param(name, without_password(str(value))) for name, _, value in settings(config)]
    for start in range(0, len(parameters), 100):  # as many as one request may hold
        client.log_batch(run_id, params=parameters[start : start + 100])
    atomic_write_text(run.mlflow_file, json.dumps({"uri": _place(config.train), "run_id": run_id}) + "\n")
    return run_id


def _one_line(error: BaseException) -> str:
    return without_password(" ".join(str(error).split())[:300])
