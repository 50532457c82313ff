"""A new run that begins with the parameters of another one, as fine-tuning does."""

import shlex
from pathlib import Path

from moe_jax.config import Config
from moe_jax.config.fields import settings
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.tokenizer_file import fingerprint
from moe_jax.errors import UserError
from moe_jax.model.moe.routing import ROUTERS
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.opened import OpenedRun, open_run

# What neither the shapes of parameters nor the function that they stand for depend on.
_FREE = frozenset(
    {
        "model.dropout_rate",
        "model.embedding_dropout",
        "model.init",
        "model.init_std",
        "model.dtype",
        "model.remat",
        "model.attention",
    }
    | {"model.scan_unroll", "model.moe.router_jitter", "model.moe.bias_update_rate", "model.moe.dispatch"}
    | {"model.moe.bias_update", "model.moe.capacity_factor", "model.moe.load_balancing_weight"}
    | {"model.moe.load_balancing_scope", "model.moe.router_z_weight", "model.moe.importance_weight"}
)


def open_source(config: Config, tokenizer: Tokenizer, run: RunDirectory) -> OpenedRun:
    """The run ``config.train.init_from``. UserError unless it has a model of the same kind, for the same tokens."""
    path = Path(config.train.init_from or "")
    if path.resolve() == run.path.resolve():
        raise UserError(
            f"train.init_from must be another run than --workdir, got {path} for both; name another --workdir"
        )
    try:
        source = open_run(path, "best")
        # Now, and not once the run directory has been made.
        has_state = ROUTERS[source.config.model.moe.router].has_state
        source.check(("params", "router_state") if has_state else ("params",))
    except UserError as error:
        raise UserError(f"train.init_from {path}: {error}") from None
    before = {name: value for name, _, value in settings(source.config.model, "model.")}
    free = _FREE if config.model.positions == "learned" else _FREE | {"model.context_length"}
    changes = [
        f"{name} is {before[name]} there, {value} here"
        for name, _, value in settings(config.model, "model.")
        if name not in free and value != before[name]
    ]
    if changes:
        raise UserError(f"train.init_from {path} has another model: {'; '.join(changes)}; use its settings")
    if fingerprint(source.tokenizer) != fingerprint(tokenizer):
        folder = shlex.quote(str(source.directory.tokenizer))
        raise UserError(
            f"train.init_from {path} has other tokens than the text here; set data.tokenizer to {folder}, or prepare "
            f"the text with --tokenizer {folder}"
        )
    return source
