"""Several adapters beside one base: joined once, and chosen row by row.

Of each weight the adapters' ranks lie side by side (`dsvl2_jax.model.weights.Adapted`), so that one product serves rows
with different adapters, and what a row gets depends on its own adapter alone.

Tested in tests/infer/test_adapters.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from dsvl2_jax.errors import UsageError
from dsvl2_jax.model.deepseek_vl2 import Params, compute_dtype
from dsvl2_jax.model.parameter_paths import LeafPath, path_name
from dsvl2_jax.model.weights import is_stored_weight

BASE = -1  # the number that stands for no adapter

_PICTURE_PARTS = frozenset({"vision", "projector"})
# Ranks are padded to a multiple: a product with one column is made by other code, to which a row's place may matter.
_RANK_STEP = 8
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
      adapted: name → the same parameters with that adapter alone, of `with_adapter`.

    Returns:
      The parameters, and the adapters, numbered in the order of ``adapted``.

    Raises:
      UsageError: an adapter brings whole weights along, among which rows cannot choose; or it has an infinite number or
        none in a number's place, which would spoil the sums of rows that do not want it.
    """
    names, trees = list(adapted), [_flat(one) for one in adapted.values()]
    flat, own = _flat(params), {}
    for path, base in flat.items():
        mine = {number: tree[path] for number, tree in enumerate(trees) if tree[path] is not base}
        for number, weight in mine.items():
            if not is_stored_weight(weight) or weight["base"] is not base:
                raise UsageError(
                    f"adapter {names[number]}: brings a whole {path_name(path)} along (modules_to_save), which answers "
                    "of several models would have to share. Merge it (dsvl2 merge), and serve the result alone."
                )
        if mine:
            own[path] = mine
    whole, is_finite = _joined(own, len(trees), compute_dtype(params))
    for (path, number), finite in is_finite.items():
        if not finite:
            raise UsageError(
                f"adapter {names[number]}: has what is no number (inf or nan) in {path_name(path)}; train it again, or "
                "leave it out."
            )
    parts = [{path[0] for path in own if number in own[path]} for number in range(len(trees))]
    of_pictures = frozenset(number for number, names in enumerate(parts) if names & _PICTURE_PARTS)
    of_text = frozenset(number for number, names in enumerate(parts) if names - _PICTURE_PARTS)
    new = {path: {"base": flat[path], **weight} for path, weight in whole.items()}
    return unflatten_dict(flat | new), Adapters(tuple(names), of_text, of_pictures)


def _flat(params: Params) -> dict[LeafPath, Any]:
    return flatten_dict(params, is_leaf=lambda _, value: is_stored_weight(value))


def _joined(
    own: Mapping[LeafPath, Mapping[int, Mapping[str, Any]]], count: int, dtype: jnp.dtype
) -> tuple[dict[LeafPath, dict[str, jax.Array]], dict[tuple[LeafPath, int], bool]]:
    """Weights with the ranks of all adapters, and whether all numbers of each part are finite.

    Args:
      own: path → number of an adapter → its weight there. count: of all adapters.
    """
    whole, is_finite = {}, {}
    for path, weights in own.items():
        first = next(iter(weights.values()))
        base = jax.tree.leaves(first["base"])[0]
        lead = first["lora_a"].ndim + first["lora_b"].ndim - 2 - base.ndim  # axes that count experts
        added = {n: {name: x for name, x in weight.items() if name != "base"} for n, weight in weights.items()}
        arrays, checks = _beside(added, lead, count, dtype)
        everywhere = base.sharding
        if isinstance(everywhere, NamedSharding):
            everywhere = NamedSharding(everywhere.mesh, PartitionSpec())
        # The ranks are on all devices; what else is split stays as it is.
        places = {"lora_a": first["lora_a"].sharding, "lora_b": first["lora_b"].sharding}
        whole[path] = {name: jax.device_put(x, places.get(name, everywhere)) for name, x in arrays.items()}
        is_finite |= {(path, number): check for number, check in checks.items()}
    return whole, {key: bool(finite) for key, finite in is_finite.items()}


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _beside(
    weights: Mapping[int, Mapping[str, Any]], lead: int, count: int, dtype: jnp.dtype
) -> tuple[dict[str, jax.Array], dict[int, jax.Array]]:
    """One weight with the ranks of those adapters that have it as a target; and whether their numbers are finite."""
    ranks = [weight["lora_a"].shape[-1] for weight in weights.values()]
    padding = -sum(ranks) % _RANK_STEP

    def beside(name: str, axis: int) -> jax.Array:
        whole = jnp.concatenate([weight[name].astype(dtype) for weight in weights.values()], axis)
        widths = [(0, 0)] * whole.ndim
        widths[axis] = (0, padding)
        return jnp.pad(whole, widths)

    owner = np.repeat([*weights, _NOBODY], [*ranks, padding])
    out = {"lora_a": beside("lora_a", -1), "lora_b": beside("lora_b", lead), "owner": jnp.asarray(owner, jnp.int32)}
    gains = {number: weight["gain"].astype(dtype) for number, weight in weights.items() if "gain" in weight}
    if gains:
        one = jnp.ones_like(next(iter(gains.values())))
        out["gain"] = jnp.stack([gains.get(number, one) for number in (*range(count), BASE)])
    checks = {n: jnp.stack([jnp.isfinite(x).all() for x in weight.values()]).all() for n, weight in weights.items()}
    return out, checks
