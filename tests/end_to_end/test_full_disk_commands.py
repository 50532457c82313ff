"""Whole commands on a full disk, for which a limit on the size of files stands; and a disk that is really full."""

import json
import os
import re
import subprocess
import sys

import pytest

from moe_jax.runs.layout import RunDirectory
from tests.oracles.events import events
from tests.tiny import ROOT, command, steps_of, train

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
    return train(home, workdir, *RUN, faults=fault)


@pytest.mark.slow
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
    assert steps_of(run.path) == sorted([*range(1, 201), *evaluated])
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
    assert steps_of(run.path) == list(range(1, int(first)))
    assert int(lost) == 202 - (int(first) - 1)
    assert (run.checkpoints / "200").is_dir()
    more = train(home, workdir, "--train.num-steps", 210, *RUN[2:])
    assert (more.returncode, more.stderr) == (0, "")
    assert steps_of(run.path) == [*range(1, int(first)), *range(201, 211), 210]


def prepared(folder):
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def prepare(home, out, faults, tokenizer="byte", processes=1):
    flags = ("--input", "lines.jsonl", "--out", out, "--tokenizer", tokenizer, "--processes", processes)
    return command(home, "-m", "moe_jax.prepare", *flags, faults=faults)


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
    faults = {"file_size_limit": {"bytes": 5_000}}
    done = train(home, tmp_path / "run", "--data.path", "long.txt", faults=faults, cache=tmp_path / "cache")
    assert done.returncode == 1
    place = re.escape(str(tmp_path / "cache"))
    assert re.fullmatch(rf"error: File too large: {place}/\S+/text/train-00000.bin; allow [^\n]+\n", done.stderr)
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()


IN_A_SMALL_DISK = """
import sys
from pathlib import Path
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.log import log, start_log
from moe_jax.runs.metrics_file import MetricsFile
from moe_jax.trackers.tensorboard import TensorBoard

disk = Path(sys.argv[1])
run = RunDirectory(disk / "run")
run.path.mkdir()
with start_log(run.log_file), MetricsFile(run, None) as metrics:
    tensorboard = TensorBoard(run, None)
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
        metrics.write(step, {"train/loss": 1.0 * step, "moe/load": [[0.125] * 100]})
        tensorboard.line(step, {"train/loss": 1.0 * step})
        log.debug(f"step {step} " + "." * 500)
        tensorboard.text(step, "sample", "." * 500)
    tensorboard.close("finished", ())
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
    assert steps_of(run.path) == list(range(1, 100))
    assert [step for step, _, _ in events(run)[0]] == list(range(1, 100))
    found = re.findall(r" step (\d+) \.{500}\n", run.log_file.read_text())
    assert found == [str(step) for step in range(1, 100)]
