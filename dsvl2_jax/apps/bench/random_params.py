"""Random weights that are made on the device. Tested in tests/apps/bench/test_model.py."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike

from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import Params
from dsvl2_jax.model.parameter_paths import LeafPath, stays_float32
from dsvl2_jax.model.quantization import Quantization, kinds_of, leaves_of, quantized_weights

STD = 0.02  # the model's own, before training
LARGEST = {"int8": 127, "int4": 8, "float8": 1}  # of the values that `_fill_stored` makes, nearly


def shapes_of(
    config: Config, dtype: DTypeLike, parts: Collection[str], quantization: Quantization | None = None
) -> Params:
    """The parameters that some parts of the model need, as shapes.

    Args:
      dtype: of what is not quantized.
      parts: of "vision" (encoder and adaptor) and "language". Embeddings are always there, since their dtype is the
        model's.
    """
    leaves = {}
    for path, (shape, stored_as) in leaves_of(config, quantized_weights(config, quantization)).items():
        part = "vision" if path[0] == "projector" else path[0]
        if part in ("vision", "language") and part not in parts and path[1] != "embed_tokens":
            continue
        plain = jnp.float32 if stays_float32(path) else dtype
        leaves[path] = jax.ShapeDtypeStruct(shape, plain if stored_as is None else stored_as)
    return unflatten_dict(leaves)


def bytes_of(shapes: Params) -> int:
    """Of parameters, or of other arrays' shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def random_params(shapes: Params) -> Params:
    """Parameters of these shapes: matrices of standard deviation 0.02, quantized or not, scales of one, biases of zero.

    One program a shape makes them, so that no more than one array is beside them in memory, and none on the host.
    """
    found, structure = jax.tree_util.tree_flatten_with_path(shapes)
    paths: list[LeafPath] = [tuple(key.key for key in keys) for keys, _ in found]
    kinds = kinds_of(dict.fromkeys(paths))
    leaves = []
    for seed, (path, (_, leaf)) in enumerate(zip(paths, found, strict=True)):
        if kind := kinds.get(path[:-1]):
            is_scale = path[-1] == "scale"
            leaves.append(
                jnp.full(leaf.shape, math.sqrt(3) * STD / LARGEST[kind], leaf.dtype)
                if is_scale
                else _fill_stored(seed, leaf.shape, leaf.dtype)
            )
        elif path[-1].endswith(("scale", "bias")):
            leaves.append(jnp.full(leaf.shape, path[-1].endswith("scale"), leaf.dtype))
        else:
            leaves.append(_fill(seed, leaf.shape, leaf.dtype))
    return jax.tree_util.tree_unflatten(structure, leaves)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _fill(seed: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Uniform, since what a product costs does not depend on the distribution, and from the quickest generator."""
    most = math.sqrt(3) * STD
    return jax.random.uniform(jax.random.key(seed, impl="rbg"), shape, dtype, -most, most)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _fill_stored(seed: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Values of a quantized weight: any bytes, which are as many different integers, or uniform in float8."""
    key = jax.random.key(seed, impl="rbg")
    if jnp.issubdtype(dtype, jnp.integer):
        return jax.random.bits(key, shape, jnp.uint8).astype(dtype)
    return jax.random.uniform(key, shape, jnp.bfloat16, -1, 1).astype(dtype)
