"""The scores that moe_jax.evaluate prints: those of a checkpoint, on the text of its run or on another."""

import dataclasses
import functools
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import optax

from moe_jax.config import MeshConfig
from moe_jax.data.dataset import Dataset, is_dataset
from moe_jax.data.tokenizer_file import fingerprint
from moe_jax.errors import UserError, naming_what_helps
from moe_jax.files import cache_folder
from moe_jax.model.decoder import Decoder, Variables
from moe_jax.model.machine import this_machine
from moe_jax.model.moe.backends import for_machine
from moe_jax.model.moe.routing import is_causal
from moe_jax.prepare.cache import find_or_prepare
from moe_jax.runs.opened import OpenedRun
from moe_jax.runs.resume import check_same_text
from moe_jax.sharding.mesh import make_mesh, use_mesh
from moe_jax.sharding.startup import start_jax
from moe_jax.training.evaluate import bits_per_byte, evaluate, joined
from moe_jax.training.metrics import routing_by_layer, routing_summary
from moe_jax.training.state import abstract_state
from moe_jax.training.step import eval_step

Split = Literal["val", "train", "all"]


def score(opened: OpenedRun, path: str | None, split: Split) -> dict[str, Any]:
    """The scores of a checkpoint on its run's text, or on the one at ``path``.

    Raises UserError, as for a text that has changed, or a prepared folder whose tokens are not those of the run.
    """
    config, tokenizer = opened.config, opened.tokenizer
    if not is_causal(config.model.moe):
        print("note: experts that choose have seen later tokens too, and drop some", file=sys.stderr)
    dataset = _dataset(opened, path)
    names = ("train", "val") if split == "all" else (split,)
    splits = [part for name in names for part in dataset.splits(name)]
    # The first token of a stream is scored by none. Rules of training, such as whole windows, are none of scoring.
    if all(part.num_tokens < 2 for part in splits):
        raise UserError(
            f"{path or config.data.path} has no token to score in {' and '.join(names)}; give more text"
            f"{'' if split == 'all' else ', or set --split all'}"
        )
    if path is not None:
        scored, every = (
            sum(part.num_tokens for part in parts)
            for parts in (splits, [*dataset.splits("train"), *dataset.splits("val")])
        )
        which = f"the {split} split, {scored:,} of {every:,} tokens" if scored < every else "all of it"
        print(f"note: scoring {path}: {which}", file=sys.stderr)
    start_jax(compile_cache=config.train.compile_cache)
    # The devices here need not be those of the training.
    devices = jax.device_count()
    batch_size = -(-config.data.batch_size // (config.optimizer.accumulation_steps * devices)) * devices
    mesh = make_mesh(MeshConfig(), config.model, batch_size)
    num_tokens = batch_size * config.model.context_length
    machine, packed = this_machine(), config.data.mode == "packed"
    model = for_machine(config.model, num_tokens, train=False, machine=machine, as_set=False, packed=packed)
    decoder = Decoder(model, tokenizer.vocab_size)
    with naming_what_helps("leave a GPU with JAX_PLATFORMS=cpu, or free memory"), use_mesh(mesh):
        items = abstract_state(decoder, optax.identity(), mesh).variables.to_items()
        variables = Variables.from_items(opened.restore(items))
        step = jax.jit(functools.partial(eval_step, decoder))
        by_split = [
            evaluate(
                step,
                variables,
                dataset,
                name,
                mesh,
                mode=config.data.mode,
                context_length=config.model.context_length,
                batch_size=batch_size,
            )
            for name in names
        ]
    by_corpus = {
        corpus.name: joined(parts)
        for corpus in dataset.corpora
        if (parts := [part[corpus.name] for part in by_split if corpus.name in part])
    }
    found = joined(by_corpus.values())
    values: dict[str, Any] = {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": bits_per_byte(found, splits),
        "tokens": found.num_tokens,
    }
    if config.data.mode == "padded":
        # What others publish of padded rows, once a model has learned to predict padding for certain.
        values["loss_over_padding"] = found.loss * found.num_tokens / found.num_positions
    if len(by_corpus) > 1:
        values["loss_by_corpus"] = {name: part.loss for name, part in by_corpus.items()}
    if found.routing is not None:
        values |= routing_summary(found.routing) | routing_by_layer(found.routing)
    return values


def _dataset(opened: OpenedRun, path: str | None) -> Dataset:
    """The run's own text, or the one at ``path``, which is tokenized and split as the run's was."""
    data, tokenizer, run = opened.config.data, opened.tokenizer, opened.directory
    if path is not None:
        is_ready = Path(path).is_dir() and is_dataset(Path(path))
        data = dataclasses.replace(
            data,
            path=path,
            tokenizer=None if is_ready else str(run.tokenizer),
            val_fraction=None if is_ready else data.val_fraction,
        )
    try:
        # The run may be somebody else's: nothing is fetched for what its config.json says.
        of_run = run.tokenizer if path is None else None
        found = find_or_prepare(data, cache_folder("data"), tokenizer.delimiters, of_run=of_run, or_nothing=True)
    except UserError as error:
        raise UserError(str(error).replace("data.path=", "--data ") if path is not None else str(error)) from None
    if path is None:
        check_same_text(opened.checkpoint.record, data, found)
    elif fingerprint(found.tokenizer) != fingerprint(tokenizer):
        raise UserError(
            f"{path} has tokens of another tokenizer ({found.tokenizer.name}) than {run.path} ({tokenizer.name}); "
            f"prepare it with --tokenizer {shlex.quote(str(run.tokenizer))} --delimiters {tokenizer.delimiters}"
        )
    return found
