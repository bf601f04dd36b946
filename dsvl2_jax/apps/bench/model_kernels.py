"""The kernels of a model alone, as `dsvl2 bench model --jobs kernels` measures them: grouped products and attention.

Each is called as the model calls it, so that what is measured is what the platform's choice gives, and is compared
with a float32 reference first.

Tested in tests/apps/bench/test_model.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsvl2_jax.apps.bench.ceilings import median_seconds
from dsvl2_jax.apps.bench.model_options import ModelOptions
from dsvl2_jax.kernels.attention import (
    causal_self_attention,
    mha_decode_attention,
    mla_decode_attention,
    self_attention,
)
from dsvl2_jax.kernels.gpu_decode_attention import attend_splits, combine
from dsvl2_jax.kernels.grouped_matmul import grouped_matmul, grouped_transposed, tgmm
from dsvl2_jax.model import gpu_decode
from dsvl2_jax.model.config import Config

CHECKED_HEADS = 2  # of attention, whose reference holds all scores


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel that has been compared with its reference.

    Attributes:
      error: relative distance of the result from the float32 reference's, by norms.
      call: runs it. flops, moved: of a run; bytes of what it must read and write.
      library: the same by a library of the platform, where there is one to compare with.
    """

    name: str
    sizes: dict[str, int]
    error: float
    call: Callable[[], Any]
    flops: float
    moved: float
    library: Callable[[], Any] | None = None


def measured(kernel: Kernel) -> dict[str, Any]:
    """A row of figures."""
    seconds = median_seconds(kernel.call)
    row = {
        "job": "kernel",
        "kernel": kernel.name,
        "sizes": kernel.sizes,
        "seconds": seconds,
        "flops_per_second": kernel.flops / seconds,
        "bytes_per_second": kernel.moved / seconds,
        "error_of_float32": kernel.error,
    }
    if kernel.library is not None:
        row["library_seconds"] = median_seconds(kernel.library)
    return row


def kernels(config: Config, options: ModelOptions, dtype: Any) -> Iterator[Kernel]:
    """Those of a model's shapes, one after the other, so that only one's arrays are in memory."""
    language, vision = config.language, config.vision
    wide, narrow = language.hidden_size, language.moe_intermediate_size
    rows = [count * language.num_experts_per_tok for count in (max(options.tokens), *options.slots)]
    for count in rows if language.n_routed_experts else ():
        for inner, width in ((wide, narrow), (narrow, wide)):
            yield from grouped(count, inner, width, language.n_routed_experts, dtype, backward=count == rows[0])
    if language.use_mla:
        key, value = language.qk_nope_head_dim + language.qk_rope_head_dim, language.v_head_dim
    else:
        key = value = language.head_dim
    for length in options.tokens:
        yield from attention(1, length, language.num_attention_heads, key, value, dtype, causal=True)
    for tiles in options.tiles:
        width = vision.head_dim
        yield from attention(tiles, vision.patches, vision.heads, width, width, dtype, causal=False)
    for slots in options.slots:
        yield decoding(config, slots, options.context, dtype)


