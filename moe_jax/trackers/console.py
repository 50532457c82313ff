"""The progress of a training run on the console."""

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console as Terminal

from moe_jax.runs.progress import Progress
from moe_jax.training.observers import Ending, Observer
from moe_jax.training.step import StepOutput

log = logging.getLogger("moe_jax")


class Console(Observer):
    """Steps done, loss, tokens per second and time left: as a bar on a terminal, otherwise a line now and then."""

    def __init__(self, num_steps: int, first: int):
        self._num_steps = num_steps
        self._open = contextlib.ExitStack()
        self._bar = self._open.enter_context(Progress(Terminal(), log))
        self._bar.start("training", num_steps, first)
        self._bar.describe("compiling")

    def step_read(self, done: int, output: StepOutput) -> None:
        self._bar.update(done, f"step {done}/{self._num_steps}: loss {output.loss:.4f}", int(output.num_targets))

    def evaluation_begins(self) -> None:
        self._bar.describe("evaluating")

    def close(self, ending: Ending, files: Sequence[Path]) -> None:
        self._open.close()
