"""What training changes about the model's forward pass: the dtype of its parameters, rematerialisation, gathering."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import path_aware_map
from jax import lax
from jax.typing import DTypeLike

from dsvl2_jax.kernels.attention import ATTENTION_OUTPUT
from dsvl2_jax.kernels.grouped_matmul import GROUPED_PRODUCT
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import Params, compute_dtype
from dsvl2_jax.model.layer_runs import LayerFunction, LayerRun, LayerWrapper
from dsvl2_jax.model.parameter_paths import LeafPath, stays_float32
from dsvl2_jax.model.weights import is_quantized
from dsvl2_jax.sharding import PARAM_RULES, ambient_mesh_shape, partition_spec
from dsvl2_jax.train.adapter import stored_axes

_KEEP_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT, GROUPED_PRODUCT),
)

# What is kept of a layer for the backward pass: everything; the products with weights and the attention; its input.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda layer: layer,
    "dots": functools.partial(jax.checkpoint, policy=_KEEP_PRODUCTS),
    "full": jax.checkpoint,
}


def compute_params(params: Params, dtype: DTypeLike | None) -> Params:
    """Casts to the dtype in which the model is to compute; None: that of its embeddings.

    Stacks of layers are cast whole: the TPU compiler does so anyway, and their gradients, which come in this dtype, are
    then kept in it until the optimizer takes them.
    """
    dtype = jnp.dtype(dtype or compute_dtype(params))

    def cast(path: LeafPath, value: Any) -> Any:
        if is_quantized(value):
            return value
        if isinstance(value, Mapping):
            return {name: cast((*path, name), inner) for name, inner in value.items()}
        keeps = stays_float32(path) or path[-1] in ("magnitude", "dropout_rate", "dropout_key")
        return value if keeps and value.dtype != jnp.bfloat16 else value.astype(jnp.float32 if keeps else dtype)

    return cast((), params)


def training_layers(config: Config, remat: str) -> LayerWrapper:
    """How layers run in training, for the ``wrap`` of the model's functions.

    A layer's parameters are gathered just before they are used, and what the backward pass needs of it is kept or
    computed again, as ``remat`` (a name of `REMAT`) says.
    """

    def wrap(run: LayerRun, layer: LayerFunction) -> LayerFunction:
        def gathered_layer(x: jax.Array, layer_params: Params, state: Any) -> tuple[jax.Array, Any, Any]:
            return layer(x, _gathered(layer_params, run, config), state)

        return REMAT[remat](gathered_layer)

    return wrap


def _gathered(layer_params: Params, run: LayerRun, config: Config) -> Params:
    """The parameters of one layer, gathered over ``data`` in the dtype of computation, not in float32."""
    sizes = ambient_mesh_shape()
    if sizes is None:
        return layer_params

    def leaf(path: LeafPath, value: jax.Array) -> jax.Array:
        axes = stored_axes(config, (run.part, run.members()[0], *path))
        if axes is None:
            return value
        return lax.with_sharding_constraint(value, partition_spec(value.shape, axes, sizes, PARAM_RULES))

    return path_aware_map(leaf, layer_params)
