"""The adaptor: pixel shuffle in torch's order, then an MLP with exact GELU."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsvl2_jax.model.adaptor import Adaptor, pixel_shuffle
from dsvl2_jax.model.config import ProjectorConfig


@pytest.mark.parametrize(("side", "ratio"), [(4, 2), (5, 2), (27, 2), (7, 3), (6, 1)])
def test_pixel_shuffle_puts_each_value_where_the_rule_says(side, ratio):
    """Feature channel·ratio² + dy·ratio + dx of cell (row, col) is patch (row·ratio + dy, col·ratio + dx), or 0."""
    width = 3
    x = np.random.default_rng(0).normal(size=(2, side * side, width)).astype(np.float32)
    out = math.ceil(side / ratio)
    expected = np.zeros((2, out, out, width, ratio, ratio), np.float32)
    for y in range(side):
        for column in range(side):
            place = (slice(None), y // ratio, column // ratio, slice(None), y % ratio, column % ratio)
            expected[place] = x[:, y * side + column]
    found = jax.jit(pixel_shuffle, static_argnums=1)(x, ratio)
    np.testing.assert_array_equal(found, expected.reshape(2, out * out, -1))


@pytest.mark.parametrize("side", [4, 27])
def test_pixel_shuffle_is_torch_s_unfold(side):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(1).normal(size=(2, side * side, 3)).astype(np.float32)
    grid = torch.from_numpy(x).reshape(2, side, side, 3).permute(0, 3, 1, 2)
    padded = torch.nn.functional.pad(grid, (0, side % 2, 0, side % 2))
    expected = torch.nn.functional.unfold(padded, kernel_size=2, stride=2).permute(0, 2, 1)
    np.testing.assert_array_equal(pixel_shuffle(jnp.asarray(x), 2), expected.numpy())


def exact_gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


@pytest.mark.parametrize(("depth", "mlp_ratio"), [(2, 1), (3, 2)])
def test_mlp_has_exact_gelu_between_its_layers(depth, mlp_ratio):
    cfg = ProjectorConfig(input_dim=4, n_embed=6, depth=depth, mlp_ratio=mlp_ratio)
    x = np.random.default_rng(2).normal(size=(1, 9, 4)).astype(np.float32)
    layer = Adaptor(cfg, jnp.float32)
    shapes = nn.unbox(jax.eval_shape(layer.init, jax.random.key(0), x)["params"])
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), shapes)
    expected = np.asarray(pixel_shuffle(jnp.asarray(x), 2), np.float64)
    widths = [4 * 4] + [6 * mlp_ratio] * (depth - 1) + [6]
    for i in range(depth):
        assert params[f"layers_{i}"]["kernel"].shape == (widths[i], widths[i + 1])
        expected = expected @ params[f"layers_{i}"]["kernel"] + params[f"layers_{i}"]["bias"]
        expected = exact_gelu(expected) if i < depth - 1 else expected
    found = jax.jit(functools.partial(layer.apply, {"params": params}))(x)
    assert found.shape == (1, 4, 6)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
