"""Adapters as files, in the layout of the `peft` package: adapter_config.json and adapter_model.safetensors.

Tensors have the released names of the modules that they are added to (``base_model.model.MODULE.lora_A.weight``
[r, in], ``….lora_B.weight`` [out, r], ``….lora_magnitude_vector`` [out]); each routed expert has its own. In memory an
adapter is a nested dict like the parameters, with a dict of arrays in the place of each weight that it is added to:
``lora_a`` [*lead, *inputs, R], ``lora_b`` [*lead, R, *outputs] and of DoRA ``magnitude`` [*lead, *outputs], where
``lead`` is the axis of experts, if there is one. `dsvl2_jax.checkpoint.rules` says which axes are which.

Tested in tests/checkpoint/test_adapters.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from dsvl2_jax.checkpoint import digests, peft_config, pytorch_file, rules, safetensors_file
from dsvl2_jax.checkpoint.adapter_tensors import place, scale_factor
from dsvl2_jax.checkpoint.leaves import leaf_bytes
from dsvl2_jax.checkpoint.locate import find_adapter
from dsvl2_jax.checkpoint.peft_config import CONFIG_NAME
from dsvl2_jax.checkpoint.safetensors_file import Tensor
from dsvl2_jax.checkpoint.staging import staged
from dsvl2_jax.checkpoint.verify import tell
from dsvl2_jax.errors import CheckpointError, UsageError
from dsvl2_jax.json_files import read_json_object, read_text
from dsvl2_jax.messages import listed
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.parameter_paths import LeafPath, path_name

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
MANIFEST_NAME = "dsvl2_adapter.json"  # beside them, of adapters written here: what peft has no keys for, and digests
MANIFEST_VERSION = 1

_PREFIX = "base_model.model."
_ADVICE = f"Copy the adapter again, or remove {MANIFEST_NAME} if you changed the adapter on purpose."

# A nested dict of the parameters that have an adapter; see the module's text.
Adapter = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """What an adapter is, beyond its arrays.

    Attributes:
      kind: "lora" (arXiv 2106.09685), or "dora", which has magnitudes too (arXiv 2402.09353).
      rank: of every parameter that is not in ``ranks``.
      alpha: lora_a · lora_b is multiplied by alpha / rank, or alpha / √rank with ``rslora``; see `factor`.
      dropout: of what enters lora_a, in training; from 0 to below 1.
      targets: the regular expression over parameters' names by which it was made; empty if that is not known.
      rslora: rank-stabilized (arXiv 2312.03732).
      base: the checkpoint that it was trained on, as its user called it; empty if that is not known.
      base_digest: of that checkpoint, by `dsvl2_jax.checkpoint.apply_adapter.base_digest`; None if it is not known.
      ranks, alphas: parameter's name → its own rank or alpha, where they differ.
    """

    kind: Literal["lora", "dora"]
    rank: int
    alpha: float
    dropout: float = 0.0
    targets: str = ""
    rslora: bool = False
    base: str = ""
    base_digest: str | None = None
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alphas: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def rank_of(self, name: str) -> int:
        return self.ranks.get(name, self.rank)

    def alpha_of(self, name: str) -> float:
        return self.alphas.get(name, self.alpha)

    def factor(self, name: str) -> float:
        """By which lora_a · lora_b of the parameter ``name`` is multiplied."""
        return scale_factor(self.alpha_of(name), self.rank_of(name), self.rslora)


def is_adapter(directory: Path) -> bool:
    """True for a directory that holds an adapter's files."""
    return any((directory / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME, PICKLED_NAME))


def read_adapter(directory: str | Path, config: Config) -> tuple[dict[str, Any], AdapterSettings]:
    """Reads an adapter that `write_adapter` or the `peft` package wrote.

    Args:
      directory: with adapter_config.json, and adapter_model.safetensors or adapter_model.bin; or a hub id.
      config: of the model that it is for.

    Returns:
      The adapter (see the module's text), of numpy arrays as stored, not multiplied by `AdapterSettings.factor`; and
      its settings. A whole weight that the adapter brings along (modules_to_save) is a plain array in the place of
      its parameter, of that one's shape, or ``base`` in the dict there. What was tolerated is noted on standard error.

    Raises:
      CheckpointError: files are missing, damaged or changed, or it is for another model, or of a kind that is not
        computed here.
    """
    directory = find_adapter(directory)
    manifest = read_manifest(directory)
    peft = peft_config.read(directory / CONFIG_NAME)
    tensors = open_tensors(directory)
    placed = place(tensors, peft, config, str(directory))
    tell(directory, [*peft.notes, *placed.notes])
    settings = AdapterSettings(
        "dora" if peft.dora else "lora",
        peft.rank,
        peft.alpha,
        peft.dropout,
        rslora=peft.rslora,
        base=peft.base,
        ranks={name: rank for name, rank in placed.ranks.items() if rank != peft.rank},
        alphas={name: alpha for name, alpha in placed.alphas.items() if alpha != peft.alpha},
    )
    own = {key: manifest[key] for key in ("targets", "base", "base_digest") if manifest}
    return unflatten_dict(placed.arrays), dataclasses.replace(settings, **own)


