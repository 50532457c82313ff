"""metrics.jsonl: what is written, cut and read."""

import json
import math

import pytest

from moe_jax.errors import UserError
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.metrics_file import MetricsFile, read_metrics


def test_a_line_is_on_disk_at_once(tmp_path):
    run = RunDirectory(tmp_path)
    with MetricsFile(run, None) as metrics:
        metrics.write(5, {"train/loss": 2.5, "moe/load": [[0.5, math.nan]]})
        assert json.loads(run.metrics_file.read_text()) == {"step": 5, "train/loss": 2.5, "moe/load": [[0.5, None]]}
        metrics.write(10, {"train/loss": math.inf})
    assert read_metrics(run.metrics_file)[1] == {"step": 10, "train/loss": None}


def test_lines_past_the_restored_step_are_cut(tmp_path):
    run = RunDirectory(tmp_path)
    with MetricsFile(run, None) as metrics:
        for step in (5, 10, 15):
            metrics.write(step, {"train/loss": 1.0 * step})
    with open(run.metrics_file, "a") as file:
        file.write('{"step": 20, "train/lo')  # killed
    with MetricsFile(run, 10) as metrics:
        metrics.write(15, {"train/loss": 0.5})
    lines = [(line["step"], line["train/loss"]) for line in read_metrics(run.metrics_file)]
    assert lines == [(5, 5), (10, 10), (15, 0.5)]
    # A new run in a directory where one died before its first checkpoint keeps none of its lines.
    with MetricsFile(run, None):
        assert read_metrics(run.metrics_file) == []


DAMAGED = [b"not json", b"[]", b"3", b'{"loss": 1}', b'{"step": "10"}', b"\0\0\0\0", b"\xff", b"[" * 100_000]
DAMAGED += [b'{"step": -1}', b'{"step": 3, "val/loss": [1]}', b'{"step": 3, "moe/load": [["a"]]}']
DAMAGED += [b'{"step": 3, "a": %s}' % (b"[" * 64 + b"]" * 64), b'{"step": 3, "a": "%s"}' % (b"a" * (4 << 20))]


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_is_named_and_a_run_goes_on_with_those_before_it(tmp_path, caplog, line):
    run = RunDirectory(tmp_path)
    whole = b'{"step": 1}\n{"step": 2}\n' + line + b'\n{"step": 3}\n'
    run.metrics_file.write_bytes(whole)
    with pytest.raises(UserError, match=r"metrics\.jsonl:3 is not a line of metrics"):
        read_metrics(run.metrics_file)
    with MetricsFile(run, 3) as metrics:
        metrics.write(4, {"train/loss": 1.0})
    assert [line["step"] for line in read_metrics(run.metrics_file)] == [1, 2, 4]
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == whole
    assert "metrics.jsonl:3 is not a line of metrics" in caplog.text


def test_missing_metrics_are_an_error(tmp_path):
    with pytest.raises(UserError, match="there are no metrics at"):
        read_metrics(tmp_path / "metrics.jsonl")
