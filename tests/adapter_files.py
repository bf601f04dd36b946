"""Adapters of random numbers as files, for the tests of several modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from dsvl2_jax.checkpoint import rules
from dsvl2_jax.checkpoint.adapters import AdapterSettings, array_shapes, write_adapter
from dsvl2_jax.model.config import Config


def random_arrays(config: Config, settings: AdapterSettings, names: str = "") -> dict[str, Any]:
    """For every parameter that can have an adapter, or those that have ``names`` in theirs; they change much."""
    rng = np.random.default_rng(0)
    arrays = {}
    for leaf in rules.linear_leaves(config).values():
        for part, shape in array_shapes(leaf, settings.rank_of(leaf.name)).items():
            if names in leaf.name and (part != "magnitude" or settings.kind == "dora"):
                scale = rng.normal(0, 0.1, shape) + (part == "magnitude")
                arrays[*leaf.path, part] = scale.astype(np.float32)
    return unflatten_dict(arrays)


def random_adapter(directory: Path, config: Config, settings: AdapterSettings, names: str = "") -> Path:
    """`random_arrays`, written; returns the directory."""
    write_adapter(directory, config, random_arrays(config, settings, names), settings)
    return directory
