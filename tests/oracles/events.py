"""TensorBoard's event files, read without TensorBoard."""

import struct

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c


def events(run):
    """The scalars in the event files, oldest file first: (step, name, value); and the steps that a restart purged."""
    scalars, purged = [], []
    for file in sorted(run.tensorboard.iterdir(), key=lambda file: file.stat().st_mtime_ns):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            body = content[at + 12 : at + 12 + length]
            sums = struct.unpack_from("<I", content, at + 8) + struct.unpack_from("<I", content, at + 12 + length)
            assert sums == (masked_crc32c(content[at : at + 8]), masked_crc32c(body))
            event = Event.FromString(body)
            at += 12 + length + 4
            scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value if v.HasField("simple_value")]
            if event.session_log.status:
                purged.append(event.step)
    return scalars, purged
