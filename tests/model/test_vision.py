"""What the encoder sees of a tile. Its arithmetic is held to SigLIP's in test_transformers and test_golden."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsvl2_jax.model.config import VisionConfig
from dsvl2_jax.model.vision import VisionEncoder, encode_tiles

# 21 pixels in patches of 4: 5 × 5 patches, and one pixel at the right and bottom that belongs to none.
CONFIG = VisionConfig(image_size=21, patch_size=4, width=12, layers=1, heads=2, mlp_ratio=2.0)
MEAN, STD = np.float32([0.5, 0.4, 0.3]), np.float32([0.5, 0.6, 0.7])


@functools.cache
def tiles() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 21, 21, 3), dtype=np.uint8)


@functools.cache
def params() -> dict:
    init = jax.eval_shape(VisionEncoder(CONFIG, jnp.float32).init, jax.random.key(0), tiles(), MEAN, STD)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), nn.unbox(init)["params"])


@jax.jit
def encode(tiles, mean=MEAN, std=STD):
    return encode_tiles(params(), CONFIG, tiles, mean, std, dtype=jnp.float32)


def test_features_are_one_per_whole_patch_and_pixels_beyond_them_are_ignored():
    expected = encode(tiles())
    assert expected.shape == (2, 25, 12)
    changed = tiles().copy()
    changed[:, 20:], changed[:, :, 20:] = 0, 255
    np.testing.assert_array_equal(encode(changed), expected)
    changed[:, 19, 19] += 1
    assert (encode(changed) != expected).any()


def test_the_last_six_pixels_of_a_released_tile_are_ignored():
    released = VisionConfig(image_size=384, patch_size=14)
    assert released.grid * released.patch_size == 384 - 6


def test_the_mean_colour_is_zero_after_normalisation():
    """A tile of the mean colour leaves the patch product nothing but its bias, so the mean is what enters as 0."""
    grey = np.full((2, 21, 21, 3), 51, np.uint8)
    mean = np.full(3, 0.2, np.float32)  # 51 / 255
    np.testing.assert_allclose(encode(grey, mean, STD), encode(grey, mean, 9 * STD), rtol=1e-5, atol=1e-5)


def test_normalisation_is_per_channel():
    """(v/255 − mean)/std again, by moving the mean and the standard deviation into the values."""
    values = np.random.default_rng(2).integers(0, 128, (2, 21, 21, 3), dtype=np.uint8)
    doubled = encode(values * 2, MEAN, STD)
    np.testing.assert_allclose(doubled, encode(values, MEAN / 2, STD / 2), rtol=1e-4, atol=1e-5)
    assert np.abs(encode(values, MEAN, STD) - encode(values, MEAN[::-1], STD)).max() > 1e-3


def test_tiles_do_not_see_each_other():
    np.testing.assert_allclose(encode(tiles()[::-1]), encode(tiles())[::-1], rtol=1e-5, atol=1e-6)


def test_the_pooling_head_is_declared_and_never_read():
    assert set(params()["attn_pool"]) >= {"latent", "q_kernel", "kv_bias", "mlp_fc2_bias", "norm_scale"}
    assert len(params()["attn_pool"]) == 13
    without = {name: value for name, value in params().items() if name != "attn_pool"}
    found = encode_tiles(without, CONFIG, tiles(), MEAN, STD, dtype=jnp.float32)
    np.testing.assert_allclose(found, encode(tiles()), rtol=1e-5, atol=1e-6)


def test_bfloat16_features_are_near_float32():
    found = jax.jit(functools.partial(encode_tiles, config=CONFIG, dtype=jnp.bfloat16))(
        params(), tiles=tiles(), mean=MEAN, std=STD
    )
    assert found.dtype == jnp.bfloat16
    assert np.float32(found) == pytest.approx(np.asarray(encode(tiles())), abs=0.15)
