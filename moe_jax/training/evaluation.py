"""The loss of a split as design and README define a published one."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax.data.pipeline import evaluation_batches
from moe_jax.data.prepare import Split
from moe_jax.model.decoder import Variables
from moe_jax.parallel.mesh import put_batch
from moe_jax.training.step import EvalOutput, RoutingTotals


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean cross-entropy in nats a token."""
    num_tokens: int
    """Tokens scored."""
    routing: RoutingTotals | None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def evaluate(
    eval_step: Callable[[Variables, dict], EvalOutput],
    variables: Variables,
    split: Split,
    mesh: Mesh,
    *,
    context_length: int,
    batch_size: int,
    max_tokens: int | None = None,
) -> Evaluation:
    """Scores every token of ``split`` once, in consecutive windows of the context, without noise, dropout or drops.

    With ``max_tokens`` only that many, in windows spread evenly over the split.
    """
    batches = evaluation_batches(
        split.tokens, context_length=context_length, batch_size=batch_size, max_tokens=max_tokens
    )
    losses, counts, routing = [], [], None
    for batch in batches:
        output = jax.device_get(eval_step(variables, put_batch(batch, mesh)))
        losses.append(float(output.loss))
        counts.append(int(output.num_tokens))
        if output.routing is not None:
            routing = output.routing if routing is None else jax.tree.map(np.add, routing, output.routing)
    return Evaluation(math.fsum(losses) / sum(counts), sum(counts), routing)


def bits_per_byte(loss: float, split: Split) -> float | None:
    """loss · tokens / (ln 2 · bytes) of a whole split; None where unknown characters stand for unknown bytes."""
    if split.num_unknown:
        return None
    # The first token of a stream has nothing before it and is not scored.
    return loss * (split.num_tokens - 1) / (math.log(2.0) * split.num_bytes)