def relative_error(found: Any, expected: Any) -> float:
    """‖found − expected‖ / ‖expected‖."""
    found, expected = (np.asarray(x).astype(np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / (np.linalg.norm(expected) + 1e-30))


def _normal(seed: int, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> jax.Array:
    return (scale * jax.random.normal(jax.random.key(seed), shape, jnp.float32)).astype(dtype)


def grouped(rows: int, inner: int, width: int, groups: int, dtype: Any, *, backward: bool) -> Iterator[Kernel]:
    """Grouped products of uneven groups, and the products of their gradients."""
    random = np.random.default_rng(rows)
    shares = random.dirichlet(np.full(groups, 0.5))
    counts = random.multinomial(rows, shares).astype(np.int32)
    x, w, ct = (
        _normal(0, (rows, inner), dtype),
        _normal(1, (groups, inner, width), dtype, inner**-0.5),
        _normal(2, (rows, width), dtype),
    )
    sizes = jnp.asarray(counts)
    x32, w32, ct32 = (np.asarray(a).astype(np.float32) for a in (x, w, ct))
    parts = np.split(np.arange(rows), np.cumsum(counts)[:-1])
    shape = {"rows": rows, "inner": inner, "width": width, "groups": groups}
    flops, visited = 2.0 * rows * inner * width, int((counts > 0).sum())
    moved = (rows * (inner + width) + visited * inner * width) * dtype.itemsize

    def made(name: str, function: Callable, arrays: tuple, expected: np.ndarray) -> Kernel:
        call = functools.partial(jax.jit(function), *arrays)
        return Kernel(name, shape, relative_error(call(), expected), call, flops, moved)

    out = np.concatenate([x32[part] @ w32[group] for group, part in enumerate(parts)])
    yield made("grouped product", grouped_matmul, (x, w, sizes), out)
    if not backward:
        return
    back = np.concatenate([ct32[part] @ w32[group].T for group, part in enumerate(parts)])
    yield made("its transposed", grouped_transposed, (ct, w, sizes), back)
    weights = np.stack([x32[part].T @ ct32[part] for part in parts])
    yield made("its weight gradient", tgmm, (x, ct, sizes), weights)


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, causal: bool) -> jax.Array:
    """The float32 reference: [B, T, H, Dk] and [B, T, H, Dv] → [B, T, H, Dv]; ``positions``: i32[B, T]."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest") * q.shape[-1] ** -0.5
    index = jnp.arange(q.shape[1])
    if causal:
        first = index - positions
        visible = (index >= first[..., None]) & (index <= index[:, None])
        scores = jnp.where(visible[:, None], scores, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v, precision="highest")


def attention(
    batch: int, length: int, heads: int, key: int, value: int, dtype: Any, *, causal: bool
) -> Iterator[Kernel]:
    """Attention of rows to themselves, forward and backward; checked with three samples to a row, where causal."""
    widths = key, key, value, value
    q, k, v, ct = (_normal(i, (batch, length, heads, width), dtype) for i, width in enumerate(widths))
    whole = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    starts = jnp.asarray(sorted({0, length // 3, length * 3 // 4}), jnp.int32)
    packed = whole - jnp.max(jnp.where(whole[..., None] >= starts, starts, 0), axis=-1)
    scale = key**-0.5

    # The encoder's product makes queries, keys and values as one array.
    given = (q, k, v) if causal else (jnp.stack((q, k, v), axis=2),)

    def forward(given: tuple[jax.Array, ...], positions: jax.Array) -> jax.Array:
        return causal_self_attention(*given, positions, scale) if causal else self_attention(*given, None, scale)

    @jax.jit
    def pulled(given: tuple[jax.Array, ...], positions: jax.Array) -> Any:
        return jax.vjp(lambda given: forward(given, positions), given)

    pull_back = jax.jit(lambda pull, ct: pull(ct))

    def few(x: jax.Array) -> jax.Array:
        return x[:1, :, :CHECKED_HEADS].astype(jnp.float32)

    expected, gradients = jax.vjp(lambda *a: plain_attention(*a, packed[:1], causal), few(q), few(k), few(v))
    out, pull = pulled(given, packed)
    error = relative_error(few(out), expected)
    pairs = batch * heads * (length * (length + 1) / 2 if causal else length**2)
    moved = sum(x.nbytes for x in (q, k, v, out))
    name = "causal attention" if causal else "encoder attention"
    shape = {"batch": batch, "length": length, "heads": heads, "key": key, "value": value}
    call = functools.partial(jax.jit(forward), given, whole)
    library = functools.partial(_cudnn, causal, scale, q, k, v) if jax.devices()[0].platform == "gpu" else None
    yield Kernel(name, shape, error, call, 2.0 * pairs * (key + value), moved, library)
    (found,) = pull_back(pull, ct)
    found = found if causal else [found[0][:, :, i] for i in range(3)]
    errors = [relative_error(few(x), e) for x, e in zip(found, gradients(few(ct)), strict=True)]
    _, pull = pulled(given, whole)
    call = functools.partial(pull_back, pull, ct)
    # Scores once more, and a product each for the gradients of scores, queries, keys and values.
    yield Kernel(f"{name}, backward", shape, max(errors), call, 2.0 * pairs * (3 * key + 2 * value), 2 * moved)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _cudnn(causal: bool, scale: float, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """cuDNN's attention, which takes values as wide as keys."""
    v = jnp.pad(v, ((0, 0),) * 3 + ((0, q.shape[-1] - v.shape[-1]),))
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, scale=scale, implementation="cudnn")


