"""A step on eight devices, however a mesh divides it, is that of one device; and what the devices exchange for it."""

import functools
import math

import jax
import numpy as np
import pytest

from moe_jax.config import Config, DataConfig, MeshConfig, ModelConfig, MoEConfig, OptimizerConfig
from moe_jax.config.rules import check
from moe_jax.estimate.collectives import collectives
from moe_jax.model.decoder import Decoder
from moe_jax.runs.checkpoint.record import Record, newest_sound
from moe_jax.runs.checkpoint.save import Checkpoints, Retention
from moe_jax.sharding.mesh import make_mesh, put_batch, use_mesh
from moe_jax.training.optimizer import make_optimizer, make_schedule
from moe_jax.training.state import abstract_state, init_state
from moe_jax.training.step import gradient, train_step
from tests.oracles.moe import on_cpu
from tests.tiny import change

VOCAB, L, BATCH = 24, 8, 16
DROPLESS = Config(
    model=ModelConfig(
        context_length=L,
        num_layers=2,
        embed_dim=16,
        num_heads=4,
        moe=MoEConfig(num_experts=4, expert_dim=8, num_shared_experts=1, dispatch="blocked"),
    ),
    data=DataConfig(batch_size=BATCH),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
)
LIMITED = change(
    DROPLESS,
    moe={"dispatch": "gather", "capacity_factor": 1.0, "router": "noisy_top_k", "first_dense": 1},
    model={"use_bias": True, "dropout_rate": 0.1, "tie_embeddings": False, "num_kv_heads": 2},
)
CONFIGS = {
    "blocked": DROPLESS,
    "biased": change(DROPLESS, moe={"router": "sigmoid_bias", "router_z_weight": 0.0}, model={"use_bias": True}),
    "ragged": change(DROPLESS, moe={"dispatch": "ragged"}),
    "pallas": change(DROPLESS, moe={"dispatch": "pallas"}),
    "by_row": change(DROPLESS, moe={"dispatch": "by_row"}),
    "gather": LIMITED,
    "einsum": change(LIMITED, moe={"dispatch": "einsum"}),
    "expert_choice": change(
        DROPLESS, moe={"router": "expert_choice", "capacity_factor": 1.0, "load_balancing_scope": "batch"}
    ),
}
MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "expert": {"data": 2, "expert": 4},
    "tensor": {"data": 4, "tensor": 2},
    "data fsdp expert": {"data": 2, "fsdp": 2, "expert": 2},
    "data fsdp tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "data expert tensor": {"data": 2, "expert": 2, "tensor": 2},
    "fsdp expert tensor": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
}


