"""What in a run's numbers a person would want to be woken for: loss spikes and routers that collapse."""

import collections
import logging
import statistics
from collections.abc import Iterator, Mapping

import numpy as np

from moe_jax.config import MoEConfig
from moe_jax.training.observers import Observer
from moe_jax.training.step import StepOutput

log = logging.getLogger("moe_jax")

_PEERS = 100
"""Steps that a loss is compared with."""
_FEWEST_PEERS = 20
_SPREADS = 10.0
_SMALLEST_RISE = 0.2
"""Nats; losses that hardly differ would otherwise make a spike of nothing."""
_INTERVALS_TO_COLLAPSE = 3


class Alarms(Observer):
    """Logs a warning of each loss spike and of each router that collapses."""

    def __init__(self, moe: MoEConfig):
        self._spikes, self._collapses = SpikeWatch(), CollapseWatch(moe.num_experts, moe.top_k)

    def step_read(self, done: int, output: StepOutput) -> None:
        warning = self._spikes.warning(done, float(output.loss)) if output.is_finite else None
        if warning is not None:
            log.warning(f"warning: {warning}")

    def line(self, done: int, values: Mapping[str, float | list], load_NE: np.ndarray | None = None) -> None:
        if load_NE is not None:
            for warning in self._collapses.warnings(done, load_NE):
                log.warning(f"warning: {warning}")


class SpikeWatch:
    """Finds a loss that leaves those before it: above their median by ten times their spread, and by 0.2 nats.

    The spread is 1.48 times the median distance from the median, which is one standard deviation of a normal
    distribution. A loss that is a spike is not compared with later.
    """

    def __init__(self) -> None:
        self._losses: collections.deque[float] = collections.deque(maxlen=_PEERS)
        self._is_high = False
        self._num_high = 0

    def warning(self, step: int, loss: float) -> str | None:
        """What to say after ``step``, whose ``loss`` is finite; each spike is reported once."""
        if len(self._losses) < _FEWEST_PEERS:
            self._losses.append(loss)
            return None
        median = statistics.median(self._losses)
        spread = 1.4826 * statistics.median(abs(each - median) for each in self._losses)
        limit = median + max(_SPREADS * spread, _SMALLEST_RISE)
        was_high, self._is_high = self._is_high, loss > limit
        if not self._is_high:
            self._num_high = 0
            self._losses.append(loss)
            return None
        self._num_high += 1
        if self._num_high == _PEERS:  # it has come to stay
            self._losses.clear()
            self._num_high = 0
        if was_high:
            return None
        return f"the loss of step {step} jumped to {loss:.4f}, from a median of {median:.4f} before it"


class CollapseWatch:
    """Finds a layer whose rows stay on few experts: on at most a quarter more than top_k, or E / 4, where more.

    Their number is exp(entropy of the load), which is E where all are used alike and top_k where each token goes to
    the same ones. It counts once it has lasted for three lines of metrics.
    """

    def __init__(self, num_experts: int, top_k: int):
        self._limit = min(max(1.25 * top_k, num_experts / 4), num_experts - 0.5)
        self._num_experts, self._top_k = num_experts, top_k
        self._lasted: collections.Counter[int] = collections.Counter()

    def warnings(self, step: int, load_NE: np.ndarray) -> Iterator[str]:
        """What to say of the rows [MoE layers, E] of the steps up to ``step``; each collapse is reported once."""
        if self._top_k >= self._num_experts:
            return
        share_NE = load_NE / np.maximum(load_NE.sum(axis=1, keepdims=True), 1)
        effective_N = np.exp(-np.sum(share_NE * np.log(np.maximum(share_NE, 1e-30)), axis=1))
        for layer, effective in enumerate(effective_N):
            self._lasted[layer] = self._lasted[layer] + 1 if effective <= self._limit else 0
            if self._lasted[layer] == _INTERVALS_TO_COLLAPSE:
                busiest = ", ".join(str(expert) for expert in np.argsort(-load_NE[layer])[: round(effective)])
                yield (
                    f"the router of MoE layer {layer} has collapsed by step {step}: its load is that of "
                    f"{effective:.1f} of {self._num_experts} experts ({busiest}); raise "
                    "model.moe.load_balancing_weight or lower optimizer.learning_rate in a new run"
                )
