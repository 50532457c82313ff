"""A text sampled at every evaluation: on the console, in train.log and in the trackers."""

import dataclasses
import logging
from collections.abc import Sequence

from moe_jax.config import SampleConfig
from moe_jax.model.decoder import Variables
from moe_jax.sampling.engine import Engine
from moe_jax.trackers.tracker import Tracker
from moe_jax.training.observers import Observer

log = logging.getLogger("moe_jax")


class Samples(Observer):
    """``sample``, which is checked against the model's vocabulary, is the run's; one text is made each time."""

    def __init__(self, engine: Engine, sample: SampleConfig, trackers: Sequence[Tracker]):
        self._engine, self._trackers = engine, trackers
        self._sample = dataclasses.replace(sample, num_samples=1)

    def evaluated(self, done: int, variables: Variables) -> None:
        (sample,) = self._engine.generate(self._engine.prepare(variables), "", self._sample)
        for tracker in self._trackers:
            tracker.text(done, "sample", sample.text)
        log.info("sample:\n" + sample.text.strip())
