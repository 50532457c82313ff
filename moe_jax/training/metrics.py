"""Step metrics: merged over a log interval with clu.metrics, then named as in metrics.jsonl."""

from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from moe_jax.model.moe.statistics import RoutingTotals, health_metrics
from moe_jax.training.step import StepOutput


@flax.struct.dataclass
class Total(metrics.Metric):
    """The elementwise sum of an array over steps."""

    total: Any

    @classmethod
    def from_model_output(cls, value: Any, **_: Any) -> "Total":
        return cls(total=value)

    def merge(self, other: "Total") -> "Total":
        return Total(total=self.total + other.total)

    def compute(self) -> Any:
        return self.total


@flax.struct.dataclass
class DenseMetrics(metrics.Collection):
    loss: metrics.Average.from_output("loss")  # type: ignore[valid-type]
    grad_norm: metrics.Average.from_output("grad_norm")  # type: ignore[valid-type]


@flax.struct.dataclass
class MoEMetrics(metrics.Collection):
    loss: metrics.Average.from_output("loss")  # type: ignore[valid-type]
    grad_norm: metrics.Average.from_output("grad_norm")  # type: ignore[valid-type]
    load_balancing_loss: metrics.Average.from_output("load_balancing_loss")  # type: ignore[valid-type]
    importance_loss: metrics.Average.from_output("importance_loss")  # type: ignore[valid-type]
    router_z_loss: metrics.Average.from_output("router_z_loss")  # type: ignore[valid-type]
    num_tokens: Total.from_output("num_tokens")  # type: ignore[valid-type]
    load: Total.from_output("load")  # type: ignore[valid-type]
    dropped: Total.from_output("dropped")  # type: ignore[valid-type]
    entropy: Total.from_output("entropy")  # type: ignore[valid-type]


Metrics = DenseMetrics | MoEMetrics


def step_metrics(output: StepOutput) -> Metrics:
    """One step's metrics, ready to be merged with those of other steps."""
    values = {"loss": output.loss, "grad_norm": output.grad_norm}
    if output.routing is None:
        return DenseMetrics.single_from_model_output(**values)
    routing = output.routing
    return MoEMetrics.single_from_model_output(
        **values,
        **output.moe_losses,
        num_tokens=routing.num_tokens,
        load=routing.load_NE,
        dropped=routing.dropped_N,
        entropy=routing.entropy_N,
    )


def merge(metrics: Metrics, more: Metrics) -> Metrics:
    """The metrics of the steps of both."""
    return cast(Metrics, metrics.merge(cast(Any, more)))


class Interval:
    """The steps since the last line of metrics.jsonl: their metrics, and how many took how long.

    What ``to_json`` gives goes into a checkpoint, so that an interval that a stop has divided is averaged as a whole.
    """

    def __init__(self, saved: list | None):
        self._saved = saved
        self._metrics: Metrics | None = None
        self.tokens, self.steps, self.seconds = 0, 0, 0.0

    def add(self, output: StepOutput) -> None:
        metrics = step_metrics(output)
        if self._saved is not None:
            # In the order of an interval that was not divided: sums of other orders have other last bits.
            leaves, structure = jax.tree.flatten(metrics)
            saved = [
                np.asarray(value, np.asarray(leaf).dtype) for value, leaf in zip(self._saved, leaves, strict=True)
            ]
            self._metrics, self._saved = jax.tree.unflatten(structure, saved), None
        self._metrics = metrics if self._metrics is None else merge(self._metrics, metrics)

    def time(self, num_tokens: int) -> None:
        """Counts a step of so many scored tokens among those that ``seconds`` are of."""
        self.tokens += num_tokens
        self.steps += 1

    @property
    def metrics(self) -> Metrics | None:
        """None where no step has counted, as where each was left out."""
        return self._metrics

    def to_json(self) -> list | None:
        if self._metrics is None:
            return self._saved
        return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(jax.device_get(self._metrics))]


def named_metrics(merged: Metrics) -> dict[str, float]:
    """The merged metrics under their names in metrics.jsonl: train/* and, for a MoE model, moe/*."""
    values = merged.compute()
    named = {f"train/{name}": float(values[name]) for name in ("loss", "grad_norm")}
    if not isinstance(merged, MoEMetrics):
        return named
    for name in ("load_balancing_loss", "importance_loss", "router_z_loss"):
        named[f"moe/{name}"] = float(values[name])
    routing = RoutingTotals(values["num_tokens"], values["load"], values["dropped"], values["entropy"])
    return named | routing_summary(routing)


def expert_load(merged: Metrics) -> np.ndarray | None:
    """[MoE layers, E] rows of each expert in the merged steps; None for a dense model."""
    return np.asarray(merged.load.total) if isinstance(merged, MoEMetrics) else None


def routing_summary(routing: RoutingTotals) -> dict[str, float]:
    """The health of all MoE layers in a few numbers: means over layers, the worst max_load, all dead experts."""
    health = _health(routing)
    return {
        "moe/expert_usage": float(health["expert_usage"]),
        "moe/sparsity": float(health["sparsity"]),
        "moe/dropped_fraction": float(np.mean(health["dropped_fraction"])),
        "moe/router_entropy": float(np.mean(health["router_entropy"])),
        "moe/max_load": float(np.max(health["max_load"])),
        "moe/dead_experts": float(np.sum(health["dead_experts"])),
    }


def routing_by_layer(routing: RoutingTotals) -> dict[str, list]:
    """The health of each MoE layer: moe/load is [[E] per layer], the others one number a layer."""
    health = _health(routing)
    names = ("max_load", "dead_experts", "router_entropy")
    return {"moe/load": np.asarray(health["load"], float).round(6).tolist()} | {
        f"moe/layer_{name}": np.asarray(health[name], float).round(6).tolist() for name in names
    }


def _health(routing: RoutingTotals) -> dict[str, np.ndarray]:
    health = health_metrics(
        jnp.asarray(routing.load_NE),
        jnp.asarray(routing.dropped_N),
        jnp.asarray(routing.entropy_N),
        routing.num_tokens,
    )
    return {name: np.asarray(value) for name, value in health.items()}
