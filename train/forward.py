"""The encoder and the decoder for training: a loop or a scan over layers, rematerialised, computed in one dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import path_aware_map
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from dsvl2_jax.model import deepseek_vl2 as model
from dsvl2_jax.model.attention import ATTENTION_OUTPUT
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.decoder import DecoderLayer
from dsvl2_jax.model.deepseek_vl2 import Params
from dsvl2_jax.model.layers import RMSNorm
from dsvl2_jax.model.moe import EXPERT_PRODUCT, Routing
from dsvl2_jax.model.parameter_paths import LeafPath, stays_float32
from dsvl2_jax.model.vision import VisionBlock
from dsvl2_jax.sharding import PARAM_RULES, ambient_mesh_shape, partition_spec
from dsvl2_jax.train.stacked import LayerRun, layer_runs

Statistics = Callable[[Routing], tuple[jax.Array, jax.Array]]

_KEEP_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT, EXPERT_PRODUCT),
)

# What the backward pass finds kept of a layer: everything; the products with weights and the attention; its input.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda layer: layer,
    "dots": functools.partial(jax.checkpoint, policy=_KEEP_PRODUCTS),
    "full": jax.checkpoint,
}


def compute_params(params: Params, dtype: DTypeLike | None) -> tuple[Params, jnp.dtype]:
    """Casts to the dtype of computation, and returns that dtype.

    Stacks of layers are cast whole: the TPU compiler does so anyway, and their gradients, which come in this dtype, are
    then kept in it until the optimizer takes them.
    """
    dtype = jnp.dtype(dtype or params["language"]["embed_tokens"].dtype)

    def leaf(path: LeafPath, value: jax.Array) -> jax.Array:
        return value.astype(jnp.float32 if stays_float32(path) else dtype)

    return path_aware_map(leaf, params), dtype


def _gathered(own: Params, run: LayerRun, config: Config) -> Params:
    """The parameters of one layer, gathered over ``data`` in the dtype of computation, not in float32."""
    sizes = ambient_mesh_shape()
    if sizes is None:
        return own
    leaves = model.abstract_leaves(config)

    def leaf(path: LeafPath, value: jax.Array) -> jax.Array:
        shape, axes = leaves[(run.part, run.members()[0], *path)]
        return lax.with_sharding_constraint(value, partition_spec(shape, axes, sizes, PARAM_RULES))

    return path_aware_map(leaf, own)


def _through(run: LayerRun, params: Params, config: Config, layer: Callable, x: jax.Array, remat: str) -> Any:
    """Applies the layers of a run: ``layer(params of one layer, x) → (x, what it reports)``.

    Returns the last x and the reports, stacked over the layers.
    """

    def one(x: jax.Array, own: Params) -> tuple[jax.Array, Any]:
        return layer(_gathered(own, run, config), x)

    body = REMAT[remat](one)
    if run.stacked and run.name in params:
        return lax.scan(body, x, params[run.name])
    reports = []
    for name in run.members():
        x, report = body(x, params[name])
        reports.append(report)
    return x, jax.tree.map(lambda *parts: jnp.stack(parts), *reports)


def encode_tiles(
    params: Params, config: Config, tiles: jax.Array, mean: ArrayLike, std: ArrayLike, dtype: jnp.dtype, remat: str
) -> jax.Array:
    """u8[N, S, S, 3] → [N, P, W], after the encoder's last block; ``params`` of `compute_params`."""

    def apply(own: Params, x: jax.Array) -> tuple[jax.Array, None]:
        return VisionBlock(config.vision, dtype).apply({"params": own}, x), None

    x = model.embed_patches(params, config, tiles, mean, std)
    for run in layer_runs(config)["vision"]:
        x, _ = _through(run, params["vision"], config, apply, x, remat)
    return x


def adapt_tiles(
    params: Params, config: Config, tiles: jax.Array, mean: ArrayLike, std: ArrayLike, dtype: jnp.dtype, remat: str
) -> jax.Array:
    """u8[N, S, S, 3] → [N, tokens per tile, D]; ``params`` of `compute_params`. As the function of the model."""
    return model.adapt_patches(params, config, encode_tiles(params, config, tiles, mean, std, dtype, remat))


def hidden_states(
    params: Params,
    config: Config,
    embeddings: jax.Array,
    positions: jax.Array,
    valid: jax.Array,
    statistics: Statistics,
    dtype: jnp.dtype,
    remat: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The decoder's layers and final norm.

    Args:
      params: of `compute_params`.
      embeddings: [B, T, D]. positions: i32[B, T], from 0 in each segment. valid: bool[B, T], False for padding.
      statistics: from a layer's routing to (balance loss f32[], load f32[E]).

    Returns:
      [B, T, D] hidden states; f32[L] balance losses and f32[L, E] loads of the L MoE layers.
    """
    language = config.language
    x, losses, loads = embeddings, [], []
    for run in layer_runs(config)["language"]:
        module = DecoderLayer(language, run.first, dtype)

        def layer(own: Params, x: jax.Array, module: DecoderLayer = module) -> tuple[jax.Array, Any]:
            x, _, routing = module.apply({"params": own}, x, positions, valid, None)
            return x, None if routing is None else statistics(routing)

        x, report = _through(run, params["language"], config, layer, x, remat)
        if report is not None:
            losses.append(report[0])
            loads.append(report[1])
    norm = RMSNorm(language.rms_norm_eps)
    x = norm.apply({"params": params["language"]["norm"]}, x)
    if not losses:
        return x, jnp.zeros(0), jnp.zeros((0, language.n_routed_experts or 0))
    return x, jnp.concatenate(losses), jnp.concatenate(loads)
