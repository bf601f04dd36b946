"""cos and sin of rotary positions, scaled or not; `dsvl2_jax.model.layers` rotates with them.

Tested in tests/model/test_rotary.py against transformers' modules.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsvl2_jax.model.config import LanguageConfig


def rotary_tables(
    config: LanguageConfig, positions: jax.Array, lengths: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, f32[..., width/2], kept in float32 whatever the model's dtype.

    Args:
      positions: i32[...].
      lengths: i32[...], tokens of the sequence that each position is of, as of `sequence_lengths`; None: none is longer
        than ``max_position_embeddings``.
    """
    frequencies = jnp.asarray(config.inverse_frequencies)  # made on the host, and a constant of the program
    if _is_dynamic(config) and lengths is not None:
        frequencies = _dynamic(config, frequencies, lengths)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    factor = 1.0 if config.rope_scaling is None else config.rope_scaling.rotary_factor
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def _is_dynamic(config: LanguageConfig) -> bool:
    return config.rope_scaling is not None and config.rope_scaling.kind == "dynamic"


def _dynamic(config: LanguageConfig, frequencies: jax.Array, lengths: jax.Array) -> jax.Array:
    """f32[..., width/2] of sequences of some lengths: longer ones than the context have a larger base."""
    width, context, factor = config.rotary_width, config.max_position_embeddings, config.rope_scaling.factor
    stretch = factor * lengths.astype(jnp.float32) / context - (factor - 1)
    base = config.rope_theta * jnp.maximum(stretch, 1.0) ** (width / (width - 2))
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return jnp.where((lengths > context)[..., None], 1 / base[..., None] ** exponents, frequencies)


def sequence_lengths(
    config: LanguageConfig, positions_bt: jax.Array, totals_b: jax.Array | None, *, decode: bool
) -> jax.Array | None:
    """The lengths that "dynamic" positions go by; None where nothing depends on them.

    With a cache that is what the official code does, for each row on its own: a prompt's positions go by its length, a
    later token by its own position, and what is in the cache keeps its rotation. It does not depend on chunks.

    Args:
      positions_bt: i32[B, T], consecutive in each row or, without ``totals_b`` and ``decode``, in each sample of it.
      totals_b: i32[B], tokens of each row's prompt.
      decode: static; a decode step.

    Returns:
      i32[B, T].
    """
    if not _is_dynamic(config):
        return None
    if decode:
        return positions_bt + 1
    if totals_b is not None:
        return jnp.broadcast_to(totals_b[:, None], positions_bt.shape)
    length = positions_bt.shape[1]
    index_bt = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), positions_bt.shape)
    ends_bt = jnp.where(jnp.pad(positions_bt[:, 1:], ((0, 0), (0, 1))) == 0, index_bt + 1, length)
    return lax.cummin(ends_bt, axis=1, reverse=True) - index_bt + positions_bt
