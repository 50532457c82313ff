"""What watches a run, such as trackers, alarms and the progress bar: the loop calls each at fixed moments."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from moe_jax.model.decoder import Variables
from moe_jax.training.state import TrainState
from moe_jax.training.step import StepOutput

Ending = Literal["finished", "interrupted", "failed"]


class Observer:
    """No-ops: an observer overrides the moments that it needs, and handles its own faults, for none may end a run."""

    def step_begins(self, step: int, state: TrainState) -> None:
        """Before optimizer step ``step``, counted from 0, is computed from ``state``."""

    def step_read(self, done: int, output: StepOutput) -> None:
        """Once the ``output`` of step ``done``, counted from 1, is on the host."""

    def step_ends(self, done: int) -> None:
        """When the host has nothing more to do for step ``done``; not after a start's first, which compiles."""

    def line(self, done: int, values: Mapping[str, float | list], load_NE: np.ndarray | None = None) -> None:
        """A line of metrics.jsonl after ``done`` steps; where it is of training steps, the rows of each expert."""

    def evaluation_begins(self) -> None:
        """Before the splits are scored."""

    def evaluated(self, done: int, variables: Variables) -> None:
        """Once the ``variables`` after ``done`` steps have been scored."""

    def close(self, ending: Ending, files: Sequence[Path]) -> None:
        """At the end of a start, with the run's pictures where there are some."""
