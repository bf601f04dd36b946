"""The walk over optimized programs, on programs whose cost is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from dsvl2_jax.apps.plan.hlo_text import instructions
from dsvl2_jax.apps.plan.hlo_walk import _positions, walk
from dsvl2_jax.sharding import make_mesh


def compiled(function, *shapes, **options) -> str:
    arguments = [shape if hasattr(shape, "dtype") else jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function, **options).lower(*arguments).compile().as_text()


def matmul(m: int, k: int, n: int) -> float:
    return 2.0 * m * k * n


def test_a_matrix_product_costs_its_multiplications_and_reads_each_side_once():
    cost = walk(compiled(lambda a, b: a @ b, (64, 96), (96, 32)))
    assert cost.flops == matmul(64, 96, 32)
    assert cost.bytes == 4 * (64 * 96 + 96 * 32 + 64 * 32)
    assert cost.collectives == {} and cost.unknown_loops == ()


@given(st.lists(st.integers(2, 9), min_size=4, max_size=4), st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_batched_products_and_loops_count_every_turn(sizes, turns):
    batch, m, k, n = sizes

    def function(a, b):
        def body(c, w):
            return c + jnp.einsum("bmk,bkn->bmn", a, w), None

        return jax.lax.scan(body, jnp.zeros((batch, m, n)), b)[0]

    assert walk(compiled(function, (batch, m, k), (turns, batch, k, n))).flops == turns * batch * matmul(m, k, n)


def test_loops_in_loops_multiply():
    def inner(c, w):
        return jnp.tanh(c @ w), None

    def outer(c, ws):
        return jax.lax.scan(inner, c, ws)[0], None

    cost = walk(compiled(lambda c, ws: jax.lax.scan(outer, c, ws)[0], (16, 32), (3, 5, 32, 32)))
    assert cost.flops == 15 * matmul(16, 32, 32) and cost.unknown_loops == ()


def test_a_loop_reads_of_stacked_weights_what_each_turn_takes():
    layers, width = 50, 64

    def body(c, w):
        return jnp.tanh(c @ w), None

    cost = walk(compiled(lambda c, ws: jax.lax.scan(body, c, ws)[0], (8, width), (layers, width, width)))
    weights = 4 * layers * width * width
    assert weights <= cost.bytes < 4 * weights  # a slice is copied, then read; not the whole stack every turn


def test_loops_over_data_are_counted_once_and_named():
    def function(x, limit):
        return jax.lax.while_loop(lambda c: c[1] < limit, lambda c: (c[0] @ c[0], c[1] + 1), (x, 0))[0]

    text = compiled(function, (16, 16), jax.ShapeDtypeStruct((), jnp.int32))
    cost = walk(text)
    assert cost.flops == matmul(16, 16, 16)
    (name,) = cost.unknown_loops
    assert f"%{name} = " in text
    assert walk(text, 2.5).flops == 2.5 * matmul(16, 16, 16)


def test_many_loops_one_after_the_other_take_no_longer_than_they_should():
    """Each gets what the one before it left: looking all of it up for each anew would take 2^40 steps."""
    shape, loops = "(s32[], s32[], f32[8,8]{1,0})", []
    for i in range(40):
        loops += [
            f"  %loop.{i} = {shape} while(%tuple.{i}), condition=%condition, body=%body",
            *(f"  %e{j}.{i + 1} = {kind} get-tuple-element(%loop.{i}), index={j}" for j, kind in enumerate(KINDS)),
            f"  %tuple.{i + 1} = {shape} tuple(%start, %e1.{i + 1}, %e2.{i + 1})",
        ]
    cost = walk(LOOPS.replace("LOOPS", "\n".join(loops)))
    assert cost.unknown_loops == () and cost.flops == 40 * 3 * matmul(8, 8, 8)


KINDS = ("s32[]", "s32[]", "f32[8,8]{1,0}")
LOOPS = """HloModule jit_loops, is_scheduled=true

%body (p: (s32[], s32[], f32[8,8])) -> (s32[], s32[], f32[8,8]) {
  %p = (s32[], s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], s32[], f32[8,8]{1,0}) tuple(%next, %n, %y)
}

