"""A new run that begins with the parameters of another one, as fine-tuning does."""

import logging
from pathlib import Path

from moe_jax.config import Config
from moe_jax.config.fields import settings
from moe_jax.data.tokenizer import Tokenizer, fingerprint
from moe_jax.errors import UserError
from moe_jax.model.decoder import Variables
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.opened import open_run
from moe_jax.training.state import TrainState

log = logging.getLogger("moe_jax")

# What neither the shapes of parameters nor the function that they stand for depend on.
_FREE = frozenset(
    {"model.dropout_rate", "model.embedding_dropout", "model.init", "model.init_std", "model.dtype", "model.remat"}
    | {"model.scan_unroll", "model.moe.router_jitter", "model.moe.bias_update_rate", "model.moe.dispatch"}
    | {"model.moe.capacity_factor", "model.moe.load_balancing_weight"}
    | {"model.moe.load_balancing_scope", "model.moe.router_z_weight", "model.moe.importance_weight"}
)


def check_source(config: Config, tokenizer: Tokenizer, run: RunDirectory) -> None:
    """UserError unless the run ``config.train.init_from`` has a model of the same kind, for the same tokens."""
    source = RunDirectory(Path(config.train.init_from or ""))
    if source.path.resolve() == run.path.resolve():
        raise UserError(
            f"train.init_from must be another run than --workdir, got {source.path} for both; name another --workdir"
        )
    try:
        opened = open_run(source.path, "best")
        saved = opened.config
        items = ("params", "router_state") if saved.model.moe.router == "sigmoid_bias" else ("params",)
        opened.checkpoint.check(items)
    except UserError as error:
        raise UserError(f"train.init_from {source.path}: {error}") from None
    before = {name: value for name, _, value in settings(saved.model, "model.")}
    free = _FREE if config.model.positions == "learned" else _FREE | {"model.context_length"}
    changes = [
        f"{name} is {before[name]} there, {value} here"
        for name, _, value in settings(config.model, "model.")
        if name not in free and value != before[name]
    ]
    if changes:
        raise UserError(f"train.init_from {source.path} has another model: {'; '.join(changes)}; use its settings")
    if fingerprint(opened.tokenizer) != fingerprint(tokenizer):
        raise UserError(
            f"train.init_from {source.path} has other tokens than the text here; set data.tokenizer to "
            f"{source.tokenizer}, or prepare the text with --tokenizer {source.tokenizer}"
        )


def load_into(state: TrainState, target: TrainState, source: RunDirectory) -> TrainState:
    """``state`` with the parameters and the router state of the best checkpoint of ``source``."""
    variables = Variables.from_items(open_run(source.path, "best").restore(target.variables.to_items()))
    log.info(f"parameters are those of the best checkpoint of {source.path}")
    return state.replace(params=variables.params, expert_bias_NE=variables.expert_bias_NE)
