"""What trackers have in common: they take numbers and texts."""

from collections.abc import Mapping

import numpy as np

from moe_jax.training.observers import Observer


class Tracker(Observer):
    """A place for metrics beside metrics.jsonl. A fault of it after its start is logged and ends no run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        raise NotImplementedError

    def text(self, step: int, name: str, text: str) -> None:
        raise NotImplementedError

    def line(self, done: int, values: Mapping[str, float | list], load_NE: np.ndarray | None = None) -> None:
        self.scalars(done, {name: value for name, value in values.items() if not isinstance(value, list)})
