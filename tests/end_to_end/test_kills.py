"""Real runs that are killed, and terminated, at moments of every kind; the same command then goes on, bit for bit."""

import random
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from moe_jax.runs.checkpoint.record import read_record
from moe_jax.runs.layout import saved_steps
from tests.tiny import assert_same_arrays, logged, start, train


def remembered(workdir):
    """What the newest checkpoint holds beside its arrays, but for a clock."""
    checkpoints = workdir / "checkpoints"
    record = read_record(checkpoints / str(saved_steps(checkpoints)[-1]))
    assert record is not None
    del record.progress["train_seconds"]
    return record


def assert_same_run(workdir, straight):
    """All parameters, moments and counters are those of ``straight``, and all lines of metrics, of the same bits."""
    assert remembered(workdir) == remembered(straight)
    assert_same_arrays(workdir, straight)
    assert logged(workdir) == logged(straight)
    assert saved_steps(workdir / "checkpoints") == saved_steps(straight / "checkpoints")
    assert not (workdir / "checkpoints" / ".unfinished").exists()


def kill_and_go_on(home, straight, name, *flags, **moment):
    """SIGKILL at the moment; the same command then ends where ``straight`` did."""
    workdir = home / name
    killed = train(home, workdir, *flags, faults={"signal_at": moment})
    assert killed.returncode == -9, (moment, killed.returncode, killed.stdout[-500:], killed.stderr[-2000:])
    before = saved_steps(workdir / "checkpoints")
    left = [file for file in (workdir / "checkpoints").rglob("*") if file.is_file() and ".unfinished" in str(file)]
    result = train(home, workdir, *flags)
    assert result.returncode == 0, (moment, result.stderr)
    assert "damaged" not in result.stdout + result.stderr, moment
    if before:
        assert f"going on from step {before[-1]}\n" in result.stdout, moment
    assert_same_run(workdir, straight)
    return before, left


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_bit_for_bit(home):
    flags = ("--train.num-steps", 15)
    assert train(home, home / "short", *flags).returncode == 0
    before, left = kill_and_go_on(home, home / "short", "half", *flags, moment="save", number=3)
    assert before == [5]
    assert left, "the kill came before the first file"


def moments():
    """Twenty, the same ones in every run of the tests."""
    draw = random.Random(20)
    yield from ({"moment": "compilation", "seconds": draw.uniform(0.01, 1.0)} for _ in range(3))
    yield from ({"moment": "evaluation", "number": draw.randrange(1, 16)} for _ in range(3))
    yield from ({"moment": "save", "number": draw.randrange(1, 14)} for _ in range(5))
    yield {"moment": "sealing", "number": draw.randrange(2, 8)}
    yield {"moment": "naming", "number": draw.randrange(2, 8)}
    yield {"moment": "removal", "number": draw.randrange(1, 5)}
    yield from (
        {"moment": "step", "number": draw.randrange(2, 48), "seconds": draw.uniform(0.0, 0.05)} for _ in range(6)
    )


@pytest.mark.slow
def test_twenty_kills_at_moments_of_every_kind(home, straight):
    chosen = list(moments())
    assert len(chosen) == 20
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(
            lambda pair: kill_and_go_on(home, straight, f"killed_{pair[0]}", **pair[1]), enumerate(chosen)
        )
        found = list(zip(chosen, results, strict=True))
    in_a_save = [moment for moment, (_, left) in found if moment["moment"] == "save" and left]
    assert len(in_a_save) == 5, found


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        {"moment": "compilation", "seconds": 0.2},
        {"moment": "step", "number": 17},
        {"moment": "evaluation", "number": 3},
        {"moment": "sealing", "number": 2},
    ],
    ids=lambda value: value["moment"],
)
@pytest.mark.parametrize(("signal_name", "exit_code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_in_each_phase_saves_and_leaves(home, straight, moment, signal_name, exit_code):
    workdir = home / f"{signal_name}_{moment['moment']}"
    ended = train(home, workdir, faults={"signal_at": {**moment, "signal_name": signal_name}})
    assert ended.returncode == exit_code, ended.stderr
    assert "Traceback" not in ended.stderr
    newest = saved_steps(workdir / "checkpoints")[-1]
    assert f"interrupted: the checkpoint of step {newest} is on disk" in ended.stdout
    assert train(home, workdir).returncode == 0
    # The checkpoint of the interruption is one more; all lines of metrics and the end are the same.
    assert logged(workdir) == logged(straight)
    assert_same_arrays(workdir, straight)


def test_sigterm_while_the_text_is_prepared_leaves_nothing(home):
    faults = {"signal_at": {"moment": "preparation", "signal_name": "SIGTERM"}}
    ended = train(home, home / "unprepared", faults=faults, cache=home / "empty")
    assert (ended.returncode, ended.stdout) == (143, "")
    assert ended.stderr == "error: terminated before there was anything to save\n"
    assert not (home / "unprepared").exists()


@pytest.mark.slow
def test_a_second_signal_leaves_at_once_and_leaves_no_lock(home, straight):
    workdir = home / "twice"
    hang = {"hang_at": {"moment": "evaluation", "number": 7, "seconds": 60}}  # in the second one, of step 20
    with start(home, "train.py", "--config", "tiny.py", "--workdir", workdir, faults=hang) as process:
        assert process.stdout is not None
        assert any("step 10: train" in line for line in process.stdout)
        other = train(home, workdir)
        assert other.returncode == 2
        assert f"process {process.pid} is training in {workdir} already" in other.stderr
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == -signal.SIGTERM
    assert train(home, workdir).returncode == 0
    assert_same_run(workdir, straight)
