"""DeepSeek-VL2 (arXiv 2412.10302): its parameters, and the pure functions that run it.

Parameters are a plain nested dict; `abstract_params` gives their shapes and logical axes without
allocating anything. The functions are jittable, with ``config`` static; under `jax.set_mesh` they
run sharded by the tables of `dsvl2_jax.sharding`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike, DTypeLike

from dsvl2_jax.model import vision
from dsvl2_jax.model.adaptor import Adaptor
from dsvl2_jax.model.config import NEWLINE_POSITION, SEPARATOR_POSITION, TEXT_POSITION, Config
from dsvl2_jax.model.decoder import Cache, Decoder, decoder, hidden_states
from dsvl2_jax.model.layer_runs import LayerWrapper
from dsvl2_jax.model.layers import WeightBox, declare
from dsvl2_jax.sharding import PARAM_RULES, add_fsdp_axis, constrain, partition_spec

Params = dict[str, Any]


class DeepSeekVL2(nn.Module):
    """Declares the parameters of encoder, adaptor, the two learned image tokens and decoder.

    The functions below run them.
    """

    config: Config
    dtype: DTypeLike

    def setup(self) -> None:
        cfg = self.config
        self.vision = vision.VisionEncoder(cfg.vision, self.dtype)
        self.projector = Adaptor(cfg.projector, self.dtype)
        self.language = Decoder(cfg.language, self.dtype)
        width = cfg.language.hidden_size
        for name in ("image_newline", "view_seperator"):  # spelled as in the released checkpoints
            declare(self, name, (width,), ("embed",), nn.initializers.normal(width**-0.5))

    def __call__(self, ids: jax.Array, tiles: jax.Array) -> None:
        """Declares every parameter, for init."""
        unit = jnp.ones(3, jnp.float32)
        self.projector(self.vision(tiles, unit, unit))
        self.language(ids)


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
    boxed = _boxed(config)
    shapes = {path: jax.ShapeDtypeStruct(box.value.shape, box.value.dtype) for path, box in boxed.items()}
    return unflatten_dict(shapes), unflatten_dict({path: tuple(box.names) for path, box in boxed.items()})


@functools.lru_cache(maxsize=8)
def _boxed(config: Config) -> dict[tuple[str, ...], nn.LogicallyPartitioned]:
    """Path → box of an abstract array, as every parameter was declared.

    One layer of each kind is traced, and stands for all of its kind.
    """
    language = config.language
    kinds = [language.is_moe_layer(i) for i in range(language.num_hidden_layers)]
    first = {kind: kinds.index(kind) for kind in kinds}
    short = dataclasses.replace(
        config,
        language=dataclasses.replace(language, num_hidden_layers=max(first.values()) + 1),
        vision=dataclasses.replace(config.vision, layers=1),
    )
    boxed = jax.eval_shape(functools.partial(_init, short), jax.eval_shape(lambda: jax.random.key(0)))
    decoder_tree, encoder_tree = boxed["language"], boxed["vision"]
    decoder_tree |= {f"layers_{i}": decoder_tree[f"layers_{first[kind]}"] for i, kind in enumerate(kinds)}
    encoder_tree |= {f"blocks_{i}": encoder_tree["blocks_0"] for i in range(config.vision.layers)}
    return flatten_dict(boxed)


@functools.lru_cache(maxsize=8)
def abstract_leaves(config: Config) -> dict[tuple[str, ...], tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Path → (shape, logical axes) of every parameter."""
    return {path: (box.value.shape, tuple(box.names)) for path, box in _boxed(config).items()}


