"""Operations of a program, and what a partitioned one tells of its collectives, against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas
from jax.sharding import AxisType, PartitionSpec

from nd_jax.models.attention import KERNEL_BLOCK, OrderedMask, splash_attention
from nd_jax.train import hlo
from nd_jax.train.chips import CHIPS, roofline
from nd_jax.train.collectives import collectives, device_groups
from nd_jax.train.cost import jaxpr_flops

B, D, E, LAYERS = 6, 8, 10, 5


def flops(function, *shapes, dtype=jnp.float32):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return jaxpr_flops(jax.make_jaxpr(function)(*arguments))


def layers(remat):
    """Loss of LAYERS products of [B, D] with [D, D]."""

    def body(x, kernel):
        return jnp.tanh(x @ kernel), None

    body = jax.checkpoint(body) if remat else body
    return lambda kernels, x: jnp.sum(jax.lax.scan(body, x, kernels)[0])


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (lambda x, y: x @ y, [(B, D), (D, E)], 2 * B * D * E),
        (lambda x, y: jnp.einsum("bld,bmd->blm", x, y), [(3, B, D), (3, E, D)], 2 * 3 * B * E * D),
        (layers(remat=False), [(LAYERS, D, D), (B, D)], LAYERS * 2 * B * D * D),
        # Backward: one product for the input of a layer, one for its kernel. With remat, forward again.
        (jax.grad(layers(remat=False), (0, 1)), [(LAYERS, D, D), (B, D)], 3 * LAYERS * 2 * B * D * D),
        (jax.grad(layers(remat=True), (0, 1)), [(LAYERS, D, D), (B, D)], 4 * LAYERS * 2 * B * D * D),
        (lambda x, y: jax.lax.map(lambda row: row @ y, x), [(B, 1, D), (D, E)], 2 * B * D * E),
        (lambda x, y: jax.lax.cond(x[0, 0] > 0, lambda: x @ y, lambda: x @ y @ y), [(B, D), (D, D)], 4 * B * D * D),
        (
            lambda x, y: jax.lax.conv_general_dilated(x, y, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
            [(2, 5, 7, D), (3, 3, D, E)],
            2 * (2 * 5 * 7 * E) * 9 * D,
        ),
        (
            # A transposed convolution multiplies every value of its input with the kernel once.
            lambda x, y: jax.lax.conv_transpose(x, y, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
            [(2, 5, 7, D), (2, 2, D, E)],
            2 * (2 * 5 * 7) * (4 * D * E),
        ),
    ],
)
def test_operations_by_hand(function, shapes, expected):
    assert flops(function, *shapes).total == expected


def test_operations_are_told_apart_by_dtype_and_open_loops_are_reported():
    def both(x, y):
        return x @ y, (x.astype(jnp.bfloat16) @ y.astype(jnp.bfloat16)).astype(jnp.float32)

    found = flops(both, (B, D), (D, E))
    assert dict(found.by_dtype) == {"float32": 2 * B * D * E, "bfloat16": 2 * B * D * E}
    until = lambda x, y: jax.lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ y, x)
    once = flops(until, (B, D), (D, D))
    assert (once.total, once.open_loops, found.open_loops) == (2 * B * D * D, 1, 0)


def test_the_body_of_a_shard_map_runs_on_every_device():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("data", None)
    product = jax.shard_map(lambda x, y: x @ y, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    # Split over four devices and computed twice: the two along fsdp do the same.
    assert flops(product, (8, D), (D, E)).total == 2 * (2 * 8 * D * E)


@pytest.mark.parametrize("declared", [None, 1234])
def test_a_kernel_counts_as_declared_or_body_times_grid(declared):
    def kernel(x, y, out):
        out[...] = x[...] @ y[...]

    estimate = declared and pallas.CostEstimate(flops=declared, transcendentals=0, bytes_accessed=0)
    rows = lambda block: pallas.BlockSpec(block, lambda i: (i, 0))
    call = pallas.pallas_call(
        kernel,
        grid=(4,),
        in_specs=[rows((2, D)), pallas.BlockSpec((D, E), lambda i: (0, 0))],
        out_specs=rows((2, E)),
        out_shape=jax.ShapeDtypeStruct((8, E), jnp.float32),
        cost_estimate=estimate,
        interpret=True,
    )
    assert flops(call, (8, D), (D, E)).total == (declared or 2 * 8 * D * E)


def test_a_splash_kernel_computes_every_pair_of_its_blocks():
    length, heads, width = 300, 3, 64
    mask = OrderedMask(*(np.zeros((1, length), np.int32) for _ in range(2)))
    run = lambda q, k, v: jnp.sum(splash_attention(q, k, v, mask, interpret=True))
    pairs = 2 * heads * width * (-(-length // KERNEL_BLOCK) * KERNEL_BLOCK) ** 2
    shapes = [(B, length, heads, width)] * 3
    # Logits and outputs; in one kernel logits again and the gradients of all four; and gradient times output, outside.
    assert flops(run, *shapes).total == 2 * B * pairs
    assert flops(jax.grad(run, (0, 1, 2)), *shapes).total == 7 * B * pairs + 2 * B * 512 * heads * width


# A step as the partitioner leaves it on 8 devices, data 2 x fsdp 4: three layers whose kernels are gathered, and for
# the backward pass gathered and multiplied again.
PROGRAM = """HloModule jit_step, num_partitions=8

