"""Step metrics: summed over a log interval on the host, then named as in metrics.jsonl."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax.model.moe.statistics import RoutingTotals, health_metrics
from moe_jax.training.step import StepOutput

_MEANS = ("loss", "grad_norm", "load_balancing_loss", "importance_loss", "router_z_loss")
_TOTALS = ("num_tokens", "load", "dropped", "entropy")


def step_metrics(output: StepOutput) -> dict[str, Any]:
    """What of one step's ``output``, which is on the host, adds up over steps; "steps" counts them."""
    sums = {"steps": 1, "loss": output.loss, "grad_norm": output.grad_norm, **output.moe_losses}
    if output.routing is not None:
        routing = output.routing
        sums |= dict(
            zip(_TOTALS, (routing.num_tokens, routing.load_NE, routing.dropped_N, routing.entropy_N), strict=True)
        )
    return sums


class Interval:
    """The steps since the last line of metrics.jsonl: their metrics, and how many took how long.

    What ``to_json`` gives goes into a checkpoint, so that an interval that a stop has divided is averaged as a whole.
    """

    def __init__(self, saved: dict[str, Any] | list | None):
        saved = _from_list(saved) if isinstance(saved, list) else saved or {}
        self.sums: dict[str, Any] = {
            name: value if name == "steps" else np.asarray(value, np.float32) for name, value in saved.items()
        }
        """Of ``step_metrics``, in float32 and in the order of the steps; empty where no step has counted."""
        self.tokens, self.steps, self.seconds = 0, 0, 0.0

    def add(self, output: StepOutput) -> None:
        new = step_metrics(output)
        self.sums = {name: self.sums[name] + value for name, value in new.items()} if self.sums else new

    def time(self, num_tokens: int) -> None:
        """Counts a step of so many scored tokens among those that ``seconds`` are of."""
        self.tokens += num_tokens
        self.steps += 1

    def to_json(self) -> dict[str, Any] | None:
        return {name: np.asarray(value).tolist() for name, value in self.sums.items()} or None


def _from_list(saved: list) -> dict[str, Any]:
    """Of a checkpoint of before: [steps, then a sum and the steps for each mean, then the totals]."""
    is_sparse = len(saved) > 5
    means = _MEANS if is_sparse else _MEANS[:2]
    sums = dict(zip(means, saved[1 : 2 * len(means) : 2], strict=True))
    totals = dict(zip(_TOTALS, saved[-4:], strict=True)) if is_sparse else {}
    return {"steps": saved[0], **sums, **totals}


def named_metrics(sums: dict[str, Any]) -> dict[str, float]:
    """``step_metrics``, summed over steps, under their names in metrics.jsonl: train/* and, of a MoE model, moe/*."""
    room = {"loss": "train", "grad_norm": "train"}
    steps = np.float32(sums["steps"])
    named = {f"{room.get(name, 'moe')}/{name}": float(sums[name] / steps) for name in _MEANS if name in sums}
    return named | (routing_summary(RoutingTotals(*(sums[name] for name in _TOTALS))) if "load" in sums else {})


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
