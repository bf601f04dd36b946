"""Both attentions against a numpy reference in float64, and every way to run them against the whole sequence."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsvl2_jax.kernels.quantized_cache import quantize_entries
from dsvl2_jax.model.attention import LatentAttention, MultiHeadAttention, write_cache
from dsvl2_jax.model.config import LanguageConfig
from dsvl2_jax.model.layers import rotate_half, rotate_interleaved
from dsvl2_jax.model.rotary import rotary_tables
from dsvl2_jax.sharding import make_mesh

ROWS, LENGTH, CACHE_LENGTH = 2, 9, 16

# Of the largest element.
TOLERANCE = 2e-5

LATENT = LanguageConfig(
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=None,
    kv_lora_rank=12,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    initializer_range=0.4,
)
MULTI_HEAD = dataclasses.replace(LATENT, use_mla=False)
VARIANTS = {
    "MHA": MULTI_HEAD,
    "MHA, two key heads, biases": dataclasses.replace(MULTI_HEAD, num_key_value_heads=2, attention_bias=True),
    "MLA": LATENT,
    "MLA, query latent, biases": dataclasses.replace(LATENT, q_lora_rank=10, attention_bias=True),
}


@dataclasses.dataclass(frozen=True)
class Variant:
    config: LanguageConfig
    params: dict

    def run(self, x, positions=None, cache=None, read_cache=False, decode=False):
        """(output, cache) of one call."""
        if positions is None:
            positions = np.broadcast_to(np.arange(x.shape[1], dtype=np.int32), x.shape[:2])
        return _run(self.config, self.params, x, positions, cache, read_cache, decode)

    def empty_cache(self) -> dict[str, np.ndarray]:
        """Full of what must never be seen."""
        cfg = self.config
        if cfg.use_mla:
            widths = {"latent": (cfg.kv_lora_rank,), "rope_key": (cfg.qk_rope_head_dim,)}
        else:
            widths = dict.fromkeys(("key", "value"), (cfg.kv_heads, cfg.head_dim))
        return {name: np.full((ROWS, CACHE_LENGTH, *width), 1e4, np.float32) for name, width in widths.items()}


def module(cfg: LanguageConfig) -> nn.Module:
    return (LatentAttention if cfg.use_mla else MultiHeadAttention)(cfg, jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _run(cfg, params, x, positions, cache, read_cache, decode):
    return module(cfg).apply({"params": params}, x, positions, cache, read_cache=read_cache, decode=decode)


@functools.cache
def inputs(length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(ROWS, length, LATENT.hidden_size)).astype(np.float32)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request) -> Variant:
    cfg = VARIANTS[request.param]
    positions = np.zeros((ROWS, LENGTH), np.int32)
    init = functools.partial(module(cfg).init, cache=None)
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), inputs(), positions)["params"])
    rng = np.random.default_rng(0)  # not init's: its biases are zero and its scales one
    values = jax.tree.map(lambda p: rng.normal(0, 0.4, p.shape).astype(np.float32), shapes)
    return Variant(cfg, values)


def close(found, expected) -> None:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def rotated(x: np.ndarray, theta: float, interleaved: bool) -> np.ndarray:
    """[T, H, width] rotated by complex numbers: pairs (2i, 2i+1), or (i, i + width/2). Written as halves."""
    half = x.shape[-1] // 2
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    angles = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    turned = (first + 1j * second) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], -1)


def reference(variant: Variant, x: np.ndarray) -> np.ndarray:
    """[T, D] of one row, head by head, in float64."""
    cfg = variant.config
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), variant.params)

    def project(name: str, x: np.ndarray) -> np.ndarray:
        return np.tensordot(x, params[name]["kernel"], 1) + params[name].get("bias", 0.0)

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params[name]["scale"]

    def rotate(x: np.ndarray) -> np.ndarray:
        return rotated(x, cfg.rope_theta, cfg.use_mla)

    heads = cfg.num_attention_heads
    if cfg.use_mla:
        nope, rank = cfg.qk_nope_head_dim, cfg.kv_lora_rank
        if cfg.q_lora_rank is None:
            query = project("q_proj", x)
        else:
            query = project("q_b_proj", norm("q_a_layernorm", project("q_a_proj", x)))
        query = np.concatenate([query[..., :nope], rotate(query[..., nope:])], -1)
        compressed = project("kv_a_proj_with_mqa", x)
        up = np.einsum("tr,hwr->thw", norm("kv_a_layernorm", compressed[:, :rank]), params["kv_b_proj"])
        rope_key = rotate(compressed[:, None, rank:]).repeat(heads, axis=1)
        key, value = np.concatenate([up[..., :nope], rope_key], -1), up[..., nope:]
    else:
        query, key = rotate(project("q_proj", x)), rotate(project("k_proj", x))
        key, value = (a.repeat(heads // cfg.kv_heads, axis=1) for a in (key, project("v_proj", x)))
    scores = np.einsum("thd,shd->hts", query, key) / query.shape[-1] ** 0.5
    weights = np.exp(np.where(np.tri(len(x), dtype=bool), scores, -np.inf))
    out = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), value)
    return np.tensordot(out, params["o_proj"]["kernel"], 2) + params["o_proj"].get("bias", 0.0)


def test_output_is_the_reference_one(variant):
    out, cache = variant.run(inputs())
    assert cache is None
    close(out, [reference(variant, row) for row in inputs()])


def test_decoding_token_by_token_equals_the_whole_sequence(variant):
    """For latent attention this is absorbed = expanded."""
    whole, _ = variant.run(inputs())
    cache, steps = variant.empty_cache(), []
    for t in range(LENGTH):
        out, cache = variant.run(inputs()[:, t : t + 1], np.full((ROWS, 1), t, np.int32), cache, True, True)
        steps.append(out)
    close(np.concatenate(steps, axis=1), whole)


def test_a_step_with_drafts_equals_single_steps_whatever_was_taken_back(variant):
    """Three tokens a step, of which the second and the third are wrong in the first try, and one is no number."""
    whole, _ = variant.run(inputs())
    cache, outs = variant.empty_cache(), []
    for start in range(0, LENGTH, 3):
        right = inputs()[:, start : start + 3]
        wrong = np.concatenate([right[:, :1], -right[:, 1:]], axis=1)
        wrong[:, 2, start] = np.nan
        positions = np.broadcast_to(np.arange(start, start + 3, dtype=np.int32), (ROWS, 3))
        for tokens in (wrong, right):
            out, cache = variant.run(tokens, positions, cache, True, True)
            close(out[:, 0], whole[:, start])
        outs.append(out)
    close(np.concatenate(outs, axis=1), whole)


def test_drafts_beyond_the_end_of_the_cache_leave_what_is_in_it(variant):
    whole, _ = variant.run(inputs())
    _, cache = variant.run(inputs(), cache=variant.empty_cache())
    cache = jax.tree.map(lambda x: x[:, :LENGTH], cache)
    positions = np.broadcast_to(np.arange(LENGTH - 1, LENGTH + 3, dtype=np.int32), (ROWS, 4))
    tokens = np.concatenate([inputs()[:, -1:], np.ones((ROWS, 3, inputs().shape[-1]), np.float32)], axis=1)
    out, new = variant.run(tokens, positions, cache, True, True)
    close(out[:, 0], whole[:, -1])
    for name in cache:
        close(new[name], cache[name])


def test_chunks_through_the_cache_equal_the_whole_sequence(variant):
    whole, _ = variant.run(inputs())
    first, cache = variant.run(inputs()[:, :5], cache=variant.empty_cache())
    positions = np.broadcast_to(np.arange(5, LENGTH, dtype=np.int32), (ROWS, LENGTH - 5))
    second, _ = variant.run(inputs()[:, 5:], positions, cache, read_cache=True)
    close(np.concatenate([first, second], axis=1), whole)


def test_rows_continue_at_their_own_positions_and_padding_is_never_seen(variant):
    """Row 1 has 6 real tokens of 9 when decoding begins: its padding is at positions 6 to 8 until overwritten."""
    lengths = np.array([LENGTH, 6], np.int32)
    x = inputs(LENGTH + 3)
    expected, _ = variant.run(x)
    padded = np.where(np.arange(LENGTH)[None, :, None] < lengths[:, None, None], x[:, :LENGTH], 1e3)
    out, cache = variant.run(padded.astype(np.float32), cache=variant.empty_cache())
    for row, length in enumerate(lengths):
        close(out[row, :length], expected[row, :length])
    for step in range(3):
        positions = lengths[:, None] + step
        out, cache = variant.run(np.take_along_axis(x, positions[..., None], 1), positions, cache, True, True)
        close(out[:, 0], expected[np.arange(ROWS), positions[:, 0]])


def test_without_reading_a_cache_only_the_distances_of_positions_matter(variant):
    x = inputs()
    shifted = np.broadcast_to(np.arange(7, 7 + LENGTH, dtype=np.int32), x.shape[:2])
    close(variant.run(x, shifted)[0], variant.run(x)[0])


def test_the_two_rotary_layouts_are_complex_rotations_of_their_own_pairs():
    x = inputs().reshape(ROWS, LENGTH, 4, 8)
    cos, sin = rotary_tables(LanguageConfig(qk_rope_head_dim=8, rope_theta=100.0), jnp.arange(LENGTH)[None])
    for rotate, interleaved in ((rotate_half, False), (rotate_interleaved, True)):
        close(rotate(x, cos, sin), [rotated(row, 100.0, interleaved) for row in x])


def test_rotary_tables_stay_float32_and_exact_at_the_context_s_end():
    cos, sin = rotary_tables(LanguageConfig(), jnp.asarray([[4095]]))
    assert cos.dtype == sin.dtype == jnp.float32
    frequencies = np.float64(10000.0) ** (-np.arange(0, 64, 2) / 64)
    # float32 angles near 4095 are themselves rounded to 2.4e-4.
    np.testing.assert_allclose(cos[0, 0], np.cos(4095 * frequencies), atol=1e-3)
    np.testing.assert_allclose(sin[0, 0], np.sin(4095 * frequencies), atol=1e-3)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("tokens", [1, 3, 5, 16])
@pytest.mark.parametrize("entry", [(6,), (3, 4), (4, 4)], ids=["latent", "3 heads", "4 heads"])
def test_a_cache_whose_rows_are_split_is_written_as_a_whole_one(rows, tokens, entry):
    rng = np.random.default_rng(0)
    cache, new = (jnp.asarray(rng.normal(size=(rows, n, *entry)), jnp.float32) for n in (32, tokens))
    name = "latent" if len(entry) == 1 else "key"
    write = jax.jit(lambda *arrays: write_cache({name: arrays[0]}, {name: arrays[1]}, arrays[2])[name])
    for start in (0, 2, 5, 30 - tokens, 32 - tokens):
        positions = start + jnp.arange(tokens) + jnp.zeros((rows, 1), jnp.int32)
        expected = cache.at[:, start : start + tokens].set(new)
        with jax.set_mesh(make_mesh(data=2, tensor=2, expert=2)):
            found = write(cache, new, positions)
        assert found.sharding.shard_shape(found.shape)[:2] == (1, 32 // (8 // rows))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name, entry", [("latent", (6,)), ("key", (4, 4))], ids=["latent", "heads"])
def test_a_cache_in_int8_is_written_with_its_scales_also_where_its_rows_are_split(name, entry):
    rng = np.random.default_rng(0)
    cache, new = (jnp.asarray(rng.normal(size=(2, n, *entry)), jnp.float32) for n in (32, 5))
    cache, expected = quantize_entries(cache), quantize_entries(new)
    write = jax.jit(lambda *arrays: write_cache({name: arrays[0]}, {name: arrays[1]}, arrays[2])[name])
    positions = jnp.asarray([[2], [25]]) + jnp.arange(5)
    apart = write(cache, new, positions)
    with jax.set_mesh(make_mesh(data=2, tensor=2, expert=2)):
        split = write(cache, new, positions)
    assert split.values.sharding.shard_shape(split.shape)[:2] == (1, 8)
    assert split.scale.sharding.shard_shape(split.scale.shape)[:2] == (1, 8)
    for row, start in enumerate((2, 25)):
        for found in (apart, split):
            for kind in ("values", "scale"):
                whole = getattr(cache, kind)[row].at[start : start + 5].set(getattr(expected, kind)[row])
                np.testing.assert_array_equal(getattr(found, kind)[row], whole)


@pytest.mark.parametrize("rows", [1, 8])
def test_drafts_are_written_wherever_a_row_lies_and_not_beyond_its_end(rows):
    rng = np.random.default_rng(0)
    cache, new = (rng.normal(size=(rows, n, 6)).astype(np.float32) for n in (32, 5))
    write = jax.jit(
        lambda *arrays: write_cache({"latent": arrays[0]}, {"latent": arrays[1]}, arrays[2], drafts=True)["latent"]
    )
    for start in (0, 2, 27, 30, 31):
        expected = cache.copy()
        expected[:, start : start + 5] = new[:, : 32 - start]
        positions = np.broadcast_to(start + np.arange(5, dtype=np.int32), (rows, 5))
        np.testing.assert_array_equal(write(cache, new, positions), expected)
        with jax.set_mesh(make_mesh(data=2, tensor=2, expert=2)):
            np.testing.assert_array_equal(write(cache, new, positions), expected)