%body (p: (s32[], bf16[6,8], bf16[3,2,8])) -> (s32[], bf16[6,8], bf16[3,2,8]) {
  %p = (s32[], bf16[6,8]{1,0}, /*index=2*/bf16[3,2,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[6,8]{1,0} get-tuple-element(%p), index=1
  %kernels = bf16[3,2,8]{2,1,0} get-tuple-element(%p), index=2
  %zero = s32[] constant(0)
  %one = s32[] constant(1)
  %slice = bf16[1,2,8]{2,1,0} dynamic-slice(%kernels, %i, %zero, %zero), dynamic_slice_sizes={1,2,8}
  %kernel = bf16[2,8]{1,0} reshape(%slice)
  %ag.1 = bf16[8,8]{1,0} all-gather(%kernel), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  %ag.2 = bf16[8,8]{1,0} all-gather(%kernel), channel_id=2, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}, \
metadata={op_name="jit(step)/checkpoint/rematted_computation/dot_general" stack_frame_id=3}
  %y = bf16[6,8]{1,0} dot(%x, %ag.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %again = bf16[6,8]{1,0} dot(%y, %ag.2), lhs_contracting_dims={1}, rhs_contracting_dims={1}, \
metadata={op_name="jit(step)/checkpoint/rematted_computation/dot_general" stack_frame_id=3}
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], bf16[6,8]{1,0}, bf16[3,2,8]{2,1,0}) tuple(%next, %again, %kernels)
}

%condition (p: (s32[], bf16[6,8], bf16[3,2,8])) -> pred[] {
  %p = (s32[], bf16[6,8]{1,0}, bf16[3,2,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(3)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (kernels: bf16[3,2,8], x: bf16[6,8]) -> f32[10] {
  %kernels = bf16[3,2,8]{2,1,0} parameter(0)
  %x = bf16[6,8]{1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[6,8]{1,0}, bf16[3,2,8]{2,1,0}) tuple(%zero, %x, %kernels)
  %loop = (s32[], bf16[6,8]{1,0}, bf16[3,2,8]{2,1,0}) while(%start), condition=%condition, body=%body
  %y = bf16[6,8]{1,0} get-tuple-element(%loop), index=1
  %kernel = bf16[6,8]{1,0} custom-call(%y, %y), custom_call_target="tpu_custom_call"
  %flat = f32[10]{0} custom-call(%kernel), custom_call_target="Sharding"
  %rs = f32[10]{0} reduce-scatter(%flat), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  ROOT %ar = f32[10]{0} all-reduce(%rs), channel_id=4, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
}
"""


def test_what_a_partitioned_program_says():
    module = hlo.parse(PROGRAM)
    assert module.open_loops == ()
    product, kernel = 2 * 6 * 8 * 8, 3 * (6 * 8 * 2)
    found = hlo.products(module)
    assert (found.flops, found.recomputed_flops) == (3 * 2 * product, 3 * product)
    assert found.bytes == 3 * 2 * 2 * (6 * 8 + 8 * 8 + 6 * 8) + kernel
    named = {c.kind: c for c in collectives(module, devices=8, slices=2)}
    gathered = named["all-gather"]
    # The second gather of the same operand is the first one.
    assert (gathered.count, gathered.devices, gathered.dtype) == (3, 4, "bf16")
    assert (gathered.bytes, gathered.traffic) == (3 * 128, 3 * 128 * 3 // 4)
    assert (named["reduce-scatter"].bytes, named["reduce-scatter"].traffic) == (40, 3 * 40)
    assert (named["all-reduce"].traffic, named["all-reduce"].devices) == (40, 2)
    # Groups along fsdp stay on a slice, those along data, the outer axis, do not.
    assert [named[k].across_slices for k in ("all-gather", "reduce-scatter", "all-reduce")] == [False, False, True]


# The body of a shard_map, called once in the forward pass and once to repeat it; attributes go over several lines.
KERNELS = """HloModule kernels

%shard (q: bf16[2,3,256,64], k: bf16[2,3,256,64]) -> bf16[2,3,256,64] {
  %q = bf16[2,3,256,64]{3,2,1,0} parameter(0)
  %k = bf16[2,3,256,64]{3,2,1,0} parameter(1)
  ROOT %call = bf16[2,3,256,64]{3,2,1,0} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256}"
}}, metadata={op_name="jit(_splash_attention)/splash_mha_NAME_segmented/pallas_call"}
}