@functools.lru_cache(maxsize=8)
def weight_inputs(config: Config) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path → the axes that products contract, of every weight that may be quantized or have an adapter.

    They are the first ones after that of the experts, or the last one alone: see `declare`.
    """
    found = {}
    for path, box in _boxed(config).items():
        if isinstance(box, WeightBox):
            first = 1 if box.names[0] == "expert" else 0
            is_last = box.inputs == box.value.ndim - 1
            found[path] = (box.inputs,) if is_last else tuple(range(first, box.inputs + 1))
    return found


def entry_axes(config: Config) -> dict[tuple[str, ...], int]:
    """Path → the axis of experts or heads that a mesh may split, of every parameter that has one."""
    names = ("expert", "heads", "kv_heads")
    leaves = abstract_leaves(config).items()
    return {path: axis for path, (_, axes) in leaves for axis, name in enumerate(axes) if name in names}


def param_shardings(config: Config, mesh: Mesh, *, fsdp: bool = False) -> dict[str, Any]:
    """A NamedSharding for every parameter, by `PARAM_RULES`; with ``fsdp`` by `add_fsdp_axis` too."""
    sizes = dict(mesh.shape)

    def sharding(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> NamedSharding:
        spec = partition_spec(shape, axes, sizes, PARAM_RULES)
        return NamedSharding(mesh, add_fsdp_axis(spec, shape, sizes) if fsdp else spec)

    return unflatten_dict({path: sharding(*leaf) for path, leaf in abstract_leaves(config).items()})


def compute_dtype(params: Params) -> jnp.dtype:
    """In which the model computes: the dtype of its embeddings. The router alone computes in float32 always."""
    return params["language"]["embed_tokens"].dtype


def encode_tiles(
    params: Params,
    config: Config,
    tiles: jax.Array,
    mean: ArrayLike,
    std: ArrayLike,
    *,
    wrap: LayerWrapper | None = None,
) -> jax.Array:
    """u8[N, side, side, 3] → [N, P, W], the encoder's features after its final norm; see `adapt_tiles`."""
    dtype = compute_dtype(params)
    return vision.encode_tiles(params["vision"], config.vision, tiles, mean, std, dtype=dtype, wrap=wrap)


def pool_patches(params: Params, config: Config, x_npw: jax.Array) -> jax.Array:
    """[N, P, W] of `encode_tiles` → [N, W], by SigLIP's pooling head."""
    return vision.encoder(params["vision"], config.vision, compute_dtype(params)).pool(x_npw)


def adapt_tiles(
    params: Params,
    config: Config,
    tiles: jax.Array,
    mean: ArrayLike,
    std: ArrayLike,
    *,
    wrap: LayerWrapper | None = None,
) -> jax.Array:
    """Encodes tiles, and adapts their features to the language model.

    Args:
      params: of the whole model, nested.
      config: static.
      tiles: u8[N, side, side, 3] of the processor, ``side`` being ``config.vision.image_size``.
      mean, std: f32[3], of the processor's configuration; a pixel enters as (value / 255 − mean) / std.
      wrap: changes how layers are run, in training; see `dsvl2_jax.model.layer_runs.run_layers`.

    Returns:
      [N, ``config.tokens_per_tile``, D] in the dtype of the parameters, which `merge` takes.
    """
    x_npw = encode_tiles(params, config, tiles, mean, std, wrap=wrap)
    adaptor = Adaptor(config.projector, compute_dtype(params))
    with jax.named_scope("projector"):
        return adaptor.apply({"params": params["projector"]}, x_npw)


def merge(params: Params, config: Config, ids: jax.Array, image_index: jax.Array, features: jax.Array) -> jax.Array:
    """Embeds tokens and puts the image rows among them, by one gather.

    Args:
      params: of the whole model, nested.
      config: static.
      ids: i32[B, T].
      image_index: i32[B, T], of the processor: a code of `dsvl2_jax.model.config` (text, newline, separator), or a
        row of the flattened ``features``.
      features: [N, tokens per tile, D] of `adapt_tiles`; N = 0 for text only.

    Returns:
      [B, T, D] embeddings, which `prefill` takes.
    """
    text_btd = embed_tokens(params, config, ids)
    rows = features.shape[0] * features.shape[1]
    if rows == 0:
        return text_btd
    with jax.named_scope("merge"):
        dtype = compute_dtype(params)
        special = jnp.stack([params["image_newline"], params["view_seperator"]]).astype(dtype)
        table = jnp.concatenate([features.reshape(rows, -1).astype(dtype), special])
        index = jnp.where(image_index == NEWLINE_POSITION, rows, image_index)
        index = jnp.where(index == SEPARATOR_POSITION, rows + 1, index)
        image_btd = jnp.take(table, jnp.maximum(index, 0), axis=0)
        return jnp.where((image_index == TEXT_POSITION)[..., None], text_btd, image_btd)


def embed_tokens(params: Params, config: Config, ids: jax.Array) -> jax.Array:
    """i32[...] token ids → [..., D]."""
    return decoder(params["language"], config.language).embed(ids)


