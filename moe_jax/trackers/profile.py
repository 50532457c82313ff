"""A jax.profiler trace of a few steps, for TensorBoard's profile page or Perfetto."""

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

import jax

from moe_jax.config.rules import profile_steps
from moe_jax.files import plain_name
from moe_jax.training.observers import Ending, Observer
from moe_jax.training.state import TrainState

log = logging.getLogger("moe_jax")


class Profile(Observer):
    """Records steps START to STOP-1 of ``train.profile`` into ``folder``."""

    def __init__(self, profile: str, folder: Path):
        folder.mkdir(exist_ok=True)  # what is in its way is told now, and not at step START
        self._folder = folder
        self._open = contextlib.ExitStack()
        self._start, self._stop = profile_steps(profile)
        self._is_recording = False

    def step_begins(self, step: int, state: TrainState) -> None:
        """Starts or ends the recording when it is time; waits for the device first, so that only its steps are in."""
        if self._start <= step < self._stop and not self._is_recording:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._open.enter_context(plain_name(self._folder))))
            self._is_recording = True
        elif step >= self._stop and self._is_recording:
            jax.block_until_ready(state)
            self._stop_trace()

    def close(self, ending: Ending, files: Sequence[Path]) -> None:
        """Ends a recording that is still on, as when the run ends before STOP."""
        if self._is_recording:
            self._stop_trace()

    def _stop_trace(self) -> None:
        self._is_recording = False
        try:
            with self._open:
                jax.profiler.stop_trace()
        except (RuntimeError, OSError) as error:  # a full disk; the run is worth more than its profile
            log.warning(f"warning: the profile cannot be written to {self._folder} ({error}); the run goes on")
            return
        log.info(f"wrote a profile to {self._folder}")
