"""Tensor names as tools have written them, brought back to the released ones.

Tools wrap a model before they train or save it, and each layer of wrapping adds to the names. What is certain to mean
the same is read, with a note; an adapter's names are an error that says how to merge it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dsvl2_jax.checkpoint import rules
from dsvl2_jax.checkpoint.safetensors_file import Tensor
from dsvl2_jax.checkpoint.shards import MERGE
from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.messages import listed
from dsvl2_jax.model.config import Config

# Parts of a name that wrappers put in, at any depth: compilation, sharded training, recomputation.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_ADAPTER = re.compile(
    r"(^|\.)(lora_(A|B|E|embedding_A|embedding_B|magnitude_vector)|(hada|oft|vera|ia3|lokr)_\w+|base_layer|modules_to_save"
    r"|original_module)(\.|$)"
)
_BUFFER = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|position_ids|num_batches_tracked)$"
)
_FREQUENCIES = re.compile(r"(^|\.)rotary_emb\.(original_)?inv_freq$")


class Names(NamedTuple):
    """``tensors``: released name → stored name. ``buffers``: the same of those that are checked and not loaded."""

    tensors: dict[str, str]
    buffers: dict[str, str]
    notes: list[str]


def released_names(stored: dict[str, Tensor], config: Config, source: str) -> Names:
    """Finds the released name of each stored tensor; unknown ones keep theirs, for `rules.check` to name.

    Raises:
      CheckpointError: the names are an adapter's, or two tensors would get the same name.
    """
    expected = rules.expected_shapes(config)
    if adapters := [name for name in stored if _ADAPTER.search(name)]:
        raise CheckpointError(
            f"{source}: the tensors belong to an adapter (LoRA or the like), as yet apart from its model. If "
            f"the adapter is not in a directory of its own, save it into one with peft's save_pretrained; {MERGE}. "
            f"Found:\n{listed(adapters, limit=3)}"
        )
    notes: list[str] = []
    names = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in stored}
    if wrapped := sum(old != new for old, new in names.items()):
        notes.append(f"{wrapped} names have parts that wrappers add ({', '.join(sorted(WRAPPERS))}): read without them")
    if prefix := _prefix(names.values(), expected):
        names = {old: new.removeprefix(prefix) for old, new in names.items()}
        notes.append(f"all names begin with {prefix!r}: read without it")
    renamed: dict[str, str] = {}
    for old, new in names.items():
        if new in renamed:
            raise CheckpointError(
                f"{source}: two tensors stand for {new}: {renamed[new]} and {old}. Remove the one that is not meant."
            )
        renamed[new] = old
    buffers = {name: old for name, old in renamed.items() if name not in expected and _BUFFER.search(name)}
    tensors = {name: old for name, old in renamed.items() if name not in buffers}
    if buffers:
        notes.append(f"{len(buffers)} buffers that are no parameters are not used, such as {next(iter(buffers))}")
    if rules.lacks_unused(tensors):
        notes.append(
            f"no {rules.UNUSED}* (the pooling head, which contrastive training alone computes): they are zeros"
        )
    frequencies = {
        name: old
        for name, old in buffers.items()
        if _FREQUENCIES.search(name) and stored[old].dtype in rules.FLOAT_DTYPES
    }
    return Names(tensors, frequencies, notes)


def _prefix(names: Iterable[str], expected: Iterable[str]) -> str:
    """The dotted beginning of all names without which most of them are expected ones; empty if that is so already."""
    names, expected = list(names), set(expected)
    split = [name.split(".")[:-1] for name in names]
    parts = [same.pop() for same in itertools.takewhile(lambda s: len(s) == 1, map(set, zip(*split, strict=False)))]
    candidates = ["".join(f"{part}." for part in parts[:count]) for count in range(len(parts) + 1)]
    return max(candidates, key=lambda prefix: sum(name.removeprefix(prefix) in expected for name in names))


def check_buffer(name: str, values: np.ndarray, config: Config, source: str) -> None:
    """Refuses rotary frequencies that are not those of the configuration: the model would compute something else.

    Args:
      values: f32[width / 2].

    Raises:
      CheckpointError: they differ by more than bfloat16 rounds.
    """
    language = config.language
    expected = language.inverse_frequencies
    if values.shape != expected.shape or not np.allclose(values, expected, rtol=0.01, atol=0):
        says = f"config.json's rope_theta {language.rope_theta}"
        says += "" if language.rope_scaling is None else f" with rope_scaling {language.rope_scaling.kind}"
        raise CheckpointError(
            f"{source}: {name} holds {_shown(values)}, but {says} gives "
            f"{_shown(expected)}: the model was made for other positions than config.json says. Get both from the same "
            "release."
        )


def _shown(values: Sequence[float] | np.ndarray) -> str:
    return f"{len(values)} frequencies ({', '.join(f'{value:.4g}' for value in values[:3])} …)"
