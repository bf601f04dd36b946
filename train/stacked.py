"""Layers as separate arrays (on disk, for inference) and stacked (for training).

A run of two or more consecutive layers of the same kind becomes one entry, ``layers_1_to_11``, whose arrays have
a leading axis of layers. Layers of a kind of their own (the dense first one) stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from dsvl2_jax.model.config import Config
from dsvl2_jax.model.layer_runs import layer_runs
from dsvl2_jax.model.parameter_paths import LeafPath


def stacked_paths(config: Config, paths: Iterable[LeafPath], *, stack: bool = True) -> dict[LeafPath, list[LeafPath]]:
    """Stacked leaf path → the paths of the separate leaves that it holds, in order of layers."""
    run_of = {
        (part, member): (run.name, index)
        for part, runs in layer_runs(config, stack=stack).items()
        for run in runs
        for index, member in enumerate(run.members())
    }
    out: dict[LeafPath, list[LeafPath]] = {}
    for path in sorted(paths, key=lambda path: run_of.get(path[:2], ("", 0))[1]):
        name, _ = run_of.get(path[:2], (None, 0))
        out.setdefault(path if name is None else (path[0], name, *path[2:]), []).append(path)
    return out


def stack_layers(leaves: Mapping[LeafPath, jax.Array], config: Config, *, stack: bool = True) -> dict:
    """Flat separate leaves → flat stacked ones. Of a run, either all layers of a leaf are given or none."""
    groups = stacked_paths(config, leaves, stack=stack)
    return {
        path: leaves[path] if members == [path] else jnp.stack([leaves[member] for member in members])
        for path, members in groups.items()
    }


def unstack_layers(leaves: Mapping[LeafPath, jax.Array], config: Config, *, stack: bool = True) -> dict:
    """The inverse of `stack_layers`."""
    runs = {(part, run.name): run for part, part_runs in layer_runs(config, stack=stack).items() for run in part_runs}
    out: dict[LeafPath, jax.Array] = {}
    for path, leaf in leaves.items():
        run = runs.get(path[:2])
        if run is None or not run.stacked:
            out[path] = leaf
        else:
            out |= {(path[0], member, *path[2:]): leaf[i] for i, member in enumerate(run.members())}
    return out