def forward(params: Params, config: Config, x_btd: jax.Array, valid_bt: jax.Array | None = None) -> jax.Array:
    """A whole sequence without a cache.

    Args:
      x_btd: [B, T, D] embeddings.
      valid_bt: bool[B, T], False for padding at the right; None: no padding.

    Returns:
      [B, T, D] hidden states after the final norm, which `output_logits` takes.
    """
    positions_bt = jnp.broadcast_to(jnp.arange(x_btd.shape[1]), x_btd.shape[:2])
    return hidden_states(params["language"], config.language, x_btd, positions_bt, valid_bt)[0]


def output_logits(params: Params, config: Config, hidden: jax.Array) -> jax.Array:
    """[..., D] → f32[..., V]."""
    return decoder(params["language"], config.language).logits(hidden)


def prefill(
    params: Params,
    config: Config,
    embeddings: jax.Array,
    lengths: jax.Array,
    cache: Cache,
    start: jax.Array | None = None,
    totals: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """Runs prompts, or one chunk of them, into the cache.

    Args:
      params: of the whole model, nested.
      config: static.
      embeddings: [B, T, D] of `merge`, right-padded.
      lengths: i32[B], real tokens of each row in this call (0 … T).
      cache: of `dsvl2_jax.model.cache.init_cache`, with B slots and a length of at least start + T.
      start: i32[B], tokens already in the cache. None: nothing is, and the cache is not read.
      totals: i32[B], tokens of each row's whole prompt, of which "dynamic" positions depend; None: it ends here.

    Returns:
      f32[B, V] logits after the last real token of each row (of no meaning where the length is 0),
      and the cache.
    """
    steps = jnp.broadcast_to(jnp.arange(embeddings.shape[1]), embeddings.shape[:2])
    positions_bt = steps if start is None else start[:, None] + steps
    valid_bt = steps < lengths[:, None]
    if totals is None:
        totals = lengths if start is None else start + lengths
    how = {"cache": cache, "read_cache": start is not None, "lengths_b": totals}
    language = params["language"], config.language
    hidden_btd, cache, _ = hidden_states(*language, embeddings, positions_bt, valid_bt, **how)
    last_bd = jnp.take_along_axis(hidden_btd, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return _next_logits(params, config, last_bd), cache


def _next_logits(params: Params, config: Config, hidden: jax.Array) -> jax.Array:
    """[B, ..., D] → f32[B, ..., V], made where the output head's parts are, then whole rows, to choose tokens from."""
    between = (None,) * (hidden.ndim - 2)
    logits = output_logits(params, config, constrain(hidden, "decode_batch", *between, "embed"))
    return constrain(constrain(logits, "decode_batch", *between, "vocab"), "slots", *between, "vocab")


def decode_step(
    params: Params,
    config: Config,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Cache,
    active: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """One token for every row.

    Args:
      params: of the whole model, nested.
      config: static.
      tokens: i32[B].
      positions: i32[B], the position in the cache that each token takes.
      cache: holds every earlier position.
      active: bool[B], False for rows whose result does not count: they visit no expert. None: all rows count.

    Returns:
      f32[B, V] logits of the next token, and the cache.
    """
    valid_bt = None if active is None else active[:, None]
    logits_btv, cache = decode_tokens(params, config, tokens[:, None], positions, cache, valid_bt)
    return logits_btv[:, 0], cache


def decode_tokens(
    params: Params,
    config: Config,
    tokens_bt: jax.Array,
    positions_b: jax.Array,
    cache: Cache,
    valid_bt: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """The newest token of every row, and drafts of those that may follow: one pass over the weights for all of them.

    Args:
      params: of the whole model, nested.
      config: static.
      tokens_bt: i32[B, T].
      positions_b: i32[B], the position in the cache that each row's first token takes; the others follow. Entries of
        drafts that turn out wrong need not be removed: nothing sees them before they are overwritten.
      cache: holds every earlier position.
      valid_bt: bool[B, T], False where the result does not count: such tokens visit no expert. None: all count.

    Returns:
      f32[B, T, V], the logits after each token, and the cache.
    """
    hidden_btd, cache, _ = hidden_states(
        params["language"],
        config.language,
        embed_tokens(params, config, tokens_bt),
        positions_b[:, None] + jnp.arange(tokens_bt.shape[1]),
        valid_bt,
        cache=cache,
        read_cache=True,
        decode=True,
    )
    return _next_logits(params, config, hidden_btd), cache
