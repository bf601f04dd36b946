"""DeepSeek-VL2 as one Linen module, and the pure functions that run it.

Parameters are a plain nested dict; `abstract_params` gives their shapes and logical axes without
allocating anything. The functions are jittable, with ``config`` static; under `jax.set_mesh` they
run sharded by the tables of `dsvl2_jax.sharding`.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike, DTypeLike

from dsvl2_jax.model.adaptor import Adaptor
from dsvl2_jax.model.config import NEWLINE_POSITION, SEPARATOR_POSITION, TEXT_POSITION, Config
from dsvl2_jax.model.decoder import Cache, Decoder
from dsvl2_jax.model.moe import Routing
from dsvl2_jax.model.vision import VisionEncoder
from dsvl2_jax.sharding import PARAM_RULES, constrain, partition_spec, split_further

Params = dict[str, Any]


class DeepSeekVL2(nn.Module):
    """Encoder, adaptor, the two learned image tokens, and the decoder."""

    config: Config
    dtype: DTypeLike

    def setup(self) -> None:
        cfg = self.config
        self.vision = VisionEncoder(cfg.vision, self.dtype)
        self.projector = Adaptor(cfg.projector, self.dtype)
        self.language = Decoder(cfg.language, self.dtype)
        init = nn.with_logical_partitioning(nn.initializers.normal(cfg.language.hidden_size**-0.5), ("embed",))
        self.image_newline = self.param("image_newline", init, (cfg.language.hidden_size,))
        self.view_seperator = self.param("view_seperator", init, (cfg.language.hidden_size,))

    def encode_tiles(self, tiles: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
        return self.vision(tiles, mean, std)

    def adapt_tiles(self, tiles: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
        return self.projector(self.vision(tiles, mean, std))

    def embed_patches(self, tiles: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
        return self.vision.embed_patches(tiles, mean, std)

    def adapt_patches(self, x_npw: jax.Array) -> jax.Array:
        return self.projector(self.vision.final_norm(x_npw))

    def norm_patches(self, x_npw: jax.Array) -> jax.Array:
        return self.vision.final_norm(x_npw)

    def pool_patches(self, x_npw: jax.Array) -> jax.Array:
        return self.vision.pool(self.vision.final_norm(x_npw))

    def merge(self, ids: jax.Array, image_index: jax.Array, features: jax.Array) -> jax.Array:
        """Text embeddings and image rows by one gather (DESIGN §4.7); see the function `merge`."""
        text = self.language.embed(ids)
        rows = features.shape[0] * features.shape[1]
        if rows == 0:
            return text
        special = jnp.stack([self.image_newline, self.view_seperator]).astype(self.dtype)
        table = jnp.concatenate([features.reshape(rows, -1).astype(self.dtype), special])
        index = jnp.where(image_index == NEWLINE_POSITION, rows, image_index)
        index = jnp.where(image_index == SEPARATOR_POSITION, rows + 1, index)
        image = jnp.take(table, jnp.maximum(index, 0), axis=0)
        return jnp.where((image_index == TEXT_POSITION)[..., None], text, image)

    def embed_tokens(self, ids: jax.Array) -> jax.Array:
        return self.language.embed(ids)

    def hidden(self, *args: Any, **kwargs: Any) -> tuple[jax.Array, Cache | None, list[Routing | None]]:
        return self.language.hidden(*args, **kwargs)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return self.language.logits(hidden)

    def __call__(self, ids: jax.Array, tiles: jax.Array) -> jax.Array:
        """Touches every parameter, for init; running goes through the functions below."""
        unit = jnp.ones(3, jnp.float32)
        self.adapt_tiles(tiles, unit, unit)
        return self.language(ids)


def _apply(params: Params, config: Config, method: str, *args: Any, **kwargs: Any) -> Any:
    dtype = kwargs.pop("dtype", None) or params["language"]["embed_tokens"].dtype
    return DeepSeekVL2(config, dtype).apply({"params": params}, *args, method=method, **kwargs)


def _init(config: Config, rng: jax.Array) -> Any:
    size = config.vision.image_size
    ids, tiles = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, size, size, 3), jnp.uint8)
    return DeepSeekVL2(config, jnp.float32).init(rng, ids, tiles)["params"]


def init_params(config: Config, rng: jax.Array, mesh: Mesh | None = None) -> Params:
    """Random float32 parameters, as a plain nested dict; on a mesh split as training splits them."""
    shardings = None if mesh is None else param_shardings(config, mesh, fsdp=True)
    return jax.jit(lambda rng: nn.unbox(_init(config, rng)), out_shardings=shardings)(rng)


def abstract_params(config: Config) -> tuple[Params, Params]:
    """(tree of `jax.ShapeDtypeStruct` in float32, tree of logical-axis tuples), nothing allocated."""
    boxed = jax.eval_shape(functools.partial(_init, config), jax.eval_shape(lambda: jax.random.key(0)))

    def is_box(leaf: Any) -> bool:
        return isinstance(leaf, nn.LogicallyPartitioned)

    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.value.shape, p.value.dtype), boxed, is_leaf=is_box)
    axes = jax.tree.map(lambda p: tuple(p.names), boxed, is_leaf=is_box)
    return shapes, axes


@functools.lru_cache(maxsize=8)
def abstract_leaves(config: Config) -> dict[tuple[str, ...], tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Path → (shape, logical axes) of every parameter."""
    shapes, axes = (flatten_dict(tree) for tree in abstract_params(config))
    return {path: (shapes[path].shape, axes[path]) for path in shapes}


