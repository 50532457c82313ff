"""What an ``unstacked`` decoder takes: its variables, from those of a training decoder, and empty caches."""

import jax
import jax.numpy as jnp

from moe_jax.axes import PyTree
from moe_jax.config import ModelConfig
from moe_jax.model.attention import LayerCache
from moe_jax.model.decoder import Variables, layout

_MATRICES = frozenset({"query", "key", "value", "out", "w_up", "w_gate", "w_down", "output"})
"""Parameters that are only ever multiplied in the type of the activations."""


def unstack(variables: Variables, config: ModelConfig) -> Variables:
    """The variables of a scanned ``Decoder`` for an ``unstacked`` one: parameters ``layer_0`` to ``layer_{N-1}``."""
    params = variables.params
    names = {name for name, _, _, _ in layout(config)}
    unstacked = {name: value for name, value in params.items() if name not in names}
    for name, kinds, first, repeats in layout(config):
        for turn in range(repeats):
            for index in range(len(kinds)):
                block = jax.tree.map(lambda leaf, turn=turn: leaf[turn], params[name][f"block_{index}"])
                unstacked[f"layer_{first + turn * len(kinds) + index}"] = block
    return variables.replace(params=unstacked)


def cast_matrices(variables: Variables, config: ModelConfig) -> Variables:
    """``variables`` with the matrices in the type of the activations, in which they would be multiplied anyway.

    What is computed with in float32 stays so: the router, norms and embeddings.
    """

    def cast(path: tuple, leaf: PyTree) -> PyTree:
        return leaf.astype(config.dtype) if path[-1].key in _MATRICES else leaf

    return variables.replace(params=jax.tree_util.tree_map_with_path(cast, variables.params))


def init_caches(config: ModelConfig, batch_size: int, cache_length: int) -> tuple[LayerCache, ...]:
    """Empty caches for every layer: [B, J, M, A] in the activations' type."""
    J = config.num_kv_heads or config.num_heads
    shape = (batch_size, J, cache_length, config.embed_dim // config.num_heads)
    zeros = jnp.zeros(shape, config.dtype)
    return tuple(LayerCache(key_BJMA=zeros, value_BJMA=zeros) for _ in range(config.num_layers))
