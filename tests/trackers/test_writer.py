"""The metrics file and TensorBoard together."""

import math

from moe_jax.trackers.trackers import TensorBoard
from moe_jax.trackers.writer import MetricsWriter

from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.metrics_file import read_metrics
from tests.oracles.events import events


def test_scalars_are_events_and_what_lies_past_the_restored_step_is_purged(tmp_path):
    run = RunDirectory(tmp_path)
    with MetricsWriter(run, None, lambda: [TensorBoard(run, None)]) as writer:
        writer.write(5, {"train/loss": 2.5, "moe/load": [[0.5]]})
        writer.write(10, {"train/loss": math.inf})
        writer.write_text(10, "sample", "To be,\nor")
    assert events(run)[0] == [(5, "train/loss", 2.5), (10, "train/loss", math.inf)]
    with MetricsWriter(run, 5, lambda: [TensorBoard(run, 5)]) as writer:
        writer.write(15, {"train/loss": 0.5})
    assert [line["step"] for line in read_metrics(run.metrics_file)] == [5, 15]
    scalars, purged = events(run)
    assert scalars[-1] == (15, "train/loss", 0.5)
    assert purged[-1] == 6
