"""The mesh, and that every logical axis has a rule."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import Config, MeshConfig, ModelConfig, MoEConfig
from moe_jax.config.rules import check
from moe_jax.errors import UserError
from moe_jax.model.decoder import Decoder, Tokens
from moe_jax.sharding.mesh import LOGICAL_RULES, arrange, constrain, make_mesh, with_axes
from moe_jax.training.optimizer import HIDDEN
from tests.oracles.moe import on_cpu

MODEL = ModelConfig(embed_dim=16, num_heads=4, num_kv_heads=2, moe=MoEConfig(num_experts=4))


def test_a_mesh_of_all_or_some_devices():
    assert make_mesh(MeshConfig(), MODEL, 16).shape == {"data": 8, "fsdp": 1, "expert": 1, "tensor": 1}
    assert make_mesh(MeshConfig(data=2), MODEL, 16).shape == {"data": 2, "fsdp": 1, "expert": 1, "tensor": 1}
    assert make_mesh(MeshConfig(fsdp=4, tensor=2), MODEL, 16).shape == {"data": 1, "fsdp": 4, "expert": 1, "tensor": 2}
    assert make_mesh(MeshConfig(2, -1, 2), MODEL, 16).shape == {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1}


def test_neighbours_in_the_mesh_are_neighbours_in_the_machine():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), MODEL, 16)
    assert [device.id for device in mesh.devices.flat] == list(range(8))


@dataclass(frozen=True)
class Chip:
    """A device of one of several slices, as jax describes it."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5e"
    process_index: int = 0
    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, int, int]:
        return self.id % 2, self.id // 2 % 2, 0


def test_slices_of_tpus_divide_the_outermost_axis():
    chips = [Chip(index, slice_index=index // 4) for index in range(8)]
    with pytest.raises(UserError, match=r"mesh.data must be a multiple of the 2 slices here, got 1"):
        arrange({"data": 1, "fsdp": 8, "expert": 1, "tensor": 1}, chips)
    mesh = arrange({"data": 2, "fsdp": 4, "expert": 1, "tensor": 1}, chips)
    assert [{chip.slice_index for chip in part.flat} for part in mesh.devices] == [{0}, {1}]
    gpus = [Chip(index, slice_index=index // 4, platform="gpu", device_kind="H100") for index in range(8)]
    assert arrange({"data": 1, "fsdp": 8, "expert": 1, "tensor": 1}, gpus).size == 8, "hosts of GPUs are no slices"


@pytest.mark.parametrize(
    ("sizes", "microbatch", "words"),
    [
        ({"data": 99}, 99, r"at most the 8 devices here, got mesh.data=99; lower one of them"),
        ({"data": 4, "fsdp": 4}, 16, r"got mesh.data=4 \* mesh.fsdp=4 = 16"),
        ({"expert": 3}, 12, r"with mesh.data = -1 the other sizes must divide the 8 devices here, got mesh.expert=3"),
        ({"data": 4, "fsdp": 2}, 12, r"a multiple of the 8 devices .*\(mesh.data=4 \* mesh.fsdp=2 = 8\), got 12"),
        ({"data": 1, "expert": 8}, 16, r"mesh.expert must divide model.moe.num_experts=4, got 8; change one of them"),
        ({"data": 1, "tensor": 4}, 16, r"mesh.tensor must divide model.num_kv_heads=2, got 4"),
        ({"data": 1, "fsdp": 5}, 15, r"mesh.fsdp must divide model.embed_dim=16, got 5"),
    ],
)
def test_impossible_meshes_are_refused_with_the_remedy(sizes, microbatch, words):
    with pytest.raises(UserError, match=words):
        make_mesh(MeshConfig(**sizes), MODEL, microbatch)


def test_a_dense_model_has_no_experts_to_divide():
    dense = ModelConfig(embed_dim=16, moe=MoEConfig(num_experts=0))
    with pytest.raises(UserError, match=r"mesh.expert must be 1 for a model without experts, got 2; set it to 1"):
        make_mesh(MeshConfig(expert=2), dense, 16)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"fsdp": 0}, r"mesh.fsdp must be -1 \(all devices that are left\) or at least 1, got 0"),
        ({"data": -1, "expert": -1}, r"only one size of the mesh may be -1, got mesh.data and mesh.expert"),
    ],
)
def test_sizes_that_say_nothing_are_refused(sizes, words):
    with pytest.raises(UserError, match=words):
        check(Config(mesh=MeshConfig(**sizes)))


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
    assert names <= set(LOGICAL_RULES)
    assert names == set(LOGICAL_RULES) - {"batch"}


def test_muon_divides_matrices_as_the_model_names_them():
    boxed = jax.eval_shape(
        lambda: Decoder(on_cpu(ModelConfig()), 8).init(jax.random.key(0), Tokens(jnp.zeros((1, 2), jnp.int32)))
    )
    found = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda leaf: hasattr(leaf, "names"))
    named = {path[-1].key: leaf.names[-2:] for path, leaf in found if path[-1].key in HIDDEN}
    assert named == HIDDEN
