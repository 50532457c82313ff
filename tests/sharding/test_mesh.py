"""The mesh, and that every logical axis has a rule."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import MeshConfig, ModelConfig, MoEConfig
from moe_jax.errors import UserError
from moe_jax.model.decoder import Decoder, Tokens
from moe_jax.sharding.mesh import LOGICAL_RULES, constrain, make_mesh, with_axes
from tests.oracles.moe import on_cpu


def test_a_mesh_of_all_or_some_devices():
    assert make_mesh(MeshConfig(), 16).shape == {"data": jax.device_count()}
    assert make_mesh(MeshConfig(data=2), 16).shape == {"data": 2}


@pytest.mark.parametrize(("data", "microbatch", "words"), [(99, 99, "at most the 8 devices"), (8, 12, "multiple of")])
def test_impossible_meshes_are_refused_with_the_remedy(data, microbatch, words):
    with pytest.raises(UserError, match=words):
        make_mesh(MeshConfig(data=data), microbatch)


@pytest.mark.parametrize("make", [lambda axes: with_axes(jnp.zeros, axes), lambda axes: constrain(jnp.ones(1), axes)])
def test_a_logical_axis_without_a_rule_is_an_error(make):
    with pytest.raises(ValueError, match=r"needs a rule in LOGICAL_RULES, got \['heds'\]; add one"):
        make(("heds",))


def test_every_parameter_axis_has_a_rule():
    config = ModelConfig(
        num_layers=3,
        norm="layernorm",
        positions="learned",
        use_bias=True,
        qk_norm=True,
        tie_embeddings=False,
        moe=MoEConfig(first_dense=1, every=2, router="noisy_top_k"),
    )
    boxed = jax.eval_shape(
        lambda: Decoder(on_cpu(config), 8).init(jax.random.key(0), Tokens(jnp.zeros((1, 2), jnp.int32)))
    )
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: hasattr(leaf, "names"))
    names = {name for leaf in leaves for name in leaf.names}
    assert all(len(leaf.names) == leaf.value.ndim for leaf in leaves)
    assert names <= {name for name, _ in LOGICAL_RULES}
    assert {"layer", "expert", "vocab", "embed", "mlp", "heads", "head_dim", "position"} <= names
