"""The tensors of an adapter file by the released names of the modules that they belong to.

Tested in tests/checkpoint/test_adapters.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container, Iterable, Mapping
from typing import NamedTuple

from dsvl2_jax.checkpoint.tensor_names import WRAPPERS
from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.messages import listed

# peft leaves the adapter's own name ("default") out; who saves the whole state of a model has it.
_LORA = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A|B|magnitude_vector)(\.(?P<adapter>(?!(weight|bias)$)[^.]+))?(\.(?P<kind>weight|bias))?"
)
_FULL = re.compile(r"(?P<module>.+?)(\.modules_to_save\.(?P<adapter>[^.]+))?\.(?P<kind>weight|bias)")
_LANGUAGE = "language."  # in front of the names of what was trained as a language model alone
_INSIDE = ".base_layer"  # of an adapter around another one, of the same module


class Key(NamedTuple):
    """What one tensor is: ``part`` "A", "B", "magnitude" or, of a whole weight, "weight" or "bias".

    ``module`` is released; ``trained`` its name in the model that was trained, by which the patterns of
    adapter_config.json call it. ``inner`` counts the adapters around this one.
    """

    module: str
    part: str
    trained: str
    inner: int = 0


@dataclasses.dataclass(frozen=True)
class _Name:
    """A stored name, taken apart; ``module`` without wrappers."""

    stored: str
    module: str
    part: str
    adapter: str | None
    inner: int


def resolve(names: Iterable[str], modules: Container[str], source: str) -> dict[str, Key]:
    """Finds out what each tensor is.

    Args:
      names: of the stored tensors.
      modules: the released names of all that can have an adapter or be replaced.
      source: for messages.

    Raises:
      CheckpointError: a tensor belongs to no module of the model, or is of another kind than those of LoRA and DoRA.
    """
    taken = [_taken_apart(name, source) for name in names]
    adapters = sorted({name.adapter for name in taken if name.adapter is not None})
    if len(adapters) > 1:
        raise CheckpointError(
            f"{source}: holds several adapters ({', '.join(adapters[:5])}); save each into a directory of its own."
        )
    placed = {name: _placed(name.module, modules) for name in taken}
    unknown = [name.stored for name, place in placed.items() if place is None]
    if unknown:
        raise CheckpointError(
            f"{source}: {len(unknown)} of {len(taken)} tensors belong to nothing in this model that can have an "
            "adapter. Give the checkpoint that the adapter was trained on; of one that also changes other weights "
            f"(router, embeddings, convolution), merge it with peft:\n{listed(unknown)}"
        )
    prefixes = sorted({(dropped, added) for dropped, added, _ in placed.values()})
    if len(prefixes) > 1:
        shown = listed(f"{dropped}…" for dropped, _ in prefixes)
        raise CheckpointError(
            f"{source}: the names of its tensors begin in {len(prefixes)} ways, so that it is not certain what they "
            f"belong to; save the adapter of one model alone:\n{shown}"
        )
    found: dict[Key, str] = {}
    keys = {}
    for name, (_, added, module) in placed.items():
        key = Key(module, name.part, module.removeprefix(added), name.inner)
        if key in found:
            raise CheckpointError(
                f"{source}: two tensors stand for {module} ({name.part}): {found[key]} and {name.stored}. Remove the "
                "one that is not meant."
            )
        found[key] = name.stored
        keys[name.stored] = key
    return keys


def _taken_apart(stored: str, source: str) -> _Name:
    name = ".".join(part for part in stored.split(".") if part not in WRAPPERS)
    match = _LORA.fullmatch(name)
    if match is None:
        match = _FULL.fullmatch(name)
        if match is None or "lora_" in name or ".original_module" in name:
            raise CheckpointError(
                f"{source}: tensor {stored} is not one of LoRA's or DoRA's (lora_A, lora_B, lora_magnitude_vector), "
                "nor a whole weight. Save the adapter alone, with peft's save_pretrained; merge adapters of other "
                "kinds with peft."
            )
        return _Name(stored, match["module"].removesuffix(_INSIDE), match["kind"], match["adapter"], 0)
    if match["kind"] == "bias":
        raise CheckpointError(
            f"{source}: tensor {stored} is a bias of lora_B (lora_bias), which is not computed here; merge the adapter "
            "with peft."
        )
    module, inner = match["module"], 0
    while module.endswith(_INSIDE):
        module, inner = module.removesuffix(_INSIDE), inner + 1
    part = "magnitude" if match["part"] == "magnitude_vector" else match["part"]
    return _Name(stored, module, part, match["adapter"], inner)


def _placed(module: str, modules: Container[str]) -> tuple[str, str, str] | None:
    """(beginning that the name has too much, one that it lacks, released name), or None."""
    parts = module.split(".")
    for start in range(len(parts)):
        end = ".".join(parts[start:])
        for added in ("", _LANGUAGE):
            if added + end in modules:
                return module.removesuffix(end), added, added + end
    return None


def by_module(keys: Mapping[str, Key]) -> dict[tuple[str, int], dict[str, str]]:
    """(released module, how many adapters are around it) → part → stored name."""
    parts: dict[tuple[str, int], dict[str, str]] = {}
    for stored, key in keys.items():
        parts.setdefault((key.module, key.inner), {})[key.part] = stored
    return parts
