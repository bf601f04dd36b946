"""Launches counted in programs that are known, and in text as the GPU compiler writes it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from dsvl2_jax.apps.plan.launches import Thunks, count_launches, count_thunks

# Two turns of a loop with a fused sort, within it a branch whose dearer side sorts by a library; a captured fusion; a
# copy to the host.
TEXT = """HloModule jit_step, is_scheduled=true

%sorted (p.0: f32[8]) -> f32[8] {
  %p.0 = f32[8]{0} parameter(0)
  ROOT %sort.0 = f32[8]{0} sort(%p.0), dimensions={0}, to_apply=%less
}

%plain (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %add.1 = f32[8]{0} add(%p.1, %p.1)
}

%cheap (p.2: f32[8]) -> f32[8] {
  ROOT %p.2 = f32[8]{0} parameter(0)
}

%dear (p.3: f32[8]) -> f32[8] {
  %p.3 = f32[8]{0} parameter(0)
  ROOT %custom-call.3 = f32[8]{0} custom-call(%p.3), custom_call_target="__cub$DeviceRadixSort"
}

%body (p.4: (s32[], pred[], f32[8])) -> (s32[], pred[], f32[8]) {
  %p.4 = (s32[], pred[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p.4), index=0
  %flag = pred[] get-tuple-element(%p.4), index=1
  %x = f32[8]{0} get-tuple-element(%p.4), index=2
  %next = s32[] fusion(%i), kind=kLoop, calls=%plain, metadata={op_name="jit(step)/while/body/add"}
  %fused = f32[8]{0} fusion(%x), kind=kCustom, calls=%sorted, metadata={op_name="jit(step)/layers_1/MoE/mlp/top_k"}
  %branch = f32[8]{0} conditional(%flag, %fused, %fused), true_computation=%dear, false_computation=%cheap
  ROOT %result = (s32[], pred[], f32[8]{0}) tuple(%next, %flag, %branch)
}

%condition (p.5: (s32[], pred[], f32[8])) -> pred[] {
  %p.5 = (s32[], pred[], f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%p.5), index=0
  ROOT %compared = pred[] fusion(%j), kind=kLoop, calls=%plain
}

%command_buffer (p.6: f32[8]) -> f32[8] {
  %p.6 = f32[8]{0} parameter(0)
  ROOT %quick = f32[8]{0} fusion(%p.6), kind=kLoop, calls=%plain
}

ENTRY %main (a: (s32[], pred[], f32[8])) -> f32[8] {
  %a = (s32[], pred[], f32[8]{0}) parameter(0)
  %loop = (s32[], pred[], f32[8]{0}) while(%a), condition=%condition, body=%body%KNOWN%
  %y = f32[8]{0} get-tuple-element(%loop), index=2
  %captured = f32[8]{0} call(%y), to_apply=%command_buffer
  ROOT %copy = f32[8]{0:S(5)} copy(%captured)
}
"""


def test_loops_branches_captured_launches_and_sorts():
    found = count_launches(TEXT.replace("%KNOWN%", ', backend_config={"known_trip_count":{"n":"2"}}'))
    assert found.by_kind == {"fusion": 2 * 3 + 1, "copy": 1} and found.total == 8
    assert (found.sorts, found.captured, found.branches) == (2, 1, 2)
    assert found.host_transfers == 2 * 1 + 1  # a branch is taken twice, and the result goes to the host
    assert found.by_scope["layers_1/mlp"] == 2


def test_the_host_decides_how_long_a_loop_of_unknown_length_goes_on():
    found = count_launches(TEXT.replace("%KNOWN%", ""))
    assert found.total == 5 and found.host_transfers == 3


def test_a_compiled_program():
    text = jax.jit(lambda x: jnp.sort(x) @ x).lower(jnp.ones(64)).compile().as_text()
    assert count_launches(text).sorts == 1


def test_a_text_that_is_no_program():
    with pytest.raises(ValueError, match="no entry computation"):
        count_launches("nothing")


THUNKS = """000: kCommandBuffer      [source       | next=007 (1)]
    001: kCopy         [source | sink] kCopy
    002: kCustomKernel [source | sink] first grid: [1, 1, 1]
003: kWhile         [prev=000 (1) | sink        ]
condition:
    004: kCustomKernel [source | sink] compare grid: [1, 1, 1]
  body:
    000: kCommandBuffer [source | sink]
        005: kCustomKernel [source       | next=012 (3) ] second grid: [1, 1, 1]
    006: kConditional   [prev=000 (1) | next=000 (1)]
      false_branch:
        007: kCopy         [source       | next=043 (1)] kCopy
      true_branch:
        008: kCopy [source | sink] kCopy
009: kCopy          [source       | sink        ] kCopy
"""


def test_steps_within_command_buffers_and_beside_them():
    assert count_thunks(THUNKS) == Thunks(launches=7, captured=3, command_buffers=2, conditionals=1)
