"""AdamW and Muon, learning-rate schedules, a decay mask and clipping by global norm."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from moe_jax.axes import Array, PyTree
from moe_jax.config import OptimizerConfig
from moe_jax.sharding.matrices import on_whole_matrices

# The matrices between hidden layers. Routers have one column an expert and the output one a token: their columns are
# rows of a table rather than directions of one map, and Muon leaves them to AdamW, as it does embeddings.
HIDDEN = dict.fromkeys(("query", "key", "value"), ("embed", "heads")) | {"out": ("heads", "embed")}
HIDDEN |= {"w_up": ("embed", "mlp"), "w_gate": ("embed", "mlp"), "w_down": ("mlp", "embed")}
# Norm scales, biases and embeddings are not multiplied with activations over a fan-in: weight decay is not for them.
MATRICES = HIDDEN.keys() | {"router", "router_noise", "output"}
_ONECYCLE_START = 1 / 25
"""First learning rate of OneCycle as a fraction of the peak, as PyTorch's OneCycleLR has it."""
_ADAMW_RMS = 0.2
"""Root mean square of AdamW's update at a learning rate of 1, which Muon's is scaled to (arXiv 2502.16982, eq. 4)."""


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Optimizer step -> learning rate: the warm-up, then the decay of ``config.schedule``, whose end then stays."""
    decay_steps = config.decay_steps or num_steps
    return SCHEDULES[config.schedule](config, decay_steps)


def _cosine(config: OptimizerConfig, decay_steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then a cosine to ``final_fraction`` of it (arXiv 1608.03983, eq. 5)."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=decay_steps,
        end_value=config.learning_rate * config.final_fraction,
    )


def _wsd(config: OptimizerConfig, decay_steps: int) -> optax.Schedule:
    """Warm-up, stable, decay (arXiv 2404.06395, section 4.1), the decay being a line over ``decay_fraction``.

    The paper decays exponentially over a tenth of the steps; lines are what later work settled on (arXiv 2405.18392).
    """
    peak = config.learning_rate
    falling = min(max(1, round(config.decay_fraction * decay_steps)), decay_steps - config.warmup_steps)
    fall = optax.linear_schedule(peak, peak * config.final_fraction, falling)
    return optax.join_schedules([_constant(config, decay_steps), fall], [decay_steps - falling])


def _onecycle(config: OptimizerConfig, decay_steps: int) -> optax.Schedule:
    """A cosine up from 1/25 of the peak, and a cosine down to ``final_fraction`` (arXiv 1708.07120).

    The paper's line up and down, and its cycle of the momentum, are left out: cosines are what the libraries that made
    it popular use, and Adam's beta1 stays.
    """
    return optax.piecewise_interpolate_schedule(
        "cosine",
        init_value=config.learning_rate * _ONECYCLE_START,
        boundaries_and_scales={config.warmup_steps: 1 / _ONECYCLE_START, decay_steps: config.final_fraction},
    )


def _constant(config: OptimizerConfig, _decay_steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, which then stays."""
    peak = optax.constant_schedule(config.learning_rate)
    if not config.warmup_steps:
        return peak
    rise = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([rise, peak], [config.warmup_steps])


SCHEDULES = {"cosine": _cosine, "wsd": _wsd, "onecycle": _onecycle, "constant": _constant}


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optax chain; one update is one optimizer step, whatever the number of microbatches."""
    clip = optax.identity() if config.clip_norm is None else _clip_by_global_norm(config.clip_norm)
    return optax.chain(clip, OPTIMIZERS[config.name](config, schedule))


def _clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """optax's, by a factor: its choice between two gradients costs a CPU a copy of all of them."""

    def clip(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        factor = most / jnp.maximum(optax.tree.norm(updates), most)
        return jax.tree.map(lambda update: (update * factor).astype(update.dtype), updates)

    return optax.stateless(clip)


def _adamw(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        mu_dtype=config.mu_dtype,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )


def _muon(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon (arXiv 2502.16982, algorithm 1) for hidden matrices, AdamW for the rest."""
    muon = contrib.scale_by_muon(
        beta=config.muon_beta, mu_dtype=config.mu_dtype, weight_dimension_numbers=_last_two_axes
    )
    matrices = optax.chain(
        _on_whole_matrices(muon),
        # An orthogonal matrix [m, n] has a root mean square of 1 / sqrt(max(m, n)).
        optax.stateless(lambda updates, _: jax.tree.map(_scale_to_adamw, updates)),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    return optax.partition({"muon": matrices, "adamw": _adamw(config, schedule)}, muon_labels)


def _on_whole_matrices(muon: optax.GradientTransformation) -> optax.GradientTransformation:
    """``muon`` where a mesh divides matrices: each is brought together on one device and taken apart again."""

    def update_whole(arrays: tuple[PyTree, PyTree], others: tuple[Array, Array]) -> tuple[PyTree, PyTree]:
        updates, mu = arrays
        updates, state = muon.update(updates, contrib.MuonState(others[0], mu, others[1]), None)
        return updates, cast(contrib.MuonState, state).mu

    def axes(path: tuple, leaf: Array) -> tuple[str, ...]:
        return *("layer", "expert")[: leaf.ndim - 2], *HIDDEN[_name(path)]

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None) -> tuple[optax.Updates, Any]:
        arrays, others = (updates, state.mu), (state.count, state.ns_coeffs)
        names = jax.tree_util.tree_map_with_path(axes, arrays)
        updates, mu = on_whole_matrices(update_whole, arrays, names, others)
        return updates, state._replace(count=optax.safe_increment(state.count), mu=mu)

    return optax.GradientTransformation(muon.init, update)


OPTIMIZERS = {"adamw": _adamw, "muon": _muon}


def _scale_to_adamw(update: Array) -> Array:
    return _ADAMW_RMS * max(update.shape[-2:]) ** 0.5 * update


def _last_two_axes(params: PyTree) -> PyTree:
    """Each matrix of a stack, one a layer and expert, is orthogonalised on its own."""
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1), params)


def muon_labels(params: PyTree) -> PyTree:
    """The name of the optimizer, muon or adamw, that trains each parameter."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if _name(path) in HIDDEN else "adamw", params)


def decay_mask(params: PyTree) -> PyTree:
    """True for every parameter that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path) in MATRICES, params)


def _name(path: tuple) -> str:
    # While being initialised, parameters are boxed with their axis names, which adds one attribute to the path.
    return next(str(part.key) for part in reversed(path) if isinstance(part, jax.tree_util.DictKey))
