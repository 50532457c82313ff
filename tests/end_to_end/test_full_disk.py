"""What writes in a run, on a full disk: it goes on, says so, and loses nothing once there is space.

A limit on the size of files stands for the disk. A disk that is really full, and whole commands, are in
test_full_disk_commands.py.
"""

import contextlib
import errno
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from moe_jax.files import GrowingFile, atomic_write_text, locked_folder
from moe_jax.prepare.encode import Encoded
from moe_jax.prepare.shards import SplitCounts, SplitWriter
from moe_jax.report.pictures import plot_loss_curve
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.log import log, start_log
from moe_jax.runs.metrics_file import MetricsFile
from tests.end_to_end.faulty import no_file_over
from tests.tiny import ROOT, steps_of

# A file that grows


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize("space", [0, 1, 2, 3, 5, 6, 8])
@pytest.mark.parametrize("can_truncate", [True, False])
def test_records_that_do_not_fit_wait_for_space(tmp_path, monkeypatch, code, space, can_truncate):
    """With ``space`` for so many more bytes, records of three: whole ones are written, and no half one is left."""
    file, said, end = tmp_path / "file", [], 3 + space
    file.write_bytes(b"old")
    growing = GrowingFile(file, said.append)
    write, truncate = os.pwrite, os.ftruncate

    def write_what_fits(descriptor, data, at):
        if at >= end:
            raise OSError(code, os.strerror(code))
        return write(descriptor, data[: end - at], at)

    def fail(descriptor, size):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", write_what_fits)
    monkeypatch.setattr(os, "ftruncate", truncate if can_truncate else fail)
    for number, record in enumerate((b"aa\n", b"bb\n", b"cc\n"), start=1):
        growing.append(record)
        if can_truncate:
            assert file.read_bytes() == b"old" + b"aa\nbb\ncc\n"[: 3 * min(number, space // 3)]
    assert said == [
        f"warning: {file} cannot be written ({os.strerror(code)}); the run goes on, keeps what is due in memory and "
        "tries again each time"
    ]
    end = 100
    growing.append(b"dd\n")
    assert file.read_bytes() == b"oldaa\nbb\ncc\ndd\n"
    assert said[1:] == [f"{file} can be written again, and nothing of it is lost"]
    assert growing.close() == []


def test_what_never_fits_is_returned_at_the_end_and_the_next_fault_is_told_again(tmp_path):
    said = []
    growing = GrowingFile(tmp_path / "file", said.append)
    for _ in range(2):
        with no_file_over(0):
            growing.append(b"a")
            growing.append(b"b")
        growing.append(b"c")
    assert [line.startswith("warning") for line in said] == [True, False] * 2
    with no_file_over(6):
        for record in (b"d", b"e", b"f"):
            growing.append(record)
    with no_file_over(7):
        assert growing.close() == [b"e", b"f"]
    assert (tmp_path / "file").read_bytes() == b"abcabcd"


def test_a_file_that_somebody_cut_gets_no_hole(tmp_path):
    growing = GrowingFile(tmp_path / "file", print)
    growing.append(b"aaa\n")
    os.truncate(tmp_path / "file", 0)
    growing.append(b"bbb\n")
    growing.close()
    assert (tmp_path / "file").read_bytes() == b"bbb\n"


def encoded(length):
    ids = np.zeros(length, np.uint16)
    return Encoded("train", ids, np.array([[length, length, 0], [0, 0, 0]]))


@pytest.mark.parametrize("length", [100, 100_000])
def test_an_error_names_the_file_that_is_full(tmp_path, length):
    def write_tokens():
        with contextlib.closing(SplitWriter(tmp_path, "train", np.dtype(np.uint16), 10**6, SplitCounts())) as writer:
            writer.write(encoded(length))
            writer.commit()

    def lock():
        with locked_folder(tmp_path, "--out", "preparing"):
            raise AssertionError("the lock is full")

    for write, name in (
        (lambda: atomic_write_text(tmp_path / "text", "x" * length), "text"),
        (lock, ".lock"),
        (write_tokens, r"train-00000\.bin|train\.lengths"),
    ):
        with no_file_over(0), pytest.raises(OSError) as caught:
            write()
        assert caught.value.errno == errno.EFBIG
        assert re.fullmatch(name, Path(caught.value.filename).name)


# Metrics (TensorBoard's events are in tests/trackers) and pictures


def test_metrics_are_whole_once_there_is_space(tmp_path, caplog):
    run = RunDirectory(tmp_path)
    with MetricsFile(run, None) as metrics:
        metrics.write(1, {"train/loss": 1.0})
        with no_file_over(300):
            for step in range(2, 30):
                metrics.write(step, {"train/loss": 1.0 * step})
            assert 1 < len(steps_of(tmp_path)) < 20
            assert run.metrics_file.read_bytes().endswith(b"}\n")
        metrics.write(30, {"train/loss": 30.0})
        assert steps_of(tmp_path) == list(range(1, 31)), "at once, not only at the end"
    first, second = caplog.messages
    assert re.match(r"warning: .*metrics.jsonl cannot be written \(File too large\); the run goes on", first)
    assert second.endswith("metrics.jsonl can be written again, and nothing of it is lost")


def test_what_metrics_lack_at_the_end_is_reported(tmp_path, caplog):
    run = RunDirectory(tmp_path)
    with no_file_over(100), MetricsFile(run, None) as metrics:
        for step in range(5, 55, 5):
            metrics.write(step, {"train/loss": 1.0})
    assert steps_of(tmp_path) == [5, 10, 15]
    assert caplog.messages[1:] == [
        f"warning: {run.metrics_file} lacks its last 7 lines, from step 20 on, which could not be written to the end"
    ]
    # The next start of the run finds a whole file.
    with MetricsFile(run, 15) as metrics:
        metrics.write(20, {"train/loss": 1.0})
    assert steps_of(tmp_path) == [5, 10, 15, 20]


def test_a_picture_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    run = RunDirectory(tmp_path)
    with MetricsFile(run, None) as metrics:
        metrics.write(1, {"train/loss": 1.0})
    plot_loss_curve(run)
    before = run.loss_curve.read_bytes()
    with no_file_over(1000):
        assert plot_loss_curve(run) is None
    assert caplog.messages == [
        f"warning: {run.loss_curve} cannot be written (File too large); the run is complete without it"
    ]
    assert run.loss_curve.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.jsonl", "loss_curve.png"}


# The log


def test_the_console_tells_once_that_the_log_cannot_be_written(tmp_path, capsys):
    file = tmp_path / "train.log"
    with start_log(file):
        log.info("first")
        with no_file_over(30):
            log.info("second")
            log.info("third")
        log.info("fourth")
    out, err = capsys.readouterr()
    fault = f"warning: {file} cannot be written (File too large); the run goes on, keeps what is due in memory"
    assert [line.removeprefix(fault) for line in out.splitlines()] == [
        "first",
        "second",
        " and tries again each time",
        "third",
        "fourth",
        f"{file} can be written again, and nothing of it is lost",
    ]
    assert err == ""
    assert [line[20:] for line in file.read_text().splitlines()] == ["first", "second", "third", "fourth"]


def test_what_the_log_lacks_is_told(tmp_path, capsys):
    with no_file_over(30), start_log(tmp_path / "train.log"):
        for message in ("first", "second", "third"):
            log.info(message)
    assert f"warning: {tmp_path / 'train.log'} lacks its last 2 messages" in capsys.readouterr().out


def test_a_console_that_goes_to_a_full_disk_ends_nothing(tmp_path):
    program = """
        import resource, sys
        from pathlib import Path
        from moe_jax.errors import show
        from moe_jax.runs.log import log, start_log
        show("stdout")
        with start_log(Path("train.log")):
            log.info("first")
            unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (8, unlimited[1]))
            log.info("second")
            log.info("third")
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            log.info("fourth")
            resource.setrlimit(resource.RLIMIT_FSIZE, (8, unlimited[1]))
            log.info("fifth")
    """
    with open(tmp_path / "console", "w") as console:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            cwd=tmp_path,
            # With an empty PYTHONUNBUFFERED, as for most people, Python keeps what could not be printed.
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
            stdout=console,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
    lines = (tmp_path / "console").read_text().splitlines()
    assert lines[:2] == ["first", "sefourth"], "what could not be printed is dropped"
    assert [line[20:] for line in (tmp_path / "train.log").read_text().splitlines()] == [
        "first",
        "second",
        "third",
        "fourth",
    ]
