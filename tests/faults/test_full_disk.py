"""A full disk while a run writes: it goes on, says so, and loses nothing once there is space.

A limit on the size of files stands for the disk; one test fills a real one.
"""

import contextlib
import errno
import json
import os
import re
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from moe_jax.files import GrowingFile
from moe_jax.report.plots import plot_loss_curve
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.log import log, start_log
from moe_jax.runs.metrics import MetricsWriter, read_metrics
from moe_jax.runs.trackers import TensorBoard
from tests.faults.faulty import ROOT
from tests.faults.tiny import faulty, make_home
from tests.oracles.events import events


@contextlib.contextmanager
def no_file_over(size):
    """Within it no file of this process may grow past ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def steps_of(run):
    return [line["step"] for line in read_metrics(run.metrics_file)]


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records]


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
        growing.append(b"d")
        assert growing.close() == [b"d"]
    assert (tmp_path / "file").read_bytes() == b"abcabc"


def test_a_file_that_somebody_cut_gets_no_hole(tmp_path):
    growing = GrowingFile(tmp_path / "file", print)
    growing.append(b"aaa\n")
    os.truncate(tmp_path / "file", 0)
    growing.append(b"bbb\n")
    growing.close()
    assert (tmp_path / "file").read_bytes() == b"bbb\n"


# Metrics and TensorBoard


def test_metrics_and_events_are_whole_once_there_is_space(tmp_path, caplog):
    run = RunDirectory(tmp_path)
    with MetricsWriter(run, None, lambda: [TensorBoard(run, None)]) as writer:
        writer.write(1, {"train/loss": 1.0})
        with no_file_over(300):
            for step in range(2, 30):  # more than any queue holds
                writer.write(step, {"train/loss": 1.0 * step})
                writer.write_text(step, "sample", "To be")
            assert 1 < len(steps_of(run)) < 20
            assert run.metrics_file.read_bytes().endswith(b"}\n")
            assert 1 < len(events(run)[0]) < 20
        writer.write(30, {"train/loss": 30.0})
        assert steps_of(run) == list(range(1, 31)), "at once, not only at the end"
    assert steps_of(run) == list(range(1, 31))
    assert events(run)[0] == [(step, "train/loss", 1.0 * step) for step in range(1, 31)]
    said = warnings_of(caplog)
    assert len(said) == 4, said
    for name in ("metrics.jsonl", "tensorboard"):
        first, second = [line for line in said if name in line]
        assert re.match(r"warning: .* cannot be written \(File too large\); the run goes on", first)
        assert second.endswith("can be written again, and nothing of it is lost")


def test_what_is_lost_at_the_end_is_told(tmp_path, caplog):
    run = RunDirectory(tmp_path)
    with no_file_over(100), MetricsWriter(run, None, lambda: [TensorBoard(run, None)]) as writer:
        for step in range(5, 55, 5):
            writer.write(step, {"train/loss": 1.0})
        writer.finish([], "finished")
    assert steps_of(run) == [5, 10, 15]
    said = warnings_of(caplog)
    assert len(said) == 4, said
    assert (
        f"warning: {run.metrics_file} lacks its last 7 lines, from step 20 on, which could not be written to the end"
        in said
    )
    assert "warning: TensorBoard lacks the last 10 values, which could not be written" in said
    # The next start of the run finds a whole file.
    with MetricsWriter(run, 15) as writer:
        writer.write(20, {"train/loss": 1.0})
    assert steps_of(run) == [5, 10, 15, 20]


def test_a_picture_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    run = RunDirectory(tmp_path)
    with MetricsWriter(run, None) as writer:
        writer.write(1, {"train/loss": 1.0})
    plot_loss_curve(run)
    before = run.loss_curve.read_bytes()
    with no_file_over(1000):
        assert plot_loss_curve(run) is None
    assert warnings_of(caplog) == [
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
            log.info("third\ud800")  # of a file's name that is no UTF-8
        log.info("fourth")
    out, err = capsys.readouterr()
    fault = f"warning: {file} cannot be written (File too large); the run goes on, keeps what is due in memory"
    assert [line.removeprefix(fault) for line in out.splitlines()] == [
        "first",
        "second",
        " and tries again each time",
        "third\\ud800",
        "fourth",
        f"{file} can be written again, and nothing of it is lost",
    ]
    assert err == ""
    assert [line[20:] for line in file.read_text().splitlines()] == ["first", "second", "third\\ud800", "fourth"]


def test_what_the_log_lacks_is_told(tmp_path, capsys):
    with no_file_over(30), start_log(tmp_path / "train.log"):
        for message in ("first", "second", "third"):
            log.info(message)
    assert f"warning: {tmp_path / 'train.log'} lacks its last 2 messages" in capsys.readouterr().out


def test_a_console_that_goes_to_a_full_disk_ends_nothing(tmp_path):
    program = """
        import resource, sys
        from pathlib import Path
        from moe_jax.runs.log import log, start_log
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
            env={**os.environ, "PYTHONPATH": str(ROOT)},
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


