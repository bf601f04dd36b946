"""What `dsvl2 bench tune` measures: operations at the released models' shapes, and the block sizes to try for each.

Tested in tests/apps/bench/test_tune.py.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsvl2_jax.kernels import gpu_attention, gpu_grouped_matmul
from dsvl2_jax.kernels.block_sizes import (
    CORE_ROWS,
    HOPPER_STEP,
    Blocks,
    HopperAttention,
    HopperProduct,
    TritonAttention,
    TritonProduct,
)
from dsvl2_jax.kernels.fused_attention import visible_ranges
from dsvl2_jax.kernels.grouped_matmul import _blocked, _blocked_tgmm
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.released import released_config

LENGTHS = 1024, 4096  # tokens of a prompt; the longer one is a training sequence too
TILES = 10  # of an encoder's call
WARPS = 4, 8
# Each a compilation: few enough for all three sizes to be measured in some minutes.
TRITON_TILES = tuple(itertools.product((64, 128), (128, 256)))  # rows, columns
TRITON_BLOCKS = (32, 64), (64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128)  # queries, keys
CHECKED_HEADS = 2  # of an attention, whose scores the reference holds


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
      operation: of `dsvl2_jax.kernels.block_sizes.KERNELS`.
      shape: as `dsvl2_jax.kernels.tuning.chosen` is asked for it.
      flops: of one call.
    """

    operation: str
    shape: Mapping[str, int]
    flops: float

    @property
    def name(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in self.shape.items())
        return f"{self.operation} ({sizes})"


def released_cases(size: str) -> list[Case]:
    """Of a released model: its experts and attention in prefill and training, and the encoder's attention."""
    config = Config.from_dict(released_config(size))
    language, vision = config.language, config.vision
    key, value = language.head_dim, language.head_dim
    if language.use_mla:
        key, value = language.qk_nope_head_dim + language.qk_rope_head_dim, language.v_head_dim
    cases = []
    for length in LENGTHS:
        rows = length * language.num_experts_per_tok
        into = language.hidden_size, language.moe_intermediate_size
        for inner, width in (into, into[::-1]):
            for operation in ("gmm", "gmm_transposed", "tgmm") if length == LENGTHS[-1] else ("gmm",):
                cases.append(product_case(operation, language.n_routed_experts, inner, width, rows))
        parts = ("forward", "dq", "dkv") if length == LENGTHS[-1] else ("forward",)
        cases += [attention_case(part, key, value, length, language.num_attention_heads, causal=True) for part in parts]
    width, heads = vision.head_dim, TILES * vision.heads
    cases += [attention_case(p, width, width, vision.patches, heads, causal=False) for p in ("forward", "dq", "dkv")]
    return cases


def product_case(operation: str, groups: int, inner: int, width: int, rows: int) -> Case:
    """``inner``, ``width``: of the matrices as they lie, whatever is multiplied."""
    shape = {"groups": groups, "inner": inner, "width": width, "rows": rows}
    return Case(operation, shape, 2.0 * rows * inner * width)


def attention_case(part: str, key: int, value: int, length: int, heads: int, *, causal: bool) -> Case:
    """``part``: forward, dq or dkv. ``heads``: of all rows together."""
    shape = {"key_width": key, "value_width": value, "causal": int(causal), "length": length, "heads": heads}
    pairs = heads * (length * (length + 1) / 2 if causal else length**2)
    widths = {"forward": (1, 1), "dq": (2, 1), "dkv": (2, 2)}[part]
    return Case(f"attention_{part}", shape, 2.0 * pairs * (widths[0] * key + widths[1] * value))


def candidates(case: Case, capability: str, shared_memory: int) -> Iterator[Blocks]:
    """Block sizes to try, the default first.

    Args:
      capability: of the GPU; the kernels for Hopper need 9.x.
      shared_memory: bytes that a block may have.
    """
    shape, hopper = case.shape, capability.startswith("9.")
    yield default_blocks(case)
    if case.operation.startswith("attention"):
        part = case.operation.removeprefix("attention_")
        widths = shape["key_width"], shape["value_width"]
        for (queries, keys), warps, stages in itertools.product(TRITON_BLOCKS, WARPS, (2, 3)):
            blocks = TritonAttention(queries, keys, warps, stages)
            if blocks.shared_memory(part, *widths) <= shared_memory and queries * keys <= 64 * 16 * 4 * warps:
                yield blocks
        if hopper and case.operation == "attention_forward":
            for keys, stages in itertools.product((64, 128), (2, 3)):
                blocks = HopperAttention(keys, stages)
                if blocks.shared_memory(*widths) <= shared_memory:
                    yield blocks
        return
    for (rows, columns), warps, stages in itertools.product(TRITON_TILES, WARPS, (3, 4)):
        blocks = TritonProduct(rows, columns, warps=warps, stages=stages)
        if blocks.shared_memory() <= shared_memory and rows * columns <= 64 * 64 * warps:  # sums in registers
            yield blocks
    if hopper and shape["inner"] % HOPPER_STEP == shape["width"] % HOPPER_STEP == shape["rows"] % CORE_ROWS == 0:
        for warpgroups, columns, stages in itertools.product((1, 2), (128, 256), (3, 4)):
            blocks = HopperProduct(warpgroups, columns, stages)
            if blocks.shared_memory() <= shared_memory:
                yield blocks


