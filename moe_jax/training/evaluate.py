"""The loss of a split as design and README define a published one."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from moe_jax.config import DataConfig, MeshConfig
from moe_jax.data.batches import check_data, evaluation_batches
from moe_jax.data.dataset import PreparedData, is_prepared
from moe_jax.data.shards import Split
from moe_jax.data.tokenizer import fingerprint
from moe_jax.errors import UserError
from moe_jax.files import cache_folder
from moe_jax.model.decoder import Decoder, Variables
from moe_jax.model.moe.choice import on_this_machine
from moe_jax.prepare.cache import find_or_prepare
from moe_jax.runs.checkpoint.record import Record
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.opened import OpenedRun, open_run
from moe_jax.sharding.mesh import make_mesh, put_batch, use_mesh
from moe_jax.sharding.startup import enable_compile_cache
from moe_jax.training.metrics import routing_by_layer, routing_summary
from moe_jax.training.state import abstract_state
from moe_jax.training.step import EvalOutput, RoutingTotals, make_eval_step


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
    data: PreparedData,
    name: str,
    mesh: Mesh,
    *,
    mode: str,
    context_length: int,
    batch_size: int,
    max_tokens: int | None = None,
) -> dict[str, Evaluation]:
    """Scores every token of the ``name`` split of each corpus once, without noise, dropout or drops, by corpus.

    Rows are those of ``evaluation_batches``. With ``max_tokens`` only about that many, of each corpus its share.
    """
    splits = data.splits(name)
    total = sum(split.num_tokens for split in splits)
    found = {}
    for corpus, split in zip(data.corpora, splits, strict=True):
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
    """loss · tokens / (ln 2 · bytes) of whole ``splits``; None where unknown tokens stand for unknown bytes.

    Tokens are those scored, the ends of documents among them; bytes those of the text itself.
    """
    splits = list(splits)
    if any(split.num_unknown for split in splits):
        return None
    return evaluation.loss * evaluation.num_tokens / (math.log(2.0) * sum(split.num_bytes for split in splits))


def check_same_text(record: Record, config: DataConfig, data: PreparedData) -> None:
    """UserError where the checkpoint of ``record`` was trained on other text: its vocabulary may be another too."""
    trained_on = record.progress["data_fingerprint"]
    if trained_on != data.fingerprint:
        text = "the text of the embedded plays" if config.path is None else f"the text of {config.path}"
        raise UserError(
            f"{text} is not the one this run was trained on (fingerprint {data.fingerprint}, "
            f"was {trained_on}); name the old text, or start a new run in another --workdir"
        )


def evaluate_run(
    run: RunDirectory, path: str | None, name: Literal["val", "train", "all"], which: Literal["best", "newest"]
) -> dict[str, Any]:
    """What ``moe_jax.evaluate`` prints: the scores of a checkpoint on the run's text, or on the one at ``path``.

    Raises UserError, as for a text that has changed, or a prepared folder whose tokens are not those of the run.
    """
    opened = open_run(run.path, which)
    config, tokenizer = opened.config, opened.tokenizer
    data = _text(path, opened)
    check_data(data, config.data, config.model.context_length)
    if config.train.compile_cache:
        enable_compile_cache()
    splits = ("train", "val") if name == "all" else (name,)
    # The devices here need not be those of the training.
    devices = jax.device_count()
    batch_size = -(-config.data.batch_size // (config.optimizer.accumulation_steps * devices)) * devices
    mesh = make_mesh(MeshConfig(), batch_size)
    decoder = Decoder(on_this_machine(config.model), tokenizer.vocab_size)
    with use_mesh(mesh):
        items = abstract_state(decoder, optax.identity(), mesh).variables.to_items()
        variables = Variables.from_items(opened.restore(items))
        eval_step = jax.jit(make_eval_step(decoder))
        by_split = [
            evaluate(
                eval_step,
                variables,
                data,
                split,
                mesh,
                mode=config.data.mode,
                context_length=config.model.context_length,
                batch_size=batch_size,
            )
            for split in splits
        ]
    by_corpus = {corpus: joined(part[corpus] for part in by_split) for corpus in by_split[0]}
    found = joined(by_corpus.values())
    scores: dict[str, Any] = {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": bits_per_byte(found, [part for split in splits for part in data.splits(split)]),
        "tokens": found.num_tokens,
    }
    if config.data.mode == "padded":
        # What others publish of padded rows, once a model has learned to predict padding for certain.
        scores["loss_over_padding"] = found.loss * found.num_tokens / found.num_positions
    if len(by_corpus) > 1:
        scores["loss_by_corpus"] = {name: part.loss for name, part in by_corpus.items()}
    if found.routing is not None:
        scores |= routing_summary(found.routing) | routing_by_layer(found.routing)
    return scores


def _text(path: str | None, opened: OpenedRun) -> PreparedData:
    """The run's own text, or the one at ``path``, which is tokenized and split as the run's was."""
    data, run, tokenizer = opened.config.data, opened.directory, opened.tokenizer
    if path is not None:
        is_ready = Path(path).is_dir() and is_prepared(Path(path))
        data = dataclasses.replace(
            data,
            path=path,
            tokenizer=None if is_ready else str(run.tokenizer),
            val_fraction=None if is_ready else data.val_fraction,
        )
    try:
        found = find_or_prepare(data, cache_folder("data"), tokenizer.delimiters)
    except UserError as error:
        raise UserError(str(error).replace("data.path=", "--data ") if path is not None else str(error)) from None
    if path is None:
        check_same_text(opened.checkpoint.record, data, found)
    elif fingerprint(found.tokenizer) != fingerprint(tokenizer):
        raise UserError(
            f"{path} has tokens of another tokenizer ({found.tokenizer.name}) than {run.path} ({tokenizer.name}); "
            f"prepare it with --tokenizer {run.tokenizer} --delimiters {tokenizer.delimiters}"
        )
    return found
