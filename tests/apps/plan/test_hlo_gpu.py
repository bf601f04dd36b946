"""Costs of GPU programs, from lines that XLA's GPU compiler wrote (shortened)."""

from __future__ import annotations

import pytest

from dsvl2_jax.apps.plan.hlo_text import buffers, instructions
from dsvl2_jax.apps.plan.hlo_walk import walk

PROGRAM = """HloModule jit_f, is_scheduled=true

ENTRY %main (a: bf16[4096,2048], b: bf16[2048,8192]) -> bf16[4096,8192] {{
  %a = bf16[4096,2048]{{1,0}} parameter(0)
  %b = bf16[2048,8192]{{1,0}} parameter(1)
  %q = bf16[2,4096,16,128]{{3,2,1,0}} parameter(2)
  %v = bf16[2,4096,16,64]{{3,2,1,0}} parameter(3)
  {line}
}}
"""
GEMM = (
    "ROOT %c = (bf16[4096,8192]{1,0}, s8[33554432]{0}) custom-call(%a, %b), "
    'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"alpha_real":1,"beta":0,'
    '"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],'
    '"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"epilogue":"DEFAULT"}}'
)
TRITON = (
    "ROOT %p = bf16[4096,8192]{1,0} custom-call(%a, %b), "
    'custom_call_target="__gpu$xla.gpu.triton", api_version=API_VERSION_TYPED_FFI, '
    'backend_config={grid_x = 1 : i32, ir = "ML\\EFR\\0DMLIR(\\22\\00", name = "gmm", '
    'num_warps = 8 : i32, serialized_metadata = "{\\22flops\\22: \\22134217728\\22}"}'
)
ATTENTION = (
    "ROOT %o = (bf16[2,16,4096,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %v), "
    'custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":{"fmha_scale":0.1,'
    '"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["2","16","4096","4096"]},"mask_type":"MASK"}}'
)
PAIRS = 2 * 16 * 4096 * 4096


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        (GEMM.replace("MASK", ""), 2.0 * 4096 * 2048 * 8192),
        (TRITON, 134217728.0),
        (ATTENTION.replace('"MASK"', '"NO_MASK"'), 2.0 * PAIRS * (128 + 64)),
        (ATTENTION.replace('"MASK"', '"CAUSAL"'), 1.0 * PAIRS * (128 + 64)),
        (
            ATTENTION.replace('"MASK"', '"NO_MASK"').replace("fmhaSoftmax", "fmhaSoftmaxBackward"),
            2.0 * PAIRS * (3 * 128 + 2 * 64),
        ),
    ],
)
def test_calls_into_libraries_and_kernels_have_their_flops(line, flops):
    assert walk(PROGRAM.format(line=line)).flops == flops


def test_batches_of_a_library_product_multiply():
    line = GEMM.replace("bf16[4096,8192]{1,0}, s8", "bf16[4,8,64]{2,1,0}, s8").replace("(%a, %b)", "(%x, %y)")
    line = line.replace('_contracting_dimensions":["1"]', '_contracting_dimensions":["2"]')
    line = line.replace('_contracting_dimensions":["0"]', '_contracting_dimensions":["1"]')
    line = line.replace('_batch_dimensions":[]', '_batch_dimensions":["0"]')
    text = PROGRAM.format(line=line).replace(
        "  %q = ", "  %x = bf16[4,8,32]{2,1,0} parameter(4)\n  %y = bf16[4,32,64]{2,1,0} parameter(5)\n  %q = "
    )
    assert walk(text).flops == 2.0 * 4 * 8 * 32 * 64


def test_a_call_moves_its_operands_and_results():
    moved = walk(PROGRAM.format(line=TRITON)).bytes
    assert moved == 2 * (4096 * 2048 + 2048 * 8192 + 4096 * 8192)


FUSED = """HloModule jit_f, is_scheduled=true

%inner (p: f32[8,512]) -> f32[8] {
  %p = f32[8,512]{1,0} parameter(0)
  %wide = f32[8,512,512]{2,1,0} broadcast(%p), dimensions={0,1}
  ROOT %s = f32[8]{0} slice(%wide), slice={[0:8], [0:1], [0:1]}
}

ENTRY %main (a: f32[8,512]) -> f32[8] {
  %a = f32[8,512]{1,0} parameter(0)
  ROOT %fusion = f32[8]{0} fusion(%a), kind=kLoop, calls=%inner
}
"""


def test_what_is_made_inside_a_fusion_takes_no_memory():
    wide = (8, 512, 512)
    assert wide in [shape for _, shape, _ in instructions(FUSED)]
    assert [shape for _, shape, _ in buffers(FUSED)] == [(8, 512), (8,)]