def batch():
    """Rows of which some end early, one after a single token."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, L + 1)).astype(np.int32)
    lengths = np.where(np.arange(BATCH) % 3 == 1, 1 + np.arange(BATCH) % L, L)
    mask = np.arange(L)[None, :] < lengths[:, None]
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}


def prepared(config, sizes):
    check(config)
    decoder = Decoder(on_cpu(config.model, train=True), VOCAB)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, 10))
    mesh = make_mesh(MeshConfig(**sizes), config.model, BATCH // config.optimizer.accumulation_steps)
    return decoder, optimizer, mesh


@functools.cache
def first_gradient(config, **sizes):
    """(gradients, (loss, auxiliary losses, routing)) of the first step."""
    decoder, optimizer, mesh = prepared(config, sizes)
    with use_mesh(mesh):
        state = init_state(decoder, optimizer, mesh, seed=0)
        return jax.device_get(jax.jit(functools.partial(gradient, config, decoder))(state, put_batch(batch(), mesh)))


def assert_same_gradient(config, sizes):
    got, want = first_gradient(config, **sizes), first_gradient(config, data=1)
    for (path, leaf), expected in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        distance = np.linalg.norm(leaf - expected)
        assert distance <= 1e-5 * np.linalg.norm(expected), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("blocked", "expert"),
        ("blocked", "fsdp expert tensor"),
        ("gather", "fsdp expert tensor"),
        ("gather", "data fsdp expert"),
        ("einsum", "expert"),
        ("ragged", "data fsdp tensor"),
        ("by_row", "data expert tensor"),
        ("biased", "tensor"),
        ("biased", "fsdp"),
        ("expert_choice", "data fsdp expert"),
    ],
)
def test_the_gradient_is_that_of_one_device(name, mesh):
    assert_same_gradient(CONFIGS[name], MESHES[mesh])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_on_every_mesh_with_accumulation_and_remat(name, mesh):
    config = change(CONFIGS[name], optimizer={"accumulation_steps": 2}, model={"remat": "full"})
    assert_same_gradient(config, MESHES[mesh])


def steps(config, sizes, number=5):
    """The losses of the first steps, and the state after them."""
    decoder, optimizer, mesh = prepared(config, sizes)
    with use_mesh(mesh):
        state = init_state(decoder, optimizer, mesh, seed=0)
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = jax.jit(functools.partial(train_step, config, decoder, optimizer), out_shardings=(placed, None))
        losses = []
        for _ in range(number):
            state, output = step(state, put_batch(batch(), mesh))
            losses.append(float(output.loss))
    return losses, state


@pytest.mark.parametrize(
    ("optimizer", "mesh"), [("muon", "fsdp expert tensor"), pytest.param("adamw", "expert", marks=pytest.mark.slow)]
)
def test_five_steps_are_those_of_one_device(optimizer, mesh):
    config = change(DROPLESS, optimizer={"name": optimizer})
    (got, state), (want, expected) = steps(config, MESHES[mesh]), steps(config, {"data": 1})
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert want[-1] < want[0] - 0.1
    for leaf, like in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(leaf, like, atol=2e-3)


def abstract(sizes, config=DROPLESS):
    decoder, optimizer, mesh = prepared(config, sizes)
    with use_mesh(mesh):
        return abstract_state(decoder, optimizer, mesh)


def test_a_device_holds_its_share_of_parameters_and_moments():
    def bytes_of(state, leaves):
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves(state))

    def matrices(state):
        kept = (state.params, state.optimizer_state)
        return [leaf for leaf in jax.tree.leaves(kept) if leaf.ndim >= 2 and leaf.shape[-1] not in (4,)]

    def experts(state):
        found = jax.tree_util.tree_leaves_with_path((state.params, state.optimizer_state))
        return [leaf for path, leaf in found if "'moe'" in jax.tree_util.keystr(path) and leaf.ndim == 4]

    one = abstract({"data": 1})
    assert len(experts(one)) == 9  # three matrices, and two moments of each
    vectors = {"attention_norm", "mlp_norm", "final_norm", "router"}
    for sizes in ({"data": 1, "fsdp": 8}, {"data": 4, "fsdp": 2}):
        divided = abstract(sizes)
        for path, leaf in jax.tree_util.tree_leaves_with_path((divided.params, divided.optimizer_state)):
            share = math.prod(leaf.sharding.shard_shape(leaf.shape)) * sizes["fsdp"]
            is_whole = share != leaf.size
            assert not is_whole or leaf.ndim == 0 or vectors & set(jax.tree_util.keystr(path).split("'"))
    divided = abstract({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2})
    assert bytes_of(divided, experts) * 8 == bytes_of(one, experts)
    assert bytes_of(divided, matrices) * 3 < bytes_of(one, matrices)


def exchanges(config, sizes):
    """The collectives of the first step's gradient, and the state's shapes."""
    decoder, optimizer, mesh = prepared(config, sizes)
    with use_mesh(mesh):
        state = abstract_state(decoder, optimizer, mesh)
        placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), put_batch(batch(), mesh)
        )
        text = jax.jit(functools.partial(gradient, config, decoder)).lower(state, placed).compile().as_text()
    return collectives(text, mesh)


@pytest.mark.parametrize("name", ["blocked", "gather"])
def test_the_devices_exchange_what_the_page_says(name):
    config = DROPLESS if name == "blocked" else change(DROPLESS, moe={"dispatch": name, "capacity_factor": 1.0})
    found = exchanges(config, MESHES["fsdp expert tensor"])
    num_layers = config.model.num_layers
    E, D, F, tokens = 4, config.model.embed_dim, config.model.moe.expert_dim, BATCH * L
    # The weights of a device's own experts are gathered over fsdp, a layer at a time, in each pass; over nothing else.
    weights = [each for each in found if each.shapes[0][1] in {(E // 2, D, F // 2), (E // 2, F // 2, D)}]
    assert {(each.kind, each.axes, each.times) for each in weights} == {("all-gather", ("fsdp",), num_layers)}
    assert len(weights) == 2 * 3
    outside = [each for each in found if each.kind == "all-gather" and each.times == 1]
    assert [each.shapes[0][1] for each in outside] == [(VOCAB // 2, D)], "the embedding alone, once for both its uses"
    over_experts = [each for each in found if each.axes == ("expert",) and each.kind != "all-reduce"]
    if name == "gather":  # the slots of all experts [E, G a device, C, D], there and back in each pass
        slots = E * (BATCH // 4) * (L * 2 // E) * D * 4
        assert [(each.kind, each.num_bytes) for each in over_experts] == [("all-to-all", slots * num_layers)] * 4
    else:  # in each pass tokens are gathered and results scattered, in two chunks of a device's quarter of them
        moved = [each for each in over_experts if each.shapes[0][1][-1] == D]
        assert {each.kind for each in over_experts} == {"all-gather", "reduce-scatter"}
        one_way = tokens // 4 * D * 4 * num_layers
        assert {each.num_bytes for each in moved} == {one_way, 2 * one_way}


@pytest.mark.parametrize("dispatch", ["blocked", "ragged", "gather", "pallas"])
def test_no_layer_keeps_its_gathered_weights_for_the_backward_pass(dispatch):
    capacity_factor = 1.0 if dispatch == "gather" else None
    config = change(DROPLESS, moe={"dispatch": dispatch, "capacity_factor": capacity_factor})
    config = change(config, model={"dtype": "bfloat16"})
    decoder, optimizer, mesh = prepared(config, {"data": 4, "fsdp": 2})
    with use_mesh(mesh):
        state = abstract_state(decoder, optimizer, mesh)
        program = str(jax.make_jaxpr(functools.partial(gradient, config, decoder))(state, batch()))
    assert "bf16[4,16,8]" in program, "gathered"
    # What each device keeps of its own lies one behind the other: 8 devices of 4 experts.
    assert "bf16[2,32,16,8]" not in program, "stacked over layers"


def test_a_checkpoint_of_any_mesh_goes_on_on_any_other(tmp_path):
    decoder, optimizer, mesh = prepared(DROPLESS, MESHES["fsdp expert tensor"])
    retention = Retention(newest=1, best=0)
    with use_mesh(mesh), Checkpoints(tmp_path, None, retention) as checkpoints:
        state = init_state(decoder, optimizer, mesh, seed=3)
        record = Record(step=1, val_loss=1.0, progress={}, random={}, config={}, tokenizer="0")
        checkpoints.save(record, state.checkpoint_items())
        assert checkpoints.wait()
    with Checkpoints(tmp_path, newest_sound(tmp_path), retention) as checkpoints:
        for sizes in ({"data": 1}, MESHES["data"], MESHES["data expert tensor"]):
            target = abstract(sizes).checkpoint_items()
            restored = checkpoints.restore(target)
            leaves = map(jax.tree.leaves, (restored, target, state.checkpoint_items()))
            for leaf, like, original in zip(*leaves, strict=True):
                assert leaf.sharding == like.sharding
                np.testing.assert_array_equal(leaf, original)
