"""The training state: a pytree of everything that a step changes."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from moe_jax.axes import Array, PyTree
from moe_jax.errors import UserError
from moe_jax.model.decoder import Decoder, Tokens, Variables, initial_expert_bias
from moe_jax.sharding.mesh import shardings


class TrainState(flax.struct.PyTreeNode):
    step: Array
    """[] int32: optimizer steps done."""
    params: PyTree
    expert_bias_NE: Array | None
    """The router state (``Variables.expert_bias_NE``)."""
    optimizer_state: PyTree

    @property
    def variables(self) -> Variables:
        return Variables(self.params, self.expert_bias_NE)

    def checkpoint_items(self) -> dict[str, PyTree]:
        """What a checkpoint holds of it beside the step, by item; ``from_items`` is the inverse."""
        return self.variables.to_items() | {"optimizer_state": self.optimizer_state}

    @staticmethod
    def from_items(step: Array, items: dict[str, PyTree]) -> "TrainState":
        variables = Variables.from_items(items)
        return TrainState(step, variables.params, variables.expert_bias_NE, items["optimizer_state"])


def abstract_state(decoder: Decoder, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state's shapes, types and shardings, without any array."""
    boxed = jax.eval_shape(lambda: _boxed_state(decoder, optimizer, jax.random.key(0)))
    shapes = jax.eval_shape(lambda: nn.unbox(_boxed_state(decoder, optimizer, jax.random.key(0))))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(boxed, mesh),
    )


def init_state(decoder: Decoder, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """A new state, computed straight onto the mesh: no device ever holds more than its share."""
    target = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(decoder, optimizer, mesh))
    initialise = jax.jit(lambda key: nn.unbox(_boxed_state(decoder, optimizer, key)), out_shardings=target)
    return initialise(jax.random.key(seed))


def random_record(seed: int) -> dict[str, Any]:
    """The key that all keys of a run are made from, as JSON, and what is drawn with it in this process."""
    key = jax.random.key(seed)
    return {
        "key": jax.random.key_data(key).tolist(),
        "generator": str(jax.random.key_impl(key)),
        "draws": jax.random.bits(key, (4,)).tolist(),
    }


def check_random(saved: dict[str, Any], seed: int) -> None:
    """UserError where the random numbers of this process are not those of the run."""
    now = random_record(seed)
    changes = [f"{name} was {saved.get(name)}, now {value}" for name, value in now.items() if saved.get(name) != value]
    if changes:
        raise UserError(
            "a run cannot go on with other random numbers: "
            + "; ".join(changes)
            + "; unset JAX_DEFAULT_PRNG_IMPL and JAX_THREEFRY_PARTITIONABLE, or set them as at the first start"
        )


def _boxed_state(decoder: Decoder, optimizer: optax.GradientTransformation, key: Array) -> TrainState:
    # Shapes do not depend on the batch, so one short sequence creates every parameter.
    params = decoder.init(key, Tokens(jnp.zeros((1, 2), jnp.int32)))["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        expert_bias_NE=initial_expert_bias(decoder.config),
        optimizer_state=optimizer.init(params),
    )
