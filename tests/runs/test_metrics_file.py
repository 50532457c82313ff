"""metrics.jsonl and the TensorBoard events."""

import json
import math

import pytest

from moe_jax.errors import UserError
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.metrics_file import MetricsWriter, read_metrics
from moe_jax.trackers.tensorboard import TensorBoard
from tests.oracles.events import events


def test_a_line_is_on_disk_at_once_and_its_scalars_are_events(tmp_path):
    run = RunDirectory(tmp_path)
    with MetricsWriter(run, None, lambda: [TensorBoard(run, None)]) as writer:
        writer.write(5, {"train/loss": 2.5, "moe/load": [[0.5, math.nan]]})
        assert json.loads(run.metrics_file.read_text()) == {"step": 5, "train/loss": 2.5, "moe/load": [[0.5, None]]}
        writer.write(10, {"train/loss": math.inf})
        writer.write_text(10, "sample", "To be,\nor")
    assert read_metrics(run.metrics_file)[1] == {"step": 10, "train/loss": None}
    scalars, _ = events(run)
    assert scalars == [(5, "train/loss", 2.5), (10, "train/loss", math.inf)]


def test_lines_past_the_restored_step_are_cut(tmp_path):
    run = RunDirectory(tmp_path)
    with MetricsWriter(run, None, lambda: [TensorBoard(run, None)]) as writer:
        for step in (5, 10, 15):
            writer.write(step, {"train/loss": 1.0 * step})
    with open(run.metrics_file, "a") as file:
        file.write('{"step": 20, "train/lo')  # killed
    with MetricsWriter(run, 10, lambda: [TensorBoard(run, 10)]) as writer:
        writer.write(15, {"train/loss": 0.5})
    assert [(line["step"], line["train/loss"]) for line in read_metrics(run.metrics_file)] == [
        (5, 5),
        (10, 10),
        (15, 0.5),
    ]
    scalars, purged = events(run)
    assert scalars[-1] == (15, "train/loss", 0.5)
    assert purged[-1] == 11
    # A new run in a directory where one died before its first checkpoint keeps none of its lines.
    with MetricsWriter(run, None):
        assert read_metrics(run.metrics_file) == []


@pytest.mark.parametrize("line", ["not json", "[]", "3", '{"loss": 1}', '{"step": "one"}'])
def test_a_damaged_line_is_named(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is not a line of metrics"):
        read_metrics(file)


def test_missing_and_unreadable_metrics_are_told(tmp_path):
    with pytest.raises(UserError, match="there are no metrics at"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:1 is not a line of metrics"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("damage", [b"\0\0\0\0\n", b"\xff\n", b'{"step": "10"}\n', b"[" * 100_000 + b"\n"])
def test_a_run_goes_on_with_the_lines_before_a_damaged_one(tmp_path, caplog, damage):
    run = RunDirectory(tmp_path)
    with MetricsWriter(run, None) as writer:
        for step in (1, 2):
            writer.write(step, {"train/loss": 1.0})
    whole = run.metrics_file.read_bytes() + damage + b'{"step": 3}\n'
    run.metrics_file.write_bytes(whole)
    with MetricsWriter(run, 3) as writer:
        writer.write(4, {"train/loss": 1.0})
    assert [line["step"] for line in read_metrics(run.metrics_file)] == [1, 2, 4]
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == whole
    assert "metrics.jsonl:3 is not a line of metrics" in caplog.text