ENTRY %main (q: bf16[2,3,256,64], k: bf16[2,3,256,64]) -> bf16[2,3,256,64] {
  %q = bf16[2,3,256,64]{3,2,1,0} parameter(0)
  %k = bf16[2,3,256,64]{3,2,1,0} parameter(1)
  %once = bf16[2,3,256,64]{3,2,1,0} call(%q, %k), to_apply=%shard, metadata={op_name="jit(f)/shard_map"}
  ROOT %again = bf16[2,3,256,64]{3,2,1,0} call(%once, %k), to_apply=%shard, \
metadata={op_name="jit(f)/checkpoint/rematted_computation/shard_map"}
}
"""


@pytest.mark.parametrize(("name", "count"), [("fwd", 2), ("dkv", 5), ("other", 0)])
def test_kernels_of_a_partitioned_program(name, count):
    found = hlo.products(hlo.parse(KERNELS.replace("NAME", name)))
    one = count * 2 * (2 * 3 * 256 * 64) * 256
    assert (found.flops, found.recomputed_flops) == (2 * one, one)
    assert found.bytes == 2 * 4 * 2 * (2 * 3 * 256 * 64)


RINGS = """HloModule rings

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

ENTRY %main (x: bf16[8,4], place: s32[]) -> (bf16[2,4], bf16[8,4]) {
  %x = bf16[8,4]{1,0} parameter(0)
  %place = s32[] parameter(1)
  %zero = s32[] constant(0)
  %ring = bf16[8,4]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}, metadata={op_name="jit(f)/up/dot_general"}
  %row = bf16[8,4]{1,0} collective-permute(%ring), source_target_pairs={{0,1},{1,2},{2,3}}, metadata={op_name="jit(f)/up/dot_general"}
  %moved = bf16[8,4]{1,0} collective-permute(%row), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}, metadata={op_name="jit(f)/concatenate"}
  %sum = bf16[8,4]{1,0} all-reduce(%moved), replica_groups=[1,4]<=[4], to_apply=%add
  %whole = bf16[8,4]{1,0} all-reduce(%x), replica_groups=[1,4]<=[4], to_apply=%add
  %mine = bf16[2,4]{1,0} dynamic-slice(%sum, %place, %zero), dynamic_slice_sizes={2,4}
  %half = bf16[4,4]{1,0} dynamic-slice(%whole, %place, %zero), dynamic_slice_sizes={4,4}
  ROOT %out = (bf16[2,4]{1,0}, bf16[4,4]{1,0}) tuple(%mine, %half)
}
"""  # noqa: E501


def test_collectives_under_another_name():
    named = {c.kind: c for c in collectives(hlo.parse(RINGS), devices=4)}
    # Of a product and closed: the parts of a kernel on their way. Neither holds for the other two.
    assert (named["windowed-einsum"].devices, named["windowed-einsum"].count) == (4, 1)
    assert (named["collective-permute"].devices, named["collective-permute"].traffic) == (2, 2 * 64)
    # Every device keeps its quarter of the first sum, and more than that of the second one.
    assert (named["reduce-scatter"].bytes, named["reduce-scatter"].traffic) == (16, 3 * 16)
    assert (named["all-reduce"].count, named["all-reduce"].traffic) == (1, 2 * 64 * 3 // 4)


def test_a_loop_without_a_constant_bound_counts_once_and_is_reported():
    module = hlo.parse(PROGRAM.replace("%n = s32[] constant(3)", "%n = s32[] get-tuple-element(%p), index=0"))
    assert module.open_loops == ("loop",)
    assert {c.kind: c.count for c in collectives(module, 8)}["all-gather"] == 1
    # An unrolled loop raises its counter twice, by one.
    unrolled = PROGRAM.replace(
        "%next = s32[] add(%i, %one)", "%half = s32[] add(%i, %one)\n  %next = s32[] add(%half, %one)"
    )
    assert {c.kind: c.count for c in collectives(hlo.parse(unrolled), 8)}["all-gather"] == 2
    from_two = PROGRAM.replace("%zero = s32[] constant(0)\n  %start", "%zero = s32[] constant(2)\n  %start")
    assert {c.kind: c.count for c in collectives(hlo.parse(from_two), 8)}["all-gather"] == 1
    known = 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
    assert hlo.products(hlo.parse(PROGRAM.replace("body=%body", known))).recomputed_flops == 7 * 2 * 6 * 8 * 8


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", [[3, 1], [2, 0]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
    ],
)
def test_every_spelling_of_groups(attributes, groups):
    instruction = hlo.Instruction(
        "x", "f32[2]", "all-reduce", (), f"), channel_id=1, {attributes}, to_apply=%add", False
    )
    assert device_groups(instruction, 4) == groups


def test_bytes_of_shapes():
    assert (
        hlo.shape_bytes("(f32[2,3]{1,0:T(8,128)}, bf16[4], pred[5], s4[3], f8e4m3fn[2], s32[])")
        == 24 + 8 + 5 + 2 + 2 + 4
    )


def test_the_roofline_is_one_bound_for_each_part_of_a_chip():
    chip = CHIPS["v5p"]
    bounds = roofline(chip, chip.flops, 2 * chip.hbm_bandwidth, 3 * chip.ici_bandwidth, 4 * chip.dcn_bandwidth)
    np.testing.assert_allclose([bounds[name] for name in ("compute", "hbm", "ici", "dcn")], [1, 2, 3, 4])
    # Of a chip that JAX sees as two devices, each has half.
    assert CHIPS["tpu7x"].flops == 2307e12 / 2