def _split(queries: list, keys: list, values: jax.Array | None, last: jax.Array, scale: float) -> jax.Array:
    """As `dsvl2_jax.model.gpu_decode` attends, without what it joins to the sum of the splits."""
    split = attend_splits(queries, keys, values, last[:, 0], scale=scale)
    return combine(*split, dtype=queries[0].dtype)[:, None]


def decoding(config: Config, slots: int, context: int, dtype: Any) -> Kernel:
    """A decode step's attention of one layer to caches of ``context`` tokens."""
    language = config.language
    split = jax.default_backend() == "gpu" and gpu_decode.is_supported(language, slots, dtype, [dtype])
    heads, last = language.num_attention_heads, jnp.full((slots, 1), context - 1, jnp.int32)
    if language.use_mla:
        rank, rope = language.kv_lora_rank, language.qk_rope_head_dim
        sizes = (slots, 1, heads, rank), (slots, 1, heads, rope), (slots, context, rank), (slots, context, rope)
        arrays = [_normal(i, size, dtype) for i, size in enumerate(sizes)]
        scale = (language.qk_nope_head_dim + rope) ** -0.5

        def attention(q_latent: jax.Array, q_rope: jax.Array, latent: jax.Array, k_rope: jax.Array) -> jax.Array:
            if split:
                keys = [a[:, :, None] for a in (latent, k_rope)]
                return _split([q_latent[:, 0], q_rope[:, 0]], keys, None, last, scale)
            return mla_decode_attention(q_latent, q_rope, latent, k_rope, last, scale)

        q_latent, q_rope, latent, k_rope = (x.astype(jnp.float32) for x in arrays)
        scores = jnp.einsum("bthr,bsr->bhts", q_latent, latent, precision="highest")
        scores += jnp.einsum("bthd,bsd->bhts", q_rope, k_rope, precision="highest")
        expected = jnp.einsum("bhts,bsr->bthr", jax.nn.softmax(scores * scale), latent, precision="highest")
        flops, cache = 2.0 * slots * heads * context * (2 * rank + rope), arrays[2:]
    else:
        width, kv = language.head_dim, language.kv_heads
        sizes = (slots, 1, heads, width), (slots, context, kv, width), (slots, context, kv, width)
        q, k, v = arrays = [_normal(i, size, dtype) for i, size in enumerate(sizes)]
        groups, scale = heads // kv, width**-0.5

        def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            if split:
                return _split([q[:, 0]], [k], v, last, scale)
            return mha_decode_attention(q, jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2), last, scale)

        q, k, v = (x.astype(jnp.float32) for x in (q, jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2)))
        scores = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest")
        expected = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores * scale), v, precision="highest")
        flops, cache = 4.0 * slots * heads * context * width, arrays[1:]
    call = functools.partial(jax.jit(attention), *arrays)
    moved = sum(math.prod(x.shape) * dtype.itemsize for x in cache)
    return Kernel(
        "decode attention", {"slots": slots, "context": context}, relative_error(call(), expected), call, flops, moved
    )
