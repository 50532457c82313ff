"""Who started this process, and what one process alone agrees on. Several real ones: tests/end_to_end/."""

import socket

import jax
import pytest

from moe_jax.config import MeshConfig
from moe_jax.errors import EnvironmentFault, UserError
from moe_jax.sharding import processes
from moe_jax.sharding.processes import all_well, exchanged, first_then_all, is_one_of_several, join_processes


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}, False),  # a shell that salloc gave
        ({"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "16"}, True),
        ({"SLURM_STEP_NODELIST": "a1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "16"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ],
)
def test_what_started_this_process_says_whether_it_is_one_of_several(environment, several):
    assert is_one_of_several(environment) is several


def test_processes_that_do_not_find_each_other_say_so_in_one_line(monkeypatch):
    def refuse(**arguments):
        assert arguments["coordinator_address"] == "10.0.0.1:8476"
        assert arguments["heartbeat_timeout_seconds"] == 2 * 60, "later than our own"
        raise RuntimeError("DEADLINE_EXCEEDED: Deadline Exceeded\nmore of it")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    monkeypatch.setenv("PJRT_NPROC", "2")
    join_processes(MeshConfig())  # alone
    with pytest.raises(EnvironmentFault, match=r"at 10.0.0.1:8476 \(DEADLINE_EXCEEDED: Deadline Exceeded\); start"):
        join_processes(MeshConfig(coordinator="10.0.0.1:8476", num_processes=2, process_id=1))


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"got {port} \(Address already in use\); choose another, the"):
            join_processes(MeshConfig(coordinator=f"localhost:{port}", num_processes=2, process_id=0))


def test_one_process_agrees_with_itself_and_raises_its_own_errors():
    assert (all_well(True), all_well(False), exchanged("a")) == (True, False, ["a"])
    assert first_then_all(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        first_then_all(lambda: 1 // 0)


def test_the_others_wait_for_the_first_and_stop_where_it_stops(monkeypatch):
    monkeypatch.setattr(processes, "is_first_process", lambda: False)
    assert first_then_all(lambda: 7) == 7
    monkeypatch.setattr(processes, "all_well", lambda is_well: False)
    with pytest.raises(EnvironmentFault, match="the first process could not go on; its own error says why"):
        first_then_all(lambda: 7)