def open_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file, by their stored names. Raises CheckpointError: it is missing or damaged."""
    for name, read_header in ((WEIGHTS_NAME, safetensors_file.read_header), (PICKLED_NAME, pytorch_file.read_header)):
        if (directory / name).is_file():
            return read_header(directory / name)
    raise CheckpointError(
        f"{directory}: has neither {WEIGHTS_NAME} nor {PICKLED_NAME}, where an adapter's weights are. Copy the whole "
        "directory that was saved."
    )


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of an adapter that was written here, after comparing its files with their digests; else empty.

    Raises:
      CheckpointError: files are missing or have changed.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        return {}
    manifest = read_json_object(path, CheckpointError, _ADVICE)
    digests.check_seal(path, read_text(path, CheckpointError, _ADVICE), _ADVICE)
    if manifest.get("version") != MANIFEST_VERSION:
        raise CheckpointError(
            f"{path}: written in version {manifest.get('version')!r} of the layout, this program reads version "
            f"{MANIFEST_VERSION}. {_ADVICE}"
        )
    kinds = {"sha256": dict, "targets": str, "base": str, "base_digest": str | None}
    if wrong := [name for name, kind in kinds.items() if not isinstance(manifest.get(name), kind)]:
        raise CheckpointError(f"{path}: cannot be read ({wrong[0]} is missing or of another kind). {_ADVICE}")
    digests.check(directory, manifest["sha256"], MANIFEST_NAME, _ADVICE[0].lower() + _ADVICE[1:-1])
    return manifest


def write_adapter(directory: str | Path, config: Config, adapter: Adapter, settings: AdapterSettings) -> None:
    """Writes an adapter in the layout that the `peft` package reads; the directory appears when it is complete.

    Args:
      directory: must not exist; its parent must.
      config: of the model that it is for.
      adapter: nested dict; see the module's text. Arrays of numpy or jax, float32, float16 or bfloat16, not multiplied
        by `AdapterSettings.factor`.
      settings: of the adapter.

    Raises:
      CheckpointError: the directory exists, or cannot be written.
      UsageError: the adapter is not one of this model.
    """
    leaves = rules.linear_leaves(config)
    parts = {path[:-1]: {} for path in flatten_dict(adapter)}
    for path, array in flatten_dict(adapter).items():
        parts[path[:-1]][path[-1]] = np.asarray(array)
    check_fits(parts, config, settings)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, arrays in sorted(parts.items()):
        leaf = leaves[path]
        pattern = _pattern(leaf.sources[0])
        ranks[pattern], alphas[pattern] = settings.rank_of(leaf.name), settings.alpha_of(leaf.name)
        for i, source in enumerate(leaf.sources):
            own = {name: array[i] if leaf.stacked else array for name, array in arrays.items()}
            module = _PREFIX + source.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = own["lora_a"].reshape(-1, own["lora_a"].shape[-1]).T
            tensors[f"{module}.lora_B.weight"] = own["lora_b"].reshape(own["lora_b"].shape[0], -1).T
            if "magnitude" in own:
                tensors[f"{module}.lora_magnitude_vector"] = own["magnitude"].reshape(-1)
    adapted = {source.removesuffix(".weight") for path in parts for source in leaves[path].sources}
    modules = [name.removesuffix(".weight") for name in rules.expected_shapes(config) if name.endswith(".weight")]
    document = peft_config.document(
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        rslora=settings.rslora,
        dora=settings.kind == "dora",
        base=settings.base,
        targets=peft_config.shortest_targets(adapted, modules),
        ranks={pattern: rank for pattern, rank in ranks.items() if rank != settings.rank},
        alphas={pattern: alpha for pattern, alpha in alphas.items() if alpha != settings.alpha},
    )
    with staged(directory, sum(leaf_bytes(a.shape, a.dtype) for a in tensors.values())) as partial:
        (partial / CONFIG_NAME).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        in_order = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        save_file(in_order, partial / WEIGHTS_NAME, {"format": "pt"})
        manifest = {
            "version": MANIFEST_VERSION,
            "targets": settings.targets,
            "base": settings.base,
            "base_digest": settings.base_digest,
            "sha256": digests.of_files(partial, [CONFIG_NAME, WEIGHTS_NAME]),
        }
        (partial / MANIFEST_NAME).write_text(digests.sealed(manifest), encoding="utf-8")


def check_fits(parts: Mapping[LeafPath, Any], config: Config, settings: AdapterSettings) -> None:
    """Raises UsageError unless ``parts``, path → dict of arrays, are an adapter for the model."""
    leaves = rules.linear_leaves(config)
    names = {"lora_a", "lora_b", *(["magnitude"] if settings.kind == "dora" else [])}
    problems = [] if parts else ["it has no arrays"]
    if min(settings.rank, *settings.ranks.values(), 1) < 1:
        problems.append(f"its rank is {settings.rank}; expected a whole number from 1")
    for path, arrays in parts.items():
        if path not in leaves:
            problems.append(f"{path_name(path)}: no parameter that can have an adapter")
        elif arrays.keys() != names:
            problems.append(f"{path_name(path)}: has {', '.join(sorted(arrays))}, expected {', '.join(sorted(names))}")
        else:
            expected = array_shapes(leaves[path], settings.rank_of(path_name(path)))
            problems += [
                f"{path_name(path)}/{name}: found {list(array.shape)}, expected {list(expected[name])}"
                for name, array in arrays.items()
                if tuple(array.shape) != expected[name]
            ]
    if problems:
        raise UsageError(f"the adapter is not one of this model:\n{listed(problems)}")


def array_shapes(leaf: rules.Leaf, rank: int) -> dict[str, rules.Shape]:
    """The shapes of a parameter's ``lora_a``, ``lora_b`` and ``magnitude``."""
    lead = leaf.shape[: int(leaf.stacked)]
    inputs, outputs = (tuple(leaf.shape[axis] for axis in axes) for axes in (leaf.inputs, leaf.outputs))
    return {"lora_a": (*lead, *inputs, rank), "lora_b": (*lead, rank, *outputs), "magnitude": (*lead, *outputs)}


def _pattern(source: str) -> str:
    """The regular expression by which peft finds the modules of one parameter: of experts, all of them."""
    return re.escape(source.removesuffix(".weight")).replace(r"experts\.0\.", r"experts\.[0-9]+\.")
