"""The language model: embeddings, decoder layers, final norm and output head (DeepSeek-V2, arXiv 2405.04434).

Tested in tests/model/test_transformers.py and tests/model/test_deepseek_vl2.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from dsvl2_jax.kernels.cpu import take_rows
from dsvl2_jax.model import gpu_decode
from dsvl2_jax.model.attention import LatentAttention, LayerCache, MultiHeadAttention
from dsvl2_jax.model.config import LanguageConfig
from dsvl2_jax.model.layer_runs import LayerWrapper, language_runs, run_layers
from dsvl2_jax.model.layers import GatedMLP, Linear, RMSNorm, declare
from dsvl2_jax.model.moe import MoE, Routing
from dsvl2_jax.model.rotary import sequence_lengths
from dsvl2_jax.sharding import batch_axis, constrain

Cache = list[LayerCache]


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    config: LanguageConfig
    layer: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x_btd: jax.Array,
        positions_bt: jax.Array,
        valid_bt: jax.Array | None,
        cache: LayerCache | None,
        *,
        read_cache: bool = False,
        decode: bool = False,
        lengths_bt: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None, Routing | None]:
        """As `hidden_states`, of one layer; the routing is None in a dense layer."""
        cfg, batch = self.config, batch_axis(decode)
        attention = LatentAttention if cfg.use_mla else MultiHeadAttention
        normed = RMSNorm(cfg.rms_norm_eps, name="input_layernorm")(x_btd)
        attended, cache = attention(cfg, self.dtype, name="self_attn")(
            normed, positions_bt, cache, read_cache=read_cache, decode=decode, lengths_bt=lengths_bt
        )
        x_btd = constrain(x_btd + attended, batch, "length", "embed")
        normed = RMSNorm(cfg.rms_norm_eps, name="post_attention_layernorm")(x_btd)
        routing = None
        if cfg.is_moe_layer(self.layer):
            fed, routing = MoE(cfg, self.dtype, name="mlp")(normed, valid_bt, decode=decode)
        else:
            mlp = GatedMLP(cfg.intermediate_size, self.dtype, cfg.initializer_range, name="mlp")
            fed = mlp(normed, decode=decode)
        return constrain(x_btd + fed, batch, "length", "embed"), cache, routing


class Decoder(nn.Module):
    """The decoder's parameters, and what comes before and after its layers; `hidden_states` runs the layers.

    Tokens enter as embeddings, so that images can be merged among them.
    """

    config: LanguageConfig
    dtype: DTypeLike

    def setup(self) -> None:
        cfg = self.config
        init, axes = nn.initializers.normal(cfg.initializer_range), ("vocab", "embed")
        self.embed_tokens = declare(self, "embed_tokens", (cfg.vocab_size, cfg.hidden_size), axes, init)
        self.layers = [DecoderLayer(cfg, i, self.dtype) for i in range(cfg.num_hidden_layers)]
        self.norm = RMSNorm(cfg.rms_norm_eps)
        self.lm_head = Linear(cfg.vocab_size, ("embed", "vocab"), self.dtype, cfg.initializer_range)

    def embed(self, ids: jax.Array) -> jax.Array:
        """i32[...] token ids → [..., D]."""
        with jax.named_scope("embed_tokens"):
            return take_rows(self.embed_tokens.astype(self.dtype), ids)

    def final_norm(self, x_btd: jax.Array) -> jax.Array:
        """[B, T, D] of the last layer → [B, T, D], what the head takes."""
        return self.norm(x_btd)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] of `final_norm` → f32[..., V]."""
        return self.lm_head(hidden).astype(jnp.float32)

    def __call__(self, ids_bt: jax.Array) -> jax.Array:
        """Declares every parameter, for init."""
        x_btd, positions_bt = self.embed(ids_bt), jnp.zeros(ids_bt.shape, jnp.int32)
        for layer in self.layers:
            x_btd, _, _ = layer(x_btd, positions_bt, None, None)
        return self.logits(self.final_norm(x_btd))


def decoder(params: dict[str, Any], config: LanguageConfig) -> Decoder:
    """The decoder with its parameters; it computes in the dtype of its embeddings."""
    return Decoder(config, params["embed_tokens"].dtype).bind({"params": params})


