"""A jax.profiler trace of a few steps, for TensorBoard's profile page or Perfetto."""

import logging
from pathlib import Path

import jax

from moe_jax.axes import PyTree
from moe_jax.config.rules import profile_steps

log = logging.getLogger("moe_jax")


class Trace:
    """Records steps START to STOP-1 of ``train.profile`` into ``folder``."""

    def __init__(self, profile: str | None, folder: Path):
        self.folder = folder
        self.start, self.stop = profile_steps(profile) if profile else (0, 0)
        self.is_recording = False

    def before_step(self, step: int, state: PyTree) -> None:
        """Starts or ends the recording where it is time; waits for the device first, so that only its steps are in."""
        if self.start <= step < self.stop and not self.is_recording:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.folder))
            self.is_recording = True
        elif step >= self.stop:
            self.finish(state)

    def finish(self, state: PyTree) -> None:
        """Ends the recording if one is on, as when the run ends before STOP."""
        if self.is_recording:
            jax.block_until_ready(state)
            self.is_recording = False
            try:
                jax.profiler.stop_trace()
            except jax.errors.JaxRuntimeError as error:  # a full disk; the run is worth more than its profile
                log.warning(f"warning: the profile cannot be written to {self.folder} ({error}); the run goes on")
                return
            log.info(f"wrote a profile to {self.folder}")
