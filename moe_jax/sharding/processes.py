"""Runs of several processes: how they find each other, what all agree on, and how one that is gone is noticed.

Imports jax only when it is asked.
"""

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

from moe_jax import errors
from moe_jax.config import MeshConfig
from moe_jax.errors import EnvironmentFault, Interrupted, UserError, tell_error

Result = TypeVar("Result")

_ALIVE, _TURN = "moe_jax/alive/", "moe_jax/turn/"
_FAILED, _ENDED = "failed", "ended"
_AGAIN = "run the same command again, on these machines or on what is left of them"
_turns = itertools.count()
_handlers: list[Any] = []


def join_processes(config: MeshConfig) -> None:
    """Joins the other processes of the run, if it has several; before any other use of jax.

    There are several where the flags say so, or else what started this process: SLURM, Open MPI, a TPU pod.
    UserError where the coordinator's port is taken, EnvironmentFault where they do not find each other.
    """
    flags: dict[str, Any] = {}
    if config.coordinator is not None:
        flags = {
            "coordinator_address": config.coordinator,
            "num_processes": config.num_processes,
            "process_id": config.process_id,
        }
        if config.process_id == 0:
            _check_free(int(config.coordinator.rpartition(":")[2]))
    elif not is_one_of_several(os.environ):
        return
    import jax

    # On a CPU each exchange that waits holds a thread of XLA's, and with one a core none may be left for what it waits
    # for: two processes of two devices hung on two cores.
    os.environ.setdefault("PJRT_NPROC", str(max(16, os.cpu_count() or 1)))
    # It would take SIGTERM from us until the loop begins, and tell nobody.
    jax.config.update("jax_enable_preemption_service", False)
    seconds = int(config.heartbeat_seconds)
    try:
        jax.distributed.initialize(
            **flags,
            # Twice our own time: jaxlib would end this process with a page of C++ in place of a line.
            heartbeat_timeout_seconds=2 * seconds,
            shutdown_timeout_seconds=seconds,
        )
    except (RuntimeError, ValueError) as error:
        where = config.coordinator or "the coordinator that the cluster names"
        raise EnvironmentFault(
            f"the processes of the run did not find each other at {where} ({str(error).splitlines()[0]}); start all "
            "of them, with the same mesh.coordinator and mesh.num-processes, and let the network pass that port"
        ) from None


