"""Where a step went wrong: which layer's gradient, or output, was the first that is not finite."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from moe_jax.axes import Array, PyTree
from moe_jax.config import Config
from moe_jax.model.decoder import Block, Decoder, Variables, unstack
from moe_jax.sharding.mesh import replicated
from moe_jax.training.state import TrainState
from moe_jax.training.step import gradient, sequence_keys, tokens_of


def find_not_finite(config: Config, decoder: Decoder, state: TrainState, batch: dict[str, Array]) -> str:
    """Says which gradient of the step of ``state`` and ``batch`` was the first, in the order of the backward pass.

    Where the loss is not finite every gradient is lost with it, and it says which layer's output was the first.
    """
    is_finite, is_norm_finite, is_loss_finite = _whole(functools.partial(_are_finite, config, decoder))(state, batch)
    if not is_loss_finite:
        layer = _first_bad_output(config, decoder, state, batch)
        where = "the outputs of all layers were finite" if layer is None else f"the output of {layer} was the first"
        return f"the loss was not finite: {where}"
    name = first_bad_gradient(config, is_finite)
    if name is None and is_norm_finite:
        return "everything was finite when it was made again, so suspect the machine"
    if name is None:
        return "each gradient was finite, but not their norm"
    return f"the gradient of {name} was the first in the backward pass"


def _whole(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """``function`` compiled, with its small results on the host of each process."""
    mesh = jax.sharding.get_mesh()
    placed = None if mesh.empty else replicated(mesh)
    return lambda *arguments: jax.device_get(jax.jit(function, out_shardings=placed)(*arguments))


def _are_finite(config: Config, decoder: Decoder, state: TrainState, batch: dict[str, Array]) -> tuple[PyTree, ...]:
    """Of each layer's gradients, their norm, the loss."""
    gradients, (loss, _, _) = gradient(config, decoder, state, batch)
    norm = optax.tree.norm(gradients)
    return finite_by_layer(config, gradients), jnp.isfinite(norm), jnp.isfinite(loss)


def finite_by_layer(config: Config, gradients: PyTree) -> PyTree:
    """Whether each is finite: [] bool, by layer and name."""
    by_layer = unstack(Variables(gradients), config.model).params
    return jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), by_layer)


def first_bad_gradient(config: Config, by_layer: PyTree) -> str | None:
    """Of ``finite_by_layer`` the parameter nearest to the loss whose gradient is not; None where all are."""
    blocks = [f"layer_{layer}" for layer in reversed(range(config.model.num_layers))]
    last = [name for name in ("embedding", "positions") if name in by_layer]
    first = [name for name in by_layer if name not in blocks and name not in last]
    for part in (*first, *blocks, *last):
        for path, leaf in jax.tree_util.tree_leaves_with_path(by_layer[part]):
            if not leaf:
                return " ".join([part.replace("_", " "), *(str(key.key) for key in path)])
    return None


def _first_bad_output(config: Config, decoder: Decoder, state: TrainState, batch: dict[str, Array]) -> str | None:
    """The first layer of the forward pass with an output that is not finite; None where all are finite."""
    walking = decoder.clone(unstacked=True)

    def are_finite(variables: Variables, rows: dict[str, Array], keys_B: Array | None) -> dict[str, Array]:
        _, kept = walking.apply(
            {"params": unstack(variables, config.model).params},
            tokens_of(rows),
            train=True,
            expert_bias_NE=variables.expert_bias_NE,
            keys_B=keys_B,
            capture_intermediates=lambda module, _: isinstance(module, Block),
            mutable=["intermediates"],
        )
        # A block returns its output first, then what is not an activation.
        blocks = cast(dict[str, Any], kept["intermediates"])
        outputs: dict[str, Array] = {name: block["__call__"][0][0] for name, block in blocks.items()}
        return {name: jnp.all(jnp.isfinite(output)) for name, output in outputs.items()}

    keys_B = sequence_keys(config, state.step, batch["inputs"].shape[0])
    accumulation = config.optimizer.accumulation_steps
    check = _whole(are_finite)
    # In the rows of each microbatch, which fit into memory.
    found = [
        check(state.variables, *jax.tree.map(lambda leaf, n=n: leaf[n::accumulation], (batch, keys_B)))
        for n in range(accumulation)
    ]
    for layer in range(config.model.num_layers):
        if not all(part[f"layer_{layer}"] for part in found):
            return f"layer {layer}"
    return None