def default_blocks(case: Case) -> Blocks:
    """What runs without a table."""
    if case.operation.startswith("attention"):
        return gpu_attention.FORWARD if case.operation == "attention_forward" else gpu_attention.BACKWARD
    return gpu_grouped_matmul.default_blocks(case.operation, case.shape["rows"], case.shape["groups"])


@dataclasses.dataclass(frozen=True)
class Work:
    """A case with its arrays.

    Attributes:
      arrays: of the call; the first is of whole numbers.
      run: (blocks) → function of the arrays.
      expected: f32, the parts of the result that are compared.
      compared: the same parts of a result.
    """

    arrays: tuple[jax.Array, ...]
    run: Callable[[Blocks], Callable[..., Any]]
    expected: tuple[jax.Array, ...]
    compared: Callable[[Any], tuple[jax.Array, ...]]


def prepare(case: Case, *, interpret: bool = False) -> Work:
    """Draws a case's arrays, and computes in float32 what must come out.

    Args:
      interpret: run the Triton kernels on the CPU, for tests.
    """
    return (_attention_work if case.operation.startswith("attention") else _product_work)(case, interpret)


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _float32(*arrays: jax.Array) -> list[jax.Array]:
    return [array.astype(jnp.float32) for array in arrays]


def _product_work(case: Case, interpret: bool) -> Work:
    groups, inner, width, rows = (case.shape[name] for name in ("groups", "inner", "width", "rows"))
    # As a router would: none of the experts has as many rows as another.
    sizes = jnp.asarray(np.random.default_rng(0).multinomial(rows, np.full(groups, 1 / groups)), jnp.int32)
    weights = _normal(0, groups, inner, width)
    transposed = case.operation == "gmm_transposed"
    x = _normal(1, rows, width if transposed else inner)
    if case.operation == "tgmm":
        arrays, reference = (sizes, x, _normal(2, rows, width)), _blocked_tgmm
    else:
        arrays, reference = (sizes, x, weights), _blocked

    def run(blocks: Blocks) -> Callable[..., Any]:
        kernels, options = gpu_grouped_matmul, {"interpret": True} if interpret else {}
        if isinstance(blocks, HopperProduct):
            from dsvl2_jax.kernels import hopper_grouped_matmul as kernels
        if case.operation == "tgmm":
            return lambda sizes, x, dout: kernels.tgmm(x, dout, sizes, blocks=blocks, **options)
        return lambda sizes, x, w: kernels.gmm(x, w, sizes, blocks=blocks, transposed=transposed, **options)

    second = arrays[2].swapaxes(1, 2) if transposed else arrays[2]
    expected = jax.jit(reference)(*_float32(x, second), sizes)
    return Work(arrays, run, (expected,), lambda out: (out,))


def _attention_work(case: Case, interpret: bool) -> Work:
    key, value, causal, length, heads = (
        case.shape[name] for name in ("key_width", "value_width", "causal", "length", "heads")
    )
    causal, scale = bool(causal), key**-0.5
    q, k = (_normal(seed, 1, length, heads, key) for seed in (0, 1))
    v, do = (_normal(seed, 1, length, heads, value) for seed in (2, 3))
    positions = jnp.arange(length, dtype=jnp.int32)[None] if causal else jnp.zeros((1, length), jnp.int32)
    first, end = visible_ranges(positions, causal)
    options = {"interpret": True} if interpret else {}
    some = [x[:, :, :CHECKED_HEADS] for x in (q, k, v, do)]
    plain = functools.partial(_plain_attention, scale=scale, causal=causal)
    out, pullback = jax.vjp(plain, *_float32(*some[:3]))

    def checked(arrays: Any) -> tuple[jax.Array, ...]:
        return tuple(x[:, :, :CHECKED_HEADS] for x in arrays)

    if case.operation == "attention_forward":

        def forward(blocks: Blocks) -> Callable[..., Any]:
            kernels, given = gpu_attention, options
            if isinstance(blocks, HopperAttention):
                from dsvl2_jax.kernels import hopper_attention as kernels
            return lambda first, *qkv: kernels.attention_forward(*qkv, first, scale, causal, blocks=blocks, **given)

        return Work((first, q, k, v), forward, (out,), lambda result: checked(result[:1]))

    out_bthd, lse_bht = gpu_attention.attention_forward(q, k, v, first, scale, causal, **options)
    dq, *dkv = pullback(_float32(some[3])[0])
    function = getattr(gpu_attention, case.operation)

    def backward(blocks: Blocks) -> Callable[..., Any]:
        return lambda first, *a: function(*a[:3], first, *a[3:], scale, causal, blocks=blocks, **options)

    delta_bht = gpu_attention.attention_delta(out_bthd, do)
    arrays = first, q, k, v, end, lse_bht, delta_bht, do
    expected = (dq,) if case.operation == "attention_dq" else tuple(dkv)
    return Work(arrays, backward, expected, lambda result: checked(result if isinstance(result, tuple) else (result,)))


def _plain_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, causal: bool) -> jax.Array:
    scores = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest") * scale
    if causal:
        scores = jnp.where(jnp.tri(scores.shape[-1], dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v, precision="highest")
