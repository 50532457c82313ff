"""A run of several real processes on one machine: they train as one does, end together, and leave nothing broken."""

import signal
import socket

import pytest

from moe_jax.files import locked_folder
from moe_jax.runs.layout import saved_steps
from tests.compiling import quick_environment
from tests.tiny import logged, start, train

HEARTBEAT_SECONDS = 20


def train_together(home, workdir, number, *flags, devices=None, faults=None, timeout=240):
    """(exit code, output, errors) of each of ``number`` processes; ``faults`` are those of faulty.py, by process.

    ``workdir`` may be one for each. Each process has ``devices``, together four by default.
    """
    workdirs = workdir if isinstance(workdir, list) else [workdir] * number
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = quick_environment(home / "cache")
    environment["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices or 4 // number}"
    group = ("--mesh.coordinator", f"127.0.0.1:{port}", "--mesh.num-processes", number)
    shared = ("train.py", "--config", "tiny.py", *group, "--mesh.heartbeat-seconds", HEARTBEAT_SECONDS, *flags)
    processes = [
        start(
            home,
            *shared,
            "--mesh.process-id",
            index,
            "--workdir",
            own,
            faults=(faults or {}).get(index),
            env=environment,
        )
        for index, own in enumerate(workdirs)
    ]
    ended = []
    try:
        for index, process in sorted(enumerate(processes), key=lambda pair: pair[0] in (faults or {})):
            if process.poll() is None and index in (faults or {}) and ended:
                process.kill()  # stopped, it would not end
            ended.append((index, *process.communicate(timeout=timeout)))
    finally:
        for process in processes:
            process.kill()
    return [(processes[index].returncode, output, errors) for index, output, errors in sorted(ended)]


def assert_same_losses(workdir, straight):
    """In each line of metrics; rounding differs with the number of devices."""
    got, want = logged(workdir), logged(straight)
    assert [line["step"] for line in got] == [line["step"] for line in want]
    for here, there in zip(got, want, strict=True):
        for name in there:
            if name.endswith("/loss"):
                assert here[name] == pytest.approx(there[name], rel=1e-4), (here["step"], name)


@pytest.mark.parametrize(
    ("axis", "devices"),
    [("fsdp", 2), pytest.param("tensor", 1, marks=pytest.mark.slow)],  # over tensor two processes have the same rows
)
def test_two_processes_train_as_one_does_and_a_signal_to_one_saves_on_both(home, straight, axis, devices):
    workdir = home / f"together_{axis}"
    faults = {1: {"signal_at": {"moment": "step", "number": 12, "signal_name": "SIGTERM"}}}
    ended = train_together(home, workdir, 2, f"--mesh.{axis}", 2, devices=devices, faults=faults)
    assert [code for code, _, _ in ended] == [143, 143], ended
    (step,) = [step for step in saved_steps(workdir / "checkpoints") if step > 10]
    assert f"the checkpoint of step {step} is on disk" in ended[0][1]
    assert "step 10: train" in ended[0][1]
    assert "step 10: train" not in ended[1][1], "one alone tells what all know"
    rest = train(home, workdir)
    assert rest.returncode == 0, rest.stderr
    assert f"going on from step {step}\n" in rest.stdout
    assert_same_losses(workdir, straight)


@pytest.mark.slow
@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("index", [0, 1])
def test_one_process_that_is_gone_or_stopped_ends_all_with_one_line(home, straight, signal_name, index):
    workdir = home / f"{signal_name}_{index}"
    faults = {index: {"signal_at": {"moment": "step", "number": 17, "signal_name": signal_name}}}
    ended = train_together(home, workdir, 2, "--mesh.expert", 2, faults=faults)
    assert ended[index][0] == -signal.SIGKILL
    code, _, errors = ended[1 - index]
    assert code == 1, errors
    assert errors.splitlines()[-1].startswith("error: "), errors
    assert errors.count("run the same command again, on these machines or on what is left of them") == 1
    newest = saved_steps(workdir / "checkpoints")[-1]
    if (signal_name, index) != ("SIGKILL", 0):
        return  # what is left is of the same kind
    # On more, smaller ones; and then on one.
    again = train_together(home, workdir, 4, "--train.num-steps", 30)
    assert [code for code, _, _ in again] == [0, 0, 0, 0], again
    assert f"going on from step {newest}\n" in again[0][1]
    assert train(home, workdir).returncode == 0
    assert_same_losses(workdir, straight)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_kill_in_the_middle_of_a_save_loses_nothing(home, straight, index):
    workdir = home / f"half_{index}"
    faults = {index: {"signal_at": {"moment": "save", "number": 3}}}
    ended = train_together(home, workdir, 2, "--mesh.fsdp", 2, faults=faults)
    assert [ended[index][0], ended[1 - index][0]] == [-signal.SIGKILL, 1], ended
    before = saved_steps(workdir / "checkpoints")
    assert before
    again = train_together(home, workdir, 2, "--mesh.fsdp", 2)
    assert [code for code, _, _ in again] == [0, 0], again
    assert f"going on from step {before[-1]}\n" in again[0][1]
    assert_same_losses(workdir, straight)


@pytest.mark.slow
def test_what_is_wrong_in_all_is_told_by_all(home):
    ended = train_together(home, home / "wrong", 2, "--mesh.fsdp", 3)
    for code, _, errors in ended:
        assert (code, errors.count("error: ")) == (2, 1), errors
        assert "mesh.fsdp" in errors
    assert not (home / "wrong").exists()


@pytest.mark.slow
def test_what_is_wrong_in_one_is_told_by_it_and_ends_the_others(home):
    workdir = home / "locked"
    with locked_folder(workdir, "--workdir", "training in"):
        ended = train_together(home, workdir, 2)
    assert [code for code, _, _ in ended] == [2, 1], ended
    assert f"is training in {workdir} already" in ended[0][2].splitlines()[-1]
    assert ended[1][2].splitlines()[-1].startswith("error: process 0 of the run has failed; its own error says why")


@pytest.mark.slow
def test_folders_that_are_not_the_same_one_are_refused(home):
    ended = train_together(home, [home / "here", home / "there"], 2)
    assert {code for code, _, _ in ended} == {2}, ended
    assert all("must be a folder that all processes of the run see" in errors for _, _, errors in ended)


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["SIGUSR1", None])
def test_a_run_pauses_when_its_time_is_over(home, straight, sent):
    """By a scheduler's signal, or by the minutes that it was given."""
    workdir = home / f"pause_{sent}"
    faults = {"signal_at": {"moment": "step", "number": 12, "signal_name": "SIGUSR1"}} if sent else None
    flags = () if sent else ("--train.max-minutes", 1e-4)
    paused = train(home, workdir, *flags, faults=faults)
    assert paused.returncode == 0, paused.stderr
    (step,) = saved_steps(workdir / "checkpoints")[-1:]
    assert step < 40
    assert f"the checkpoint of step {step} is on disk" in paused.stdout
    rest = train(home, workdir)
    assert rest.returncode == 0, rest.stderr
    assert logged(workdir) == logged(straight)
