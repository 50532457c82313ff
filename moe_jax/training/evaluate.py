"""The loss of a split: the mean over every token, scored once, without noise, dropout or drops."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax.data.batches import evaluation_batches
from moe_jax.data.dataset import Dataset, Split
from moe_jax.model.decoder import Variables
from moe_jax.model.moe.statistics import RoutingTotals
from moe_jax.sharding.mesh import put_batch
from moe_jax.training.step import EvalOutput


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean cross-entropy in nats a token."""
    num_tokens: int
    """Tokens scored."""
    num_positions: int
    """Places of the rows that held them, those of padding too."""
    routing: RoutingTotals | None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def evaluate(
    eval_step: Callable[[Variables, dict], EvalOutput],
    variables: Variables,
    data: Dataset,
    name: str,
    mesh: Mesh,
    *,
    mode: str,
    context_length: int,
    batch_size: int,
    max_tokens: int | None = None,
) -> dict[str, Evaluation]:
    """Scores every token of the ``name`` split of each corpus once, without noise, dropout or drops, by corpus.

    A corpus of which there is nothing to score is not in it.

    Rows are those of ``evaluation_batches``. With ``max_tokens`` only about that many, of each corpus its share.
    """
    splits = data.splits(name)
    total = sum(split.num_tokens for split in splits)
    found = {}
    for corpus, split in zip(data.corpora, splits, strict=True):
        if split.num_tokens < 2:  # the first one is scored by none
            continue
        batches = evaluation_batches(
            split,
            data.tokenizer,
            mode,
            context_length=context_length,
            batch_size=batch_size,
            max_tokens=None if max_tokens is None else max(1, max_tokens * split.num_tokens // total),
        )
        losses, counts, num_positions, routing = [], [], 0, None
        for batch in batches:
            num_positions += int(np.sum(np.any(batch["mask"], axis=1))) * context_length
            output = jax.device_get(eval_step(variables, put_batch(batch, mesh)))
            losses.append(float(output.loss))
            counts.append(int(output.num_tokens))
            if output.routing is not None:
                routing = output.routing if routing is None else jax.tree.map(np.add, routing, output.routing)
        found[corpus.name] = Evaluation(math.fsum(losses) / sum(counts), sum(counts), num_positions, routing)
    return found


def joined(evaluations: Iterable[Evaluation]) -> Evaluation:
    """The evaluation of all texts together, each token counting once."""
    parts = list(evaluations)
    num_tokens = sum(part.num_tokens for part in parts)
    routing = parts[0].routing and jax.tree.map(lambda *leaves: sum(leaves), *(part.routing for part in parts))
    num_positions = sum(part.num_positions for part in parts)
    loss = math.fsum(part.loss * part.num_tokens for part in parts) / num_tokens
    return Evaluation(loss, num_tokens, num_positions, routing)


def bits_per_byte(evaluation: Evaluation, splits: Iterable[Split]) -> float | None:
    """loss · tokens / (ln 2 · bytes) of whole ``splits``; None where an unknown token's are not known, or none.

    Tokens are those scored, the ends of documents among them; bytes those of the text itself.
    """
    splits = list(splits)
    num_bytes = sum(split.num_bytes for split in splits)
    if not num_bytes or any(split.num_unknown for split in splits):
        return None
    return evaluation.loss * evaluation.num_tokens / (math.log(2.0) * num_bytes)