def entry_axes(config: Config) -> dict[tuple[str, ...], int]:
    """Path → the axis of experts or heads that a mesh may split, of every parameter that has one."""
    names = ("expert", "heads", "kv_heads")
    leaves = abstract_leaves(config).items()
    return {path: axis for path, (_, axes) in leaves for axis, name in enumerate(axes) if name in names}


def param_shardings(config: Config, mesh: Mesh, *, fsdp: bool = False) -> dict[str, Any]:
    """A NamedSharding for every parameter, by `PARAM_RULES`; with ``fsdp`` by `split_further` too."""
    sizes = dict(mesh.shape)

    def sharding(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> NamedSharding:
        spec = partition_spec(shape, axes, sizes, PARAM_RULES)
        return NamedSharding(mesh, split_further(spec, shape, sizes) if fsdp else spec)

    return unflatten_dict({path: sharding(*leaf) for path, leaf in abstract_leaves(config).items()})


def encode_tiles(params: Params, config: Config, tiles: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """u8[N, S, S, 3] → [N, P, W], after the encoder's final norm. ``mean``, ``std``: f32[3]."""
    return _apply(params, config, "encode_tiles", tiles, mean, std)


def adapt_tiles(params: Params, config: Config, tiles: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """u8[N, S, S, 3] → [N, tokens per tile, D], after the adaptor. ``mean``, ``std``: f32[3]."""
    return _apply(params, config, "adapt_tiles", tiles, mean, std)


def embed_patches(params: Params, config: Config, tiles: jax.Array, mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """u8[N, S, S, 3] → [N, P, W], what the encoder's first block takes. ``mean``, ``std``: f32[3]."""
    return _apply(params, config, "embed_patches", tiles, mean, std)


def adapt_patches(params: Params, config: Config, x_npw: jax.Array) -> jax.Array:
    """[N, P, W] of the encoder's last block → [N, tokens per tile, D], through its final norm and the adaptor."""
    return _apply(params, config, "adapt_patches", x_npw)


def norm_patches(params: Params, config: Config, x_npw: jax.Array) -> jax.Array:
    """[N, P, W] of the encoder's last block → [N, P, W], through its final norm."""
    return _apply(params, config, "norm_patches", x_npw)


def pool_patches(params: Params, config: Config, x_npw: jax.Array) -> jax.Array:
    """[N, P, W] of the encoder's last block → [N, W], through its final norm and SigLIP's pooling head."""
    return _apply(params, config, "pool_patches", x_npw)


def merge(params: Params, config: Config, ids: jax.Array, image_index: jax.Array, features: jax.Array) -> jax.Array:
    """Embeds tokens and puts the image rows among them.

    Args:
      ids: i32[B, T].
      image_index: i32[B, T]; a code of `dsvl2_jax.model.config` (text, newline, separator), or a row of the flattened
        ``features``.
      features: [N, tokens per tile, D] of `adapt_tiles`; N = 0 for text only.

    Returns:
      [B, T, D].
    """
    return _apply(params, config, "merge", ids, image_index, features)


def embed_tokens(params: Params, config: Config, ids: jax.Array) -> jax.Array:
    """i32[...] token ids → [..., D]."""
    return _apply(params, config, "embed_tokens", ids)


def forward(
    params: Params, config: Config, embeddings: jax.Array, valid: jax.Array | None = None
) -> tuple[jax.Array, list[Routing | None]]:
    """A whole sequence without a cache, for training and for `logits`.

    Args:
      embeddings: [B, T, D]. valid: bool[B, T], False for padding at the right.

    Returns:
      [B, T, D] hidden states after the final norm, and each layer's routing.
    """
    b, t, _ = embeddings.shape
    positions = jnp.broadcast_to(jnp.arange(t), (b, t))
    hidden, _, routings = _apply(params, config, "hidden", embeddings, positions, valid)
    return hidden, routings


def output_logits(params: Params, config: Config, hidden: jax.Array) -> jax.Array:
    """[..., D] → f32[..., V]."""
    return _apply(params, config, "logits", hidden)


def prefill(
    params: Params,
    config: Config,
    embeddings: jax.Array,
    lengths: jax.Array,
    cache: Cache,
    start: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """Runs prompts, or one chunk of them, into the cache.

    Args:
      embeddings: [B, T, D], right-padded.
      lengths: i32[B], real tokens of each row in this call (0 … T).
      cache: see `dsvl2_jax.model.cache.init_cache`; an entry's index is its position. Needs a
        ``cache_length`` of start + T.
      start: i32[B], tokens already in the cache. None: nothing is, and the cache is not read.

    Returns:
      f32[B, V] logits after the last real token of each row (of no meaning where the length is 0),
      and the cache.
    """
    b, t, _ = embeddings.shape
    steps = jnp.broadcast_to(jnp.arange(t), (b, t))
    positions = steps if start is None else start[:, None] + steps
    valid = steps < lengths[:, None]
    hidden, cache, _ = _apply(
        params, config, "hidden", embeddings, positions, valid, cache, read_cache=start is not None
    )
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return _next_logits(params, config, last), cache


def _next_logits(params: Params, config: Config, hidden_bd: jax.Array) -> jax.Array:
    """[B, D] → f32[B, V], made where the output head's parts are, then whole rows, from which tokens are chosen."""
    logits = output_logits(params, config, constrain(hidden_bd, "decode_batch", "embed"))
    return constrain(constrain(logits, "decode_batch", "vocab"), "slots", "vocab")


def decode_step(
    params: Params, config: Config, tokens: jax.Array, positions: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """One token for every row.

    Args:
      tokens: i32[B]. positions: i32[B], the position in the cache that each token takes.
      cache: holds every earlier position.

    Returns:
      f32[B, V] logits of the next token, and the cache.
    """
    embeddings = embed_tokens(params, config, tokens[:, None])
    hidden, cache, _ = _apply(
        params, config, "hidden", embeddings, positions[:, None], None, cache, read_cache=True, decode=True
    )
    return _next_logits(params, config, hidden[:, 0]), cache
