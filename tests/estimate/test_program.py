"""What is read of a compiled program's text: products, loops, exchanges."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.estimate.collectives import Collective, collectives
from moe_jax.estimate.devices import KINDS
from moe_jax.estimate.program import operations, shapes_in, size_of
from moe_jax.estimate.step import speed_of
from moe_jax.sharding.mesh import arrange

MESH = {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_types_and_sizes():
    shapes = shapes_in("(bf16[2,3]{1,0}, s32[], /*index=2*/pred[7]{0})")
    assert shapes == (("bf16", (2, 3)), ("s32", ()), ("pred", (7,)))
    assert size_of(shapes) == 12 + 4 + 7


def test_products_count_as_often_as_the_loop_around_them_turns():
    def repeated(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0]

    text = compiled(repeated, jnp.ones((8, 16)), jnp.ones((16, 16)))
    products = [each for each in operations(text) if each.flops]
    assert sum(each.flops * each.times for each in products) == 5 * 2 * 8 * 16 * 16
    (product,) = products
    assert product.num_bytes >= 4 * (8 * 16 + 16 * 16 + 8 * 16)


def test_batched_and_transposed_products():
    text = compiled(lambda x, w: jnp.einsum("bij,bkj->bik", x, w), jnp.ones((3, 4, 5)), jnp.ones((3, 6, 5)))
    assert sum(each.flops for each in operations(text)) == 2 * 3 * 4 * 6 * 5


@pytest.mark.parametrize(
    ("divided", "result", "kind", "axes", "received"),
    [
        (("fsdp", None), (None, None), "all-gather", ("fsdp",), 16 * 16 * 4),
        ((("data", "tensor"), None), (None, None), "all-gather", ("data", "tensor"), 16 * 16 * 4),
        (("tensor", None), (None, "tensor"), "all-to-all", ("tensor",), 16 * 8 * 4),
    ],
)
def test_exchanges_have_the_mesh_axes_that_they_cross(divided, result, kind, axes, received):
    mesh = arrange(MESH, jax.devices())
    x = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*divided)))
    moved = jax.jit(lambda x: x * 2, out_shardings=NamedSharding(mesh, PartitionSpec(*result)))
    (found,) = collectives(moved.lower(x).compile().as_text(), mesh)
    assert (found.kind, found.axes, found.num_bytes) == (kind, axes, received)


def test_an_exchange_in_a_loop_counts_each_turn():
    mesh = arrange(MESH, jax.devices())

    def summed(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(jax.lax.psum(x, "tensor")), None), x, length=3)[0]

    spec = PartitionSpec("tensor")
    text = compiled(jax.shard_map(summed, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False), jnp.ones((8, 8)))
    (found,) = collectives(text, mesh)
    assert (found.kind, found.axes, found.times) == ("all-reduce", ("tensor",), 3)
    assert found.wire_bytes == 3 * 4 * 8 * 4  # two devices send half of it each way


@pytest.mark.parametrize(
    ("start", "received"),
    [
        ("((f32[8]{0}), f32[2]{0}) reduce-scatter-start", 8),
        ("(f32[2]{0}, f32[8]{0}) all-gather-start", 32),
        ("f32[8]{0} all-reduce-start", 32),
        ("((f32[8]{0}), f32[8]{0}) all-to-all-start", 32),
    ],
)
def test_what_a_gpu_starts_and_ends_later_counts_its_results_alone(start, received):
    text = f"""
ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %y = {start}(%x), replica_groups={{{{0,1}},{{2,3}},{{4,5}},{{6,7}}}}, to_apply=%add
}}
"""
    (found,) = collectives(text, arrange(MESH, jax.devices()))
    assert found.num_bytes == received


def test_a_loop_over_layers_reads_a_layer_at_each_turn():
    def layers(x, w):
        def one(x, w):
            y = jnp.tanh(x @ w)
            return y, y

        return jax.lax.scan(one, x, w)

    num_layers, stack = 8, 4 * 8 * 64 * 64
    text = compiled(layers, jnp.ones((4, 64)), jnp.ones((num_layers, 64, 64)))
    moved = sum(each.num_bytes * each.times for each in operations(text))
    assert stack <= moved < 5 * stack, "each layer's weights once, and copied at most"


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("[4,2]<=[8]", ("tensor",)),
        ("[4,2]<=[2,2,2]T(1,2,0)", ("data",)),
        ("mesh['a'=4,'b'=2] {'a'}", ("data", "fsdp")),
        ("mesh['a'=8] {'a':(2)2}", ("fsdp",)),
        ("mesh['a'=2,'b'=1,'c'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}", ("fsdp",)),
        ("mesh['a'=4,'b'=2], device_ids=(0,2,4,6,1,3,5,7) {'b'}", ("fsdp",)),
        ("{}", ("data", "fsdp", "tensor")),
    ],
)
def test_every_way_in_which_xla_writes_groups(groups, axes):
    text = f"""
ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  ROOT %y = f32[4]{{0}} all-reduce(%x), replica_groups={groups}, use_global_device_ids=true, to_apply=%add
}}
"""
    (found,) = collectives(text, arrange(MESH, jax.devices()))
    assert found.axes == axes


@pytest.mark.parametrize(
    ("kind", "axes", "speed"),
    [
        ("all-gather", ("tensor",), 450e9),  # within a host
        ("all-gather", ("data",), 50e9),  # one device a host: each has its own card alone
        ("all-gather", ("data", "tensor"), 100e9),  # two devices a host share a ring's way out, and each other's cards
        ("all-reduce", ("data", "fsdp", "tensor"), 200e9),
        ("all-to-all", ("data",), 50e9),
        ("all-to-all", ("data", "tensor"), 75e9),  # of three others two are on the other host
        ("collective-permute", ("data", "tensor"), 50e9),
    ],
)
def test_an_exchange_between_hosts_is_as_fast_as_the_cards_it_passes(kind, axes, speed):
    mesh = arrange(MESH, jax.devices())
    size = 2 ** len(axes)
    exchange = Collective(kind, axes, (("f32", (8,)),), times=1, group_size=size)
    assert speed_of(exchange, mesh, dataclasses.replace(KINDS["h100"], host=4)) == pytest.approx(speed)


def test_a_tpus_program_counts_the_turns_of_loops_and_each_exchange_once():
    """As libtpu writes it: the turns stand in the loop's condition alone, and exchanges lie in fusions."""
    groups = "replica_groups={{0,1},{2,3},{4,5},{6,7}}"
    text = f"""
%begins (p: f32[4]) -> (f32[4], f32[8], u32[]) {{
  %p = f32[4]{{0}} parameter(0)
  %g = f32[8]{{0}} all-gather(%p), {groups}, dimensions={{0}}
  ROOT %t = (f32[4]{{0}}, f32[8]{{0}}, u32[]) tuple(%p, %g)
}}

%meanwhile (p: f32[4]) -> f32[8] {{
  %p = f32[4]{{0}} parameter(0)
  ROOT %g = f32[8]{{0}} all-gather(%p), {groups}, dimensions={{0}}
}}

%all-reduce-scatter.3 (p: f32[8]) -> f32[4] {{
  %p = f32[8]{{0}} parameter(0)
  %r = f32[8]{{0}} all-reduce(%p), {groups}, to_apply=%add
  ROOT %s = f32[4]{{0}} slice(%r), slice={{[0:4]}}
}}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %p = (s32[], f32[4]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4]{{0}} get-tuple-element(%p), index=1
  %async-collective-start.1 = (f32[4]{{0}}, f32[8]{{0}}, u32[]) fusion(%x), kind=kCustom, calls=%begins
  %a = f32[8]{{0}} get-tuple-element(%async-collective-start.1), index=1
  %fusion.7 = f32[8]{{0}} fusion(%x), kind=kOutput, calls=%meanwhile
  %async-collective-done.1 = f32[8]{{0}} fusion(%a), kind=kCustom, calls=%meanwhile
  %y = f32[4]{{0}} fusion(%async-collective-done.1), kind=kCustom, calls=%all-reduce-scatter.3, metadata={{}}
  ROOT %t = (s32[], f32[4]{{0}}) tuple(%i, %y)
}}

%condition (p: (s32[], f32[4])) -> pred[] {{
  %p = (s32[], f32[4]{{0}}) parameter(0)
  %end = s32[]{{:T(128)}} constant(5)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %end), direction=LT
}}

ENTRY %main (p: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %p = (s32[], f32[4]{{0}}) parameter(0)
  ROOT %loop = (s32[], f32[4]{{0}}) while(%p), condition=%condition, body=%body, metadata={{}}
}}
"""
    found = collectives(text, arrange(MESH, jax.devices()))
    assert [(each.kind, each.axes, each.times) for each in found] == [
        ("all-gather", ("tensor",), 5),
        ("all-reduce", ("tensor",), 5),
    ]
