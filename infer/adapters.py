"""Several adapters beside one base: joined once, and chosen row by row.

Of each weight the adapters' ranks lie side by side (`dsvl2_jax.model.weights.Adapted`), so that one product serves rows
with different adapters, and what a row gets depends on its own adapter alone.

Tested in tests/infer/test_adapters.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsvl2_jax.errors import UsageError
from dsvl2_jax.kernels.quantized import KINDS
from dsvl2_jax.model.deepseek_vl2 import Params, compute_dtype
from dsvl2_jax.model.weights import is_stored_weight

BASE = -1  # the number that stands for no adapter

_PICTURE_PARTS = frozenset({"vision", "projector"})
_RANK_STEP = 8  # ranks are padded to a multiple: products with few columns are computed by other code on some devices
_NOBODY = -2  # whose the padding is


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Which adapters a model has, by number.

    Attributes:
      names: of each.
      of_text: numbers of those that change the decoder. of_pictures: of those that change the encoder or its adaptor.
    """

    names: tuple[str, ...]
    of_text: frozenset[int]
    of_pictures: frozenset[int]

    def number(self, name: str | None) -> int:
        """Of a name; None: `BASE`. Raises UsageError for one that there is not."""
        if name is None:
            return BASE
        if name not in self.names:
            raise UsageError(f"adapter: found {name!r}, expected one of {', '.join(self.names)}, or None for the base.")
        return self.names.index(name)

    def text_key(self, number: int) -> bytes:
        """The same for adapters of which the decoder's keys and values are the same, given the same embeddings."""
        return _key(number if number in self.of_text else BASE)

    def picture_key(self, number: int) -> bytes:
        """The same for adapters of which a picture's features are the same."""
        return _key(number if number in self.of_pictures else BASE)


def _key(number: int) -> bytes:
    return b"" if number == BASE else number.to_bytes(4, "big")


def side_by_side(params: Params, adapted: Mapping[str, Params]) -> tuple[Params, Adapters]:
    """Parameters that hold several adapters, for rows to choose from (`dsvl2_jax.model.weights.for_rows`).

    Args:
      params: of the base, nested.
      adapted: name → the same parameters with that adapter alone; where it has no target they are the base's own.

    Returns:
      The parameters, and the adapters, numbered in the order of ``adapted``.

    Raises:
      UsageError: an adapter has a number that is none, which would spoil the sums of rows that do not want it.
    """
    parts: dict[int, set[str]] = {number: set() for number in range(len(adapted))}
    dtype = compute_dtype(params)

    def joined(base: Any, others: list[Any], path: tuple[str, ...]) -> Any:
        own = {n: other for n, other in enumerate(others) if isinstance(other, Mapping) and "base" in other}
        if own:
            for number in own:
                parts[number].add(path[0])
            return _joined_weight(base, own, len(others), dtype)
        if not isinstance(base, Mapping) or is_stored_weight(base):
            return base
        return {name: joined(base[name], [other[name] for other in others], (*path, name)) for name in base}

    for name, one in adapted.items():
        _check_numbers(name, one)
    whole = joined(params, list(adapted.values()), ())
    of_pictures = frozenset(n for n, names in parts.items() if names & _PICTURE_PARTS)
    of_text = frozenset(n for n, names in parts.items() if names - _PICTURE_PARTS)
    return whole, Adapters(tuple(adapted), of_text, of_pictures)


def _joined_weight(base: Any, own: dict[int, Mapping[str, Any]], count: int, dtype: Any) -> dict[str, Any]:
    """One weight with the ranks of those adapters, of ``count``, that have it as a target."""
    stored = next(base[kind] for kind in KINDS if kind in base) if isinstance(base, Mapping) else base
    first = next(iter(own.values()))
    lead = first["lora_a"].ndim + first["lora_b"].ndim - 2 - stored.ndim  # axes that count experts
    ranks = [weight["lora_a"].shape[-1] for weight in own.values()]
    padding = -sum(ranks) % _RANK_STEP
    owner = np.repeat([*own, _NOBODY], [*ranks, padding]).astype(np.int32)

    def beside(name: str, axis: int) -> jax.Array:
        arrays = [weight[name].astype(dtype) for weight in own.values()]
        widths = [(0, padding if i == axis % arrays[0].ndim else 0) for i in range(arrays[0].ndim)]
        whole = jnp.pad(jnp.concatenate(arrays, axis), widths)
        # The ranks are on all devices; what else is split stays as it is.
        is_split = isinstance(stored.sharding, NamedSharding)
        return jax.device_put(whole, arrays[0].sharding if is_split else stored.sharding)

    weight = {"base": base, "lora_a": beside("lora_a", -1), "lora_b": beside("lora_b", lead)}
    gains = {number: one["gain"] for number, one in own.items() if "gain" in one}
    if gains:
        one = jnp.ones_like(next(iter(gains.values())))
        weight["gain"] = _everywhere(
            jnp.stack([gains.get(number, one) for number in (*range(count), BASE)]).astype(dtype), stored
        )
    return weight | {"owner": _everywhere(owner, stored)}


def _everywhere(array: Any, like: jax.Array) -> jax.Array:
    """The array whole on each device that ``like`` is on."""
    sharding = like.sharding
    return jax.device_put(
        array, NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
    )


def _check_numbers(name: str, params: Any, path: tuple[str, ...] = ()) -> None:
    if not isinstance(params, Mapping):
        return
    if "base" not in params:
        for key, value in params.items():
            _check_numbers(name, value, (*path, key))
        return
    for key in ("lora_a", "lora_b", "gain"):
        if key in params and not jnp.isfinite(params[key]).all():
            raise UsageError(
                f"adapter {name}: {'/'.join(path)} has numbers that are none (inf or nan) in {key}; train it again, or "
                "leave this adapter out."
            )
