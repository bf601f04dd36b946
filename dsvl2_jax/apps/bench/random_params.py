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
from dsvl2_jax.model.deepseek_vl2 import Params, abstract_leaves
from dsvl2_jax.model.parameter_paths import LeafPath, stays_float32

STD = 0.02  # the model's own, before training


def shapes_of(config: Config, dtype: DTypeLike, parts: Collection[str]) -> Params:
    """The parameters that some parts of the model need, as shapes.

    Args:
      parts: of "vision" (encoder and adaptor) and "language". Embeddings are always there, since their dtype is the
        model's.
    """
    leaves = {}
    for path, (shape, _) in abstract_leaves(config).items():
        part = "vision" if path[0] == "projector" else path[0]
        if part in ("vision", "language") and part not in parts and path[1] != "embed_tokens":
            continue
        leaves[path] = jax.ShapeDtypeStruct(shape, jnp.float32 if stays_float32(path) else dtype)
    return unflatten_dict(leaves)


def bytes_of(shapes: Params) -> int:
    """Of parameters, or of other arrays' shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def random_params(shapes: Params) -> Params:
    """Parameters of these shapes: matrices of standard deviation 0.02, scales of one, biases of zero.

    One program a shape makes them, so that no more than one array is beside them in memory, and none on the host.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(shapes)
    leaves = []
    for seed, (keys, leaf) in enumerate(paths):
        path: LeafPath = tuple(key.key for key in keys)
        if path[-1].endswith(("scale", "bias")):
            leaves.append(jnp.full(leaf.shape, path[-1].endswith("scale"), leaf.dtype))
        else:
            leaves.append(_fill(seed, leaf.shape, leaf.dtype))
    return jax.tree_util.tree_unflatten(structure, leaves)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _fill(seed: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Uniform, since what a product costs does not depend on the distribution, and from the quickest generator."""
    most = math.sqrt(3) * STD
    return jax.random.uniform(jax.random.key(seed, impl="rbg"), shape, dtype, -most, most)
