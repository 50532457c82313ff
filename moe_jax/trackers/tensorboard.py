"""TensorBoard event files in the run directory."""

import logging
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.files import GrowingFile
from moe_jax.runs.layout import RunDirectory
from moe_jax.trackers.tracker import Tracker
from moe_jax.training.observers import Ending

log = logging.getLogger("moe_jax")


class TensorBoard(Tracker):
    """Event files in the run directory; what a start that died wrote past the restored step is purged.

    tensorboardX makes the events. Its own writer is not used: on a full disk its thread dies, and the run waits for
    that thread forever.
    """

    def __init__(self, run: RunDirectory, restored_step: int | None):
        run.tensorboard.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self._file = GrowingFile(run.tensorboard / name, log.warning)
        first = (restored_step or 0) + 1
        self._append(first, file_version="brain.Event:2")
        self._append(first, session_log={"status": "START"})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._append(step, summary=scalar(name, value))

    def text(self, step: int, name: str, text: str) -> None:
        from tensorboardX.summary import text as text_summary

        # Indented, it is shown as it is.
        indented = "\n".join("    " + line for line in text.splitlines())
        self._append(step, summary=text_summary(name, indented))

    def _append(self, step: int, **what: Any) -> None:
        """An event as a record of a TFRecord file: its length and itself, with a checksum behind each."""
        from tensorboardX.proto.event_pb2 import Event  # type: ignore[missing-module-attribute] - made on import
        from tensorboardX.record_writer import masked_crc32c

        event = Event(wall_time=time.time(), step=step, **what).SerializeToString()
        length = struct.pack("<Q", len(event))
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, event)]
        self._file.append(length + sums[0] + event + sums[1])

    def close(self, ending: Ending, files: Sequence[Path]) -> None:
        lost = self._file.close()
        if lost:
            log.warning(f"warning: TensorBoard lacks the last {len(lost)} values, which could not be written")