def _gpu_layer(config: LanguageConfig, positions_bt: jax.Array, valid_bt: jax.Array | None) -> Callable:
    """A decode step's layer by `gpu_decode`: (parameters, [B, 1, D], cache) → ([B, 1, D], cache)."""
    positions_b = positions_bt[:, 0].astype(jnp.int32)
    active_b = jnp.ones_like(positions_b) if valid_bt is None else valid_bt[:, 0].astype(jnp.int32)
    rotary = gpu_decode.rotary_of(config, positions_b)

    def layer(params: Any, x_btd: jax.Array, cache: LayerCache, *, moe: bool) -> tuple[jax.Array, LayerCache]:
        step = positions_b, active_b, rotary
        x_bd, cache = gpu_decode.decode_layer(params, config, x_btd[:, 0], *step, cache, moe=moe)
        return x_bd[:, None], cache

    return layer


def hidden_states(
    params: dict[str, Any],
    config: LanguageConfig,
    x_btd: jax.Array,
    positions_bt: jax.Array,
    valid_bt: jax.Array | None = None,
    *,
    cache: Cache | None = None,
    read_cache: bool = False,
    decode: bool = False,
    lengths_b: jax.Array | None = None,
    report: Callable[[Routing], Any] | None = None,
    wrap: LayerWrapper | None = None,
) -> tuple[jax.Array, Cache | None, list[Any]]:
    """All layers and the final norm, in inference and in training.

    Args:
      params: of the decoder, its layers separate or, without a cache, stacked (`dsvl2_jax.model.layer_runs`).
      x_btd: [B, T, D] embeddings.
      positions_bt: i32[B, T], consecutive in each row; without a cache, in each sample of a row.
      valid_bt: bool[B, T], False for padding; None: no padding.
      cache: one dict per layer (see `dsvl2_jax.model.attention`), or None.
      read_cache, decode: static; see `LatentAttention`.
      lengths_b: i32[B], tokens of each row's whole prompt, for positions that scale with it; None: those of each
        sample without a cache, and those up to the token itself in a decode step.
      report: of each MoE layer's routing, what to return of it; None: nothing.
      wrap: see `run_layers`.

    Returns:
      [B, T, D] hidden states, the updated cache, and for each run of MoE layers the reports, stacked over its layers.
    """
    x_btd = constrain(x_btd, batch_axis(decode), "length", "embed")
    fused = decode and report is None and x_btd.shape[1] == 1
    if fused:
        dtype, cache_dtypes = params["embed_tokens"].dtype, [array.dtype for array in jax.tree.leaves(cache)]
        fused = gpu_decode.is_supported(config, len(x_btd), dtype, cache_dtypes)
        fused = fused and gpu_decode.reads_layers(params, config)
    on_gpu = _gpu_layer(config, positions_bt, valid_bt) if fused else None
    lengths_bt = sequence_lengths(config, positions_bt, lengths_b, decode=decode)
    new_cache, reports = [], []
    for run in language_runs(config):
        module = DecoderLayer(config, run.first, params["embed_tokens"].dtype)

        def modules(
            layer_params: Any, x: jax.Array, layer_cache: Any, module: DecoderLayer = module
        ) -> tuple[jax.Array, Any, Any]:
            arrays = x, positions_bt, valid_bt, layer_cache
            how = {"read_cache": read_cache, "decode": decode, "lengths_bt": lengths_bt}
            x, layer_cache, routing = module.apply({"params": layer_params}, *arrays, **how)
            return x, layer_cache, None if routing is None or report is None else report(routing)

        def layer(x: jax.Array, layer_params: Any, layer_cache: Any, modules=modules, run=run):
            if not fused:
                return modules(layer_params, x, layer_cache)
            moe = config.is_moe_layer(run.first)
            arrays = layer_params, x, layer_cache
            x, layer_cache = lax.platform_dependent(
                *arrays, cuda=functools.partial(on_gpu, moe=moe), default=lambda *arrays: modules(*arrays)[:2]
            )
            return x, layer_cache, None

        run_cache = None if cache is None else cache[run.first : run.last + 1]
        x_btd, run_cache, run_report = run_layers(run, params, layer, x_btd, states=run_cache, wrap=wrap)
        new_cache += run_cache
        if run_report is not None:
            reports.append(run_report)
    hidden_btd = decoder(params, config).final_norm(x_btd)
    return hidden_btd, None if cache is None else new_cache, reports