# A disk that is really full

IN_A_SMALL_DISK = """
import json, logging, os, sys
from pathlib import Path
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.log import log, start_log
from moe_jax.runs.metrics import MetricsWriter
from moe_jax.runs.trackers import TensorBoard

disk = Path(sys.argv[1])
run = RunDirectory(disk / "run")
run.path.mkdir()
with start_log(run.log_file), MetricsWriter(run, None, lambda: [TensorBoard(run, None)]) as writer:
    for step in range(1, 100):
        if step == 30:
            with open(disk / "other", "wb", buffering=0) as other:
                try:
                    while True:
                        other.write(bytes(512))
                except OSError as error:
                    log.info(f"full: {error.strerror}")
        if step == 70:
            assert run.metrics_file.read_bytes().endswith(b"}\\n")
            (disk / "other").unlink()
        writer.write(step, {"train/loss": 1.0 * step, "moe/load": [[0.125] * 100]})
        log.debug(f"step {step} " + "." * 500)
        writer.write_text(step, "sample", "." * 500)
"""


def test_a_disk_that_is_really_full(tmp_path):
    (disk := tmp_path / "disk").mkdir()
    (tmp_path / "program.py").write_text(IN_A_SMALL_DISK)
    # In a name space of its own, where anybody may mount; what is to be looked at is copied out of it.
    steps = f"""
        mount -t tmpfs -o size=1m none {disk} || exit 77
        {sys.executable} {tmp_path / "program.py"} {disk} && cp -r {disk}/run {tmp_path}/run
    """
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", steps],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip(f"nothing may be mounted here: {done.stderr.strip()}")
    assert (done.returncode, done.stderr) == (0, "")
    assert sum("cannot be written (No space left on device)" in line for line in done.stdout.splitlines()) == 3
    assert sum("can be written again" in line for line in done.stdout.splitlines()) == 3
    run = RunDirectory(tmp_path / "run")
    assert steps_of(run) == list(range(1, 100))
    assert [step for step, _, _ in events(run)[0]] == list(range(1, 100))
    found = re.findall(r" step (\d+) \.{500}\n", run.log_file.read_text())
    assert found == [str(step) for step in range(1, 100)]


# Whole commands


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


LIMIT = 60_000  # more than any file of a checkpoint, less than metrics and events of 180 steps
RUN = (
    *("--train.num-steps", "200", "--train.eval-every", "180", "--train.checkpoint-every", "180"),
    *("--train.log-every", "1", "--train.no-compile-cache"),
)


def start_on_a_full_disk(home, workdir, **limit):
    """Trains with files that may have LIMIT bytes; the log has as many before the first message."""
    workdir.mkdir(parents=True)
    (workdir / "train.log").write_text("x" * (LIMIT - 11) + "\n")
    fault = {"file_size_limit": {"bytes": LIMIT, **limit}}
    return faulty(home, fault, "train.py", "--config", "tiny.py", "--workdir", workdir, *RUN)