%condition (q: (s32[], s32[], f32[8,8])) -> pred[] {
  %q = (s32[], s32[], f32[8,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %end = s32[] get-tuple-element(%q), index=1
  ROOT %less = pred[] compare(%j, %end), direction=LT
}

ENTRY %main (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %start = s32[] constant(0)
  %turns = s32[] constant(3)
  %tuple.0 = (s32[], s32[], f32[8,8]{1,0}) tuple(%start, %turns, %a)
LOOPS
  ROOT %result = f32[8,8]{1,0} get-tuple-element(%tuple.40), index=2
}
"""


def test_of_two_branches_the_dearer_one_counts():
    def function(x, w, p):
        return jax.lax.cond(p > 0, lambda: x @ w @ w, lambda: x @ w)

    text = compiled(function, (64, 64), (64, 64), jax.ShapeDtypeStruct((), jnp.int32))
    assert walk(text).flops == 2 * matmul(64, 64, 64)


@given(
    st.integers(1, 12), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(0, 3), st.integers(1, 3)
)
@settings(max_examples=60, deadline=None)
def test_convolutions_do_not_count_padding_and_holes(size, kernel, stride, low, high, dilate):
    """Against convolving ones, zero at padding and holes."""
    length = (size - 1) * dilate + 1 + low + high
    if length < kernel:
        return
    x, w = np.zeros(length, int), np.ones(kernel, int)
    x[low : low + (size - 1) * dilate + 1 : dilate] = 1
    expected = np.convolve(x, w, "valid")[::stride]
    found = _positions(len(expected), kernel, size, str(stride), f"{low}_{high}", str(dilate), "1")
    assert found == expected.sum()


def test_patch_embedding_costs_what_the_matrix_product_does():
    def function(x, w):
        return jax.lax.conv_general_dilated(x, w, (14, 14), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    cost = walk(compiled(function, (2, 126, 126, 3), (14, 14, 3, 32)))
    assert cost.flops == matmul(2 * 81, 14 * 14 * 3, 32)


# What the TPU compiler makes of a batched product: the batches are dilated spatial dimensions.
TPU_PROGRAM = """HloModule jit_bmm, is_scheduled=true

%fused_computation (param_0: bf16[4,128,8,64], param_1: bf16[4,256,8,64]) -> bf16[4,8,128,256] {
  %param_0 = bf16[4,128,8,64]{3,1,2,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[4,256,8,64]{3,1,2,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution-base-dilated.1 = bf16[4,8,128,256]{3,2,1,0:T(8,128)(2,1)} convolution(%param_0, %param_1), \
window={size=4x8 stride=3x7 lhs_dilate=4x8}, dim_labels=0b1f_0o1i->01bf
}

ENTRY %main (q.1: bf16[4,128,8,64], k.1: bf16[4,256,8,64]) -> bf16[4,8,128,256] {
  %q.1 = bf16[4,128,8,64]{3,1,2,0:T(8,128)(2,1)} parameter(0)
  %k.1 = bf16[4,256,8,64]{3,1,2,0:T(8,128)(2,1)} parameter(1)
  %copy-start = (bf16[4,256,8,64]{3,1,2,0:T(8,128)(2,1)S(1)}, bf16[4,256,8,64]{3,1,2,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
copy-start(%k.1)
  %copy-done = bf16[4,256,8,64]{3,1,2,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  ROOT %fusion = bf16[4,8,128,256]{3,2,1,0:T(8,128)(2,1)} fusion(%q.1, /*index=1*/%copy-done), kind=kOutput, \
calls=%fused_computation, backend_config={"flag_configs":[],"window_config":{"estimated_cycles":"19"}}
}
"""


def test_tpu_programs_products_are_convolutions_and_fast_memory_is_free():
    cost = walk(TPU_PROGRAM)
    assert cost.flops == 4 * 8 * matmul(128, 64, 256)
    q, k, out = 2 * 4 * 128 * 8 * 64, 2 * 4 * 256 * 8 * 64, 2 * 4 * 8 * 128 * 256
    assert cost.bytes == q + k + out  # k is copied into fast memory once, and read there


# A weight that a fusion inside a fusion only gives another shape; a slice on its way to fast memory; a kernel whose
# second operand is there already and whose attributes take three lines; and a collective that two fusions work on.
PREFETCHED = """HloModule jit_step, is_scheduled=true

%bitcast_fusion (p: bf16[64,32]) -> bf16[2,32,32] {
  %p = bf16[64,32]{1,0} parameter(0)
  ROOT %bitcast.1 = bf16[2,32,32]{2,1,0} bitcast(%p)
}

%fused (p.1: bf16[64,32], p.2: bf16[8,64]) -> bf16[8,32] {
  %p.1 = bf16[64,32]{1,0} parameter(0)
  %p.2 = bf16[8,64]{1,0} parameter(1)
  %fusion.1 = bf16[2,32,32]{2,1,0} fusion(%p.1), kind=kLoop, calls=%bitcast_fusion
  %bitcast.2 = bf16[64,32]{1,0} bitcast(%fusion.1)
  ROOT %dot.1 = bf16[8,32]{1,0} dot(%p.2, %bitcast.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%gather.1 (p.3: bf16[16,8]) -> bf16[64,8] {
  %p.3 = bf16[16,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[64,8]{1,0} all-gather(%p.3), channel_id=7, dimensions={0}
}

%gather.2 (p.4: bf16[16,8]) -> bf16[64,8] {
  %p.4 = bf16[16,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[64,8]{1,0} all-gather(%p.4), channel_id=7, dimensions={0}
}

ENTRY %main (w: bf16[64,32], x: bf16[8,64], part: bf16[16,8], table: bf16[64,8]) -> bf16[8,32] {
  %w = bf16[64,32]{1,0} parameter(0)
  %x = bf16[8,64]{1,0} parameter(1)
  %part = bf16[16,8]{1,0} parameter(2)
  %table = bf16[64,8]{1,0} parameter(3)
  %slice-start = (bf16[64,8]{1,0}, bf16[16,8]{1,0:S(1)}, u32[]{:S(2)}) slice-start(%table), slice={[0:16], [0:8]}
  %slice-done = bf16[16,8]{1,0:S(1)} slice-done(%slice-start)
  %begun = bf16[64,8]{1,0:S(1)} fusion(%part), kind=kCustom, calls=%gather.1
  %ended = bf16[64,8]{1,0:S(1)} fusion(%part), kind=kCustom, calls=%gather.2
  %kernel = bf16[8,8] custom-call(%x, %slice-done), custom_call_target="tpu_custom_call", frontend_attributes={k={
"blocks":"8"
}}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000","bytes_accessed":"2000"}}}
  ROOT %result = bf16[8,32]{1,0} fusion(%w, %x), kind=kOutput, calls=%fused
}
"""


def test_what_is_prefetched_or_only_reshaped_counts_once():
    cost = walk(PREFETCHED)
    assert cost.flops == matmul(8, 64, 32) + 1000
    fetched, part = 2 * 16 * 8, 2 * 16 * 8  # the slice; the part that is gathered, which the first fusion reads
    kernel = 2000 - 2 * 16 * 8  # without the operand in fast memory
    product = 2 * (64 * 32 + 8 * 64 + 8 * 32)
    assert cost.bytes == fetched + part + kernel + product
    gathered = cost.collectives["all-gather"]
    assert (gathered.count, gathered.bytes) == (1, 2 * 64 * 8)


SCATTERED = """HloModule jit_write, is_scheduled=true

%set (old: s8[], new: s8[]) -> s8[] {
  %old = s8[] parameter(0)
  ROOT %new = s8[] parameter(1)
}

%write (cache: s8[16,4096,128], at: s32[16,2], entries: f32[16,1,1,128]) -> s8[16,4096,128] {
  %cache = s8[16,4096,128]{2,1,0} parameter(0)
  %at = s32[16,2]{1,0} parameter(1)
  %entries = f32[16,1,1,128]{3,2,1,0} parameter(2)
  %rounded = s8[16,1,1,128]{3,2,1,0} convert(%entries)
  ROOT %scatter = s8[16,4096,128]{2,1,0} scatter(%cache, %at, %rounded), to_apply=%set
}

ENTRY %main (whole: s8[16,4096,128], where: s32[16,2], new: f32[16,1,1,128]) -> s8[16,4096,128] {
  %whole = s8[16,4096,128]{2,1,0} parameter(0)
  %where = s32[16,2]{1,0} parameter(1)
  %new = f32[16,1,1,128]{3,2,1,0} parameter(2)
  ROOT %written = s8[16,4096,128]{2,1,0} fusion(%whole, %where, %new), kind=kInput, calls=%write
}
"""


def test_a_fused_scatter_touches_what_it_changes():
    changed, read = 16 * 128, 4 * 16 * 128 + 4 * 16 * 2
    assert walk(SCATTERED).bytes == 2 * changed + read


# A gathering that begins, goes on beside a product in whose fusion its buffers are, and ends.
CARRIED = """HloModule jit_step, is_scheduled=true

%begin (p: bf16[16,8]) -> (bf16[16,8], bf16[64,8], u32[]) {
  %p = bf16[16,8]{1,0} parameter(0)
  %all-gather.1 = bf16[64,8]{1,0} all-gather(%p), channel_id=7, dimensions={0}
  ROOT %started = (bf16[16,8]{1,0}, bf16[64,8]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p.1: bf16[16,8], p.2: bf16[64,8], p.3: bf16[8,64], p.4: bf16[64,32]) -> (bf16[8,32], bf16[16,8], bf16[64,8], bf16[64,8]) {
  %p.1 = bf16[16,8]{1,0} parameter(0)
  %p.2 = bf16[64,8]{1,0} parameter(1)
  %p.3 = bf16[8,64]{1,0} parameter(2)
  %p.4 = bf16[64,32]{1,0} parameter(3)
  %dot.1 = bf16[8,32]{1,0} dot(%p.3, %p.4), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %all-gather.2 = bf16[64,8]{1,0} all-gather(%p.1), channel_id=7, dimensions={0}
  ROOT %both = (bf16[8,32]{1,0}, bf16[16,8]{1,0}, bf16[64,8]{1,0}, bf16[64,8]{1,0}) tuple(%dot.1, %p.1, %p.2, %all-gather.2)
}

%end (p.5: bf16[16,8], p.6: bf16[64,8]) -> bf16[64,8] {
  %p.5 = bf16[16,8]{1,0} parameter(0)
  %p.6 = bf16[64,8]{1,0} parameter(1)
  %all-gather.3 = bf16[64,8]{1,0} all-gather(%p.5), channel_id=7, dimensions={0}
  ROOT %ended = bf16[64,8]{1,0} custom-call(%p.5, %p.6, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (part: bf16[16,8], x: bf16[8,64], w: bf16[64,32]) -> (bf16[8,32], bf16[64,8]) {
  %part = bf16[16,8]{1,0} parameter(0)
  %x = bf16[8,64]{1,0} parameter(1)
  %w = bf16[64,32]{1,0} parameter(2)
  %start = (bf16[16,8]{1,0}, bf16[64,8]{1,0}, u32[]{:S(2)}) fusion(%part), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%begin
  %own = bf16[16,8]{1,0} get-tuple-element(%start), index=0
  %all = bf16[64,8]{1,0} get-tuple-element(%start), index=1
  %product = (bf16[8,32]{1,0}, bf16[16,8]{1,0}, bf16[64,8]{1,0}, bf16[64,8]{1,0}) fusion(%own, %all, %x, %w), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (1, {})}, calls=%beside
  %out = bf16[8,32]{1,0} get-tuple-element(%product), index=0
  %carried = bf16[16,8]{1,0} get-tuple-element(%product), index=1
  %filled = bf16[64,8]{1,0} get-tuple-element(%product), index=2
  %done = bf16[64,8]{1,0} fusion(%carried, %filled), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%end
  ROOT %result = (bf16[8,32]{1,0}, bf16[64,8]{1,0}) tuple(%out, %done)
}
"""  # noqa: E501


def test_a_collective_beside_other_work_moves_its_bytes_once():
    cost = walk(CARRIED)
    assert cost.bytes == 2 * (16 * 8 + 64 * 8) + 2 * (8 * 64 + 64 * 32 + 8 * 32)
    assert cost.collectives["all-gather"].count == 1


def test_collectives_are_counted_by_kind_with_their_bytes():
    mesh = make_mesh(data=8)

    def sharded(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    split = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharded(None, "data"))
    rows = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=sharded("data", None))
    text = compiled(lambda a, b: a @ b, split, rows, out_shardings=sharded())
    cost = walk(text)
    assert cost.flops == matmul(64, 4, 16)  # of one device
    (kind,) = cost.collectives
    assert (kind, cost.collectives[kind].count, cost.collectives[kind].bytes) == ("all-reduce", 1, 4 * 64 * 16)

    whole = compiled(lambda a: a * 2, split, out_shardings=sharded())
    gathered = walk(whole).collectives["all-gather"]
    assert (gathered.count, gathered.bytes) == (1, 4 * 64 * 32)


def test_collectives_in_loops_count_every_turn():
    mesh = make_mesh(data=8)
    rows = jax.ShapeDtypeStruct(
        (7, 16, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, None, "data"))
    )
    x = jax.ShapeDtypeStruct((4, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "data")))

    def function(x, ws):
        def body(total, w):
            return total + jnp.tanh(x @ w.T), None

        return jax.lax.scan(body, jnp.zeros((4, 16)), ws)[0]

    found = walk(compiled(function, x, rows)).collectives["all-reduce"]
    assert (found.count, found.bytes) == (7, 7 * 4 * 4 * 16)


def test_sums_and_multiples_of_costs():
    mesh = make_mesh(data=8)
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    cost = walk(compiled(lambda a: a @ a, x))
    twice = cost + cost
    assert twice == cost * 2
    assert twice.flops == 2 * cost.flops and twice.bytes == 2 * cost.bytes


def test_instructions_list_what_a_program_makes():
    made = list(instructions(compiled(lambda a, b: a @ b, (64, 96), (96, 32))))
    assert ("dot", (64, 32), "f32") in made or any(shape == (64, 32) for _, shape, _ in made)


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        walk("HloModule nothing")


def test_a_loop_that_data_end_runs_as_often_as_is_said_of_its_scope():
    @jax.jit
    def function(x, count):
        with jax.named_scope("spans"):
            return jax.lax.fori_loop(0, count, lambda i, x: x @ x, x)

    text = (
        function.lower(jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32))
        .compile()
        .as_text()
    )
    once, often = walk(text), walk(text, named={"spans": 5.0})
    assert once.flops == 2 * 64**3 and often.flops == 5 * once.flops
    assert once.unknown_loops and not often.unknown_loops