def _check_free(port: int) -> None:
    """UserError where something listens at ``port``: jaxlib would end this process by a segmentation fault."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise UserError(
            f"mesh.coordinator must have a port that process 0 can listen at, got {port} "
            f"({os.strerror(error.errno or 0)}); choose another, the same for all processes"
        ) from None


def is_one_of_several(environment: Mapping[str, str]) -> bool:
    """Whether what started this process says that it is one of several. A shell within a SLURM job is not."""
    if "OMPI_COMM_WORLD_SIZE" in environment:  # first, as jax does: mpirun's own daemons may be a step of SLURM's
        return environment["OMPI_COMM_WORLD_SIZE"] != "1"
    if "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment:
        return environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")) != "1"
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def is_first_process() -> bool:
    """Whether this is the process that writes what a run has once: its log, its metrics, the names of checkpoints."""
    import jax

    return jax.process_index() == 0


def all_well(is_well: bool) -> bool:
    """Whether ``is_well`` holds in every process."""
    return all(value == str(True) for value in exchanged(str(is_well)))


def exchanged(value: str) -> list[str]:
    """``value`` of every process, in their order.

    Each process must call it at the same place of the program, for each waits for the others: it is a barrier too.
    """
    import jax

    if jax.process_count() == 1:
        return [value]
    client, turn, seconds = _client(), f"{_TURN}{next(_turns)}/", 0.005
    client.key_value_set(f"{turn}{jax.process_index():08d}", value)
    # By the coordinator, not by the devices: those wait for half a minute, and a text may take hours to prepare. And
    # not at a barrier of its own, within which no signal would be heard.
    while len(values := client.key_value_dir_get(turn)) < jax.process_count():
        time.sleep(seconds := min(2 * seconds, 1.0))
    return [value for _, value in sorted(values)]


def _client() -> Any:
    from jax._src import distributed  # not public, and Orbax uses it too: jax has no other way to the coordinator

    return distributed.global_state.client


def first_then_all(make: Callable[[], Result]) -> Result:
    """``make()`` in the first process and then in the others, which find what it has left.

    Raises in all where it raises in the first.
    """
    if is_first_process():
        try:
            result = make()
        except BaseException:
            all_well(False)
            raise
        all_well(True)
        return result
    if not all_well(True):
        raise EnvironmentFault("the first process could not go on; its own error says why")
    return make()


def called_together(function: Any) -> Callable[..., Any]:
    """``function``, jitted: before its first call each process waits until all have compiled it.

    For devices wait half a minute for each other, and compilation may take longer in one process than in another.
    """
    import jax

    if jax.process_count() == 1:
        return function
    is_compiled = False

    def call(*arguments: Any) -> Any:
        nonlocal is_compiled
        if not is_compiled:
            function.lower(*arguments).compile()
            is_compiled = all_well(True)
        return function(*arguments)

    return call


@contextlib.contextmanager
def watched_processes(heartbeat_seconds: float) -> Iterator[None]:
    """Within it a process of the run that is gone or stopped ends this one, with one line, within that time."""
    import jax

    if jax.process_count() == 1:
        yield
        return
    heartbeat = _Heartbeat(heartbeat_seconds)
    try:
        try:
            yield
        except Interrupted:  # by a signal to one of them, in all
            all_well(True)  # nobody leaves while another still draws and closes what it wrote
            raise
        all_well(True)
    except jax.errors.JaxRuntimeError as error:
        # On a CPU a process that is gone shows as a connection that breaks, before its heart is missed.
        if any(word in str(error) for word in ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")):
            heartbeat.end(f"the connection to another process broke ({str(error).splitlines()[0][:150]})")
        heartbeat.fail()
        raise
    except Interrupted:
        heartbeat.tell(_ENDED)
        raise
    except BaseException:
        heartbeat.fail()
        raise
    heartbeat.tell(_ENDED)


class _Heartbeat:
    """Two threads: one exchanges signs of life by the coordinator, the other looks whether there are any."""

    def __init__(self, seconds: float):
        import jax

        self._client, self._seconds, self._index = _client(), seconds, jax.process_index()
        self._is_over = threading.Event()
        self._answered = time.monotonic()
        self._seen = dict.fromkeys(range(jax.process_count()), ("", self._answered))
        # jaxlib ends a process by abort() once the coordinator is gone, and asks nobody.
        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._told_by_abort)
        _handlers.append(self._on_abort)  # C may call it as long as the process lives
        ctypes.CDLL(None).signal(signal.SIGABRT, self._on_abort)
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._exchange, self._watch)]
        for thread in self._threads:
            thread.start()

    def tell(self, word: str) -> None:
        """The last sign of life of this process."""
        self._is_over.set()
        self._threads[0].join(self._seconds)  # or a beat of its might come after the word
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_ALIVE}{self._index}", word, allow_overwrite=True)

    def fail(self) -> None:
        """Tells the others; this process will then tell its error, and leave without waiting for them."""
        self.tell(_FAILED)
        errors.leave = self._leave

    def _leave(self, exit_code: int) -> NoReturn:
        latest = time.monotonic() + 0.4 * self._seconds
        # The coordinator stays until the others know, or have failed in the same way.
        while self._index == 0 and time.monotonic() < latest:
            with contextlib.suppress(Exception):
                self._read()
            if all(value in (_FAILED, _ENDED) for value, _ in self._seen.values()):
                break
            time.sleep(0.1)
        sys.stdout.flush()
        os._exit(exit_code)

    def end(self, why: str, remedy: str = _AGAIN) -> None:
        """Ends this process at once: an orderly end would wait for the others."""
        self._is_over.set()
        tell_error(f"{why}; {remedy}")
        os._exit(1)

    def _told_by_abort(self, _: int) -> None:
        gone = ", as it is where process 0 of the run is gone" if self._index else ""
        self.end(f"this process was ended by an abort (above){gone}")

    def _read(self) -> None:
        """The newest sign of each process, and when it was first seen."""
        for key, value in self._client.key_value_dir_get(_ALIVE):
            index = int(key.rsplit("/", 1)[1])
            if self._seen[index][0] != value:
                self._seen[index] = (value, time.monotonic())

    def _exchange(self) -> None:
        for beat in itertools.count():
            with contextlib.suppress(Exception):  # the coordinator is gone: the other thread says so in time
                self._client.key_value_set(f"{_ALIVE}{self._index}", str(beat), allow_overwrite=True)
                self._read()
                self._answered = time.monotonic()
            if self._is_over.wait(self._seconds / 10):
                return

    def _watch(self) -> None:
        while not self._is_over.wait(self._seconds / 10):
            now = time.monotonic()
            if now - self._answered > self._seconds:
                self.end(f"process 0 of the run has not answered for {self._seconds:.0f} s")
            for index, (value, since) in self._seen.items():
                if value == _FAILED and now - since > self._seconds / 5:  # it may be our own fault too, told by us
                    self.end(f"process {index} of the run has failed", "its own error says why, and what to do")
                if value != _ENDED and now - since > self._seconds:
                    self.end(f"process {index} of the run has not answered for {self._seconds:.0f} s")