def test_a_training_goes_on_while_the_disk_is_full_and_loses_nothing(home):
    workdir = home / "runs" / "lifted"
    done = start_on_a_full_disk(home, workdir, until=str(workdir / "checkpoints" / "180"))
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("train.log", "metrics.jsonl", "tensorboard"):
        said = [line for line in done.stdout.splitlines() if re.search(rf"{name}.* can", line)]
        assert len(said) == 2, said
        assert "cannot be written (File too large); the run goes on" in said[0]
        assert "can be written again, and nothing of it is lost" in said[1]
    run = RunDirectory(workdir)
    evaluated = [180, 200]
    assert steps_of(run) == sorted([*range(1, 201), *evaluated])
    assert [step for step, name, _ in events(run)[0] if name == "train/loss"] == list(range(1, 201))
    logged = run.log_file.read_text().splitlines()[1:]
    for message in ("parameters: ", "first step", "step 180: train", "step 200: train", "sample from it"):
        assert [line[20:].startswith(message) for line in logged].count(True) == 1, message
    assert run.loss_curve.exists()
    assert done.stdout.splitlines()[-1].startswith("sample from it")


@pytest.mark.slow
def test_a_training_ends_well_on_a_disk_that_stays_full(home):
    workdir = home / "runs" / "full"
    done = start_on_a_full_disk(home, workdir)
    assert (done.returncode, done.stderr) == (0, "")
    for words in (
        r"metrics.jsonl cannot be written",
        r"tensorboard\S* cannot be written",
        r"train.log cannot be written",
        r"metrics.jsonl lacks its last \d+ lines, from step \d+ on",
        r"TensorBoard lacks the last \d+ values",
        r"train.log lacks its last \d+ messages",
    ):
        assert len(re.findall(words, done.stdout)) == 1, (words, done.stdout)
    run = RunDirectory(workdir)
    (lost, first) = re.findall(r"last (\d+) lines, from step (\d+) on", done.stdout)[0]
    assert steps_of(run) == list(range(1, int(first)))
    assert int(lost) == 202 - (int(first) - 1)
    assert (run.checkpoints / "200").is_dir()
    more = faulty(home, {}, "train.py", "--config", "tiny.py", "--workdir", workdir, *RUN, "--train.num-steps", 210)
    assert (more.returncode, more.stderr) == (0, "")
    assert steps_of(run) == [*range(1, int(first)), *range(201, 211), 210]


def prepared(folder):
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def prepare(home, out, faults, tokenizer="byte", processes=1):
    flags = ("--input", "lines.jsonl", "--out", out, "--tokenizer", tokenizer, "--processes", processes)
    return faulty(home, faults, "-m", "moe_jax.data.prepare", *flags)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_preparation_on_a_full_disk_ends_in_one_line_and_goes_on_later(home, tokenizer, processes):
    lines = (json.dumps({"text": f"the quick brown fox {index} " * 40}) + "\n" for index in range(5000))
    (home / "lines.jsonl").write_text("".join(lines))
    name = f"{tokenizer.replace(':', '')}-{processes}"
    assert prepare(home, f"{name}-whole", {}, tokenizer, processes).returncode == 0
    out = home / f"{name}-full"
    for size in (0, 100, 5_000, 300_000):
        done = prepare(home, out, {"file_size_limit": {"bytes": size}}, tokenizer, processes)
        assert done.returncode == 1
        assert re.fullmatch(
            rf"error: File too large: {out}/[^\n]+; allow larger files \(ulimit -f\) and run the same command again\n",
            done.stderr,
        ), done.stderr
        assert not (out / "meta.json").exists()
    again = prepare(home, out, {}, tokenizer, processes)
    assert (again.returncode, again.stderr) == (0, "")
    assert prepared(out) == prepared(home / f"{name}-whole")


def test_the_data_of_a_training_on_a_full_disk_ends_in_one_line(home, tmp_path):
    (home / "long.txt").write_text("the quick brown fox " * 1000)
    flags = ("--config", "tiny.py", "--data.path", "long.txt", "--workdir", tmp_path / "run")
    done = faulty(home, {"file_size_limit": {"bytes": 5_000}}, "train.py", *flags, cache=tmp_path / "cache")
    assert done.returncode == 1
    place = re.escape(str(tmp_path / "cache"))
    assert re.fullmatch(rf"error: File too large: {place}/\S+/text/train-00000.bin; allow [^\n]+\n", done.stderr)
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()
    assert Path(home / "long.txt").exists()
