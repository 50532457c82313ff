"""One optimizer step and one evaluation step, as pure functions."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from moe_jax.axes import Array, PyTree
from moe_jax.config import Config, MoEConfig
from moe_jax.model.decoder import Decoder, Tokens, Variables, forward
from moe_jax.model.moe.bias import updated_bias
from moe_jax.model.moe.routing import ROUTERS
from moe_jax.model.moe.statistics import (
    MoEStatistics,
    RoutingTotals,
    importance_loss,
    load_balancing_loss,
    router_z_loss,
    routing_totals,
)
from moe_jax.training.cross_entropy import cross_entropy
from moe_jax.training.state import TrainState


class StepOutput(flax.struct.PyTreeNode):
    """Sums and means over one optimizer batch."""

    loss: Array
    """Mean cross-entropy in nats a token: the language-model loss alone."""
    moe_losses: dict[str, Array]
    """Unweighted auxiliary losses, mean over the MoE layers; empty for a dense model."""
    routing: RoutingTotals | None
    grad_norm: Array
    num_targets: Array
    """Tokens that the loss is a mean over."""
    is_finite: Array
    """[] bool: whether the loss and the norm of the gradient are; otherwise the step changed nothing but ``step``."""
    exit_code: Array | None = None
    """[] int32: the largest ``own_code`` of several processes (signals.py)."""


def train_step(
    config: Config,
    decoder: Decoder,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: dict[str, Array],
    own_codes: Array | None = None,
) -> tuple[TrainState, StepOutput]:
    """One optimizer step on a batch of ``data.batches``; without a finite loss it changes ``state.step`` alone."""
    gradients, (loss, moe_losses, routing) = gradient(config, decoder, state, batch)
    grad_norm = optax.tree.norm(gradients)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.params)
    changed = state.replace(
        params=optax.apply_updates(state.params, updates),
        optimizer_state=optimizer_state,
    )
    if state.expert_bias_NE is not None:
        moe, bias_NE = config.model.moe, state.expert_bias_NE
        bias_NE = updated_bias(bias_NE, routing.load_NE, moe.bias_update_rate, routing.reach_NEQ)
        changed = changed.replace(expert_bias_NE=bias_NE)
        routing = routing.replace(reach_NEQ=None)  # the host needs none of it
    # One NaN in the parameters would be the end of the run. With a scalar, select costs a step on a CPU 3 % where
    # jnp.where, which makes an array of it, costs 9 %.
    kept = jax.tree.map(lambda new, old: jax.lax.select(is_finite, new, old), changed, state)
    exit_code = None if own_codes is None else jnp.max(own_codes)
    output = StepOutput(loss, moe_losses, routing, grad_norm, _num_targets(batch), is_finite, exit_code)
    return kept.replace(step=state.step + 1), output


def gradient(config: Config, decoder: Decoder, state: TrainState, batch: dict[str, Array]) -> tuple[PyTree, Any]:
    """The gradient of the training objective, and (loss, auxiliary losses, routing).

    The batch is computed in ``accumulation_steps`` microbatches whose gradients, each already divided by the counts of
    the whole batch, add up in float32 to the gradient of the whole batch. Random keys depend on the step and on the
    sequence's index in the global batch, so neither accumulation nor devices change dropout or noise.
    """
    batch_size, num_targets = batch["inputs"].shape[0], _num_targets(batch)

    def of_microbatch(microbatch: dict[str, Array], keys_B: Array | None) -> tuple[PyTree, Any]:
        return jax.grad(objective, has_aux=True)(
            state.params, state.expert_bias_NE, microbatch, keys_B, config, decoder, batch_size, num_targets
        )

    keys_B = sequence_keys(config, state.step, batch_size)
    return _accumulate(of_microbatch, (batch, keys_B), config.optimizer.accumulation_steps)


def objective(
    params: PyTree,
    expert_bias_NE: Array | None,
    microbatch: dict[str, Array],
    keys_B: Array | None,
    config: Config,
    decoder: Decoder,
    batch_size: int,
    num_targets: Array,
) -> tuple[Array, Any]:
    """What a microbatch adds to the objective of a batch of ``batch_size`` sequences and ``num_targets`` tokens."""
    moe = config.model.moe
    variables = Variables(params, expert_bias_NE)
    output = forward(decoder, variables, tokens_of(microbatch), train=True, keys_B=keys_B)
    loss = cross_entropy(
        output.hidden_BLD, output.output_DV, microbatch["targets"], microbatch.get("mask"), num_targets
    )
    if output.statistics is None:
        return loss, (loss, {}, None)
    losses = _moe_losses(moe, output.statistics, batch_size, num_targets, config.optimizer.accumulation_steps)
    weights = {
        "load_balancing_loss": moe.load_balancing_weight,
        "importance_loss": moe.importance_weight,
        "router_z_loss": moe.router_z_weight,
    }
    total = loss + sum(weights[name] * value for name, value in losses.items())
    return total, (loss, losses, routing_totals(output.statistics))


def _accumulate(function: Callable[..., PyTree], batch: PyTree, accumulation: int) -> PyTree:
    """The float32 sum of ``function``'s results over the batch's microbatches, computed one after the other."""
    if accumulation == 1:
        return function(*batch)
    microbatches = _split(batch, accumulation)
    shapes = jax.eval_shape(function, *jax.tree.map(lambda leaf: leaf[0], microbatches))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)

    def add(total: PyTree, microbatch: PyTree) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, function(*microbatch)), None

    return jax.lax.scan(add, zeros, microbatches)[0]


def _num_targets(batch: dict[str, Array]) -> Array:
    """[] float32: tokens of the batch that are scored."""
    count = jnp.sum(batch["mask"]) if "mask" in batch else jnp.asarray(batch["targets"].size)
    # A batch of nothing has a loss of zero, not of NaN.
    return jnp.maximum(count, 1).astype(jnp.float32)


def tokens_of(batch: dict[str, Array]) -> Tokens:
    """What the decoder reads of a batch: attention stays in its segment; what is not in the mask counts nowhere."""
    return Tokens(batch["inputs"], batch.get("mask"), batch.get("positions"), batch.get("segments"))


def _moe_losses(
    moe: MoEConfig, statistics: MoEStatistics, batch_size: int, num_tokens: Array, accumulation: int
) -> dict[str, Array]:
    scope = moe.load_balancing_scope
    num_units = batch_size if scope == "sequence" else accumulation

    def layer_losses(router):
        return {
            "load_balancing_loss": load_balancing_loss(router, scope, num_units),
            "importance_loss": importance_loss(router, scope, num_units),
            "router_z_loss": router_z_loss(router, num_tokens),
        }

    return jax.tree.map(jnp.mean, jax.vmap(layer_losses)(statistics.router))


def sequence_keys(config: Config, step: Array, batch_size: int) -> Array | None:
    """[B] random keys of the sequences of one step's batch, for dropout and router noise; None without either."""
    moe = config.model.moe
    if not (config.model.dropout_rate > 0 or (moe.num_experts > 0 and ROUTERS[moe.router].has_noise)):
        return None
    step_key = jax.random.fold_in(jax.random.key(config.train.seed), step)
    return jax.vmap(lambda index: jax.random.fold_in(step_key, index))(jnp.arange(batch_size))


def _split(batch: PyTree, accumulation: int) -> PyTree:
    """[B, ...] -> [A, B/A, ...]: microbatch a takes every A-th sequence, so that each device keeps its own rows."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, accumulation, *leaf.shape[1:]).swapaxes(0, 1), batch)


class EvalOutput(flax.struct.PyTreeNode):
    """Sums over one batch of evaluation windows."""

    loss: Array
    """Summed cross-entropy of the scored tokens, in nats."""
    num_tokens: Array
    routing: RoutingTotals | None


def eval_step(decoder: Decoder, variables: Variables, batch: dict[str, Array]) -> EvalOutput:
    """The sums over a batch with a mask, without noise, dropout or drops."""
    output = forward(decoder, variables, tokens_of(batch), train=False)
    loss = cross_entropy(output.hidden_BLD, output.output_DV, batch["targets"], batch["mask"], jnp.float32(1))
    routing = None if output.statistics is None else routing_totals(output.statistics).replace(reach_NEQ=None)
    return EvalOutput(loss, jnp.sum(batch["mask"]), routing)
