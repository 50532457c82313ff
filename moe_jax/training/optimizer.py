"""AdamW with warm-up, cosine decay, a decay mask and clipping by global norm."""

import jax
import optax

from moe_jax.axes import PyTree
from moe_jax.config import OptimizerConfig

# Weight decay is for matrices. Norm scales, biases and embeddings are not multiplied with activations over a fan-in.
_DECAYED = frozenset({"query", "key", "value", "out", "router", "router_noise", "w_up", "w_gate", "w_down", "output"})


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then a cosine to ``final_fraction`` of it, which then stays."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.decay_steps or num_steps,
        end_value=config.learning_rate * config.final_fraction,
    )


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optax chain; one update is one optimizer step, whatever the number of microbatches."""
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    adamw = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    return optax.chain(clip, adamw)


def decay_mask(params: PyTree) -> PyTree:
    """True for every parameter that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path) in _DECAYED, params)


def _name(path: tuple) -> str:
    # While being initialised, parameters are boxed with their axis names, which adds one attribute to the path.
    return next(str(part.key) for part in reversed(path) if isinstance(part, jax.tree_util.DictKey))
