"""adapter_config.json as the `peft` package reads and writes it: every key is honoured, without effect, or refused.

Tested in tests/checkpoint/test_adapters.py.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.json_files import read_json_object
from dsvl2_jax.messages import listed

CONFIG_NAME = "adapter_config.json"

_ADVICE = "It comes with the adapter's weights: copy or save both again."
# A regular expression that the file gives may come from anybody, and match without end.
_MAX_PATTERN = 1000  # characters
_SLOW = re.compile(r"\)[*+{]|([*+{].*){4}", re.DOTALL)  # a repeated group, more than three repetitions

# Without effect on what a saved adapter computes: about its making, its training, or which modules it was put into, as
# the tensors themselves say.
_WITHOUT_EFFECT = frozenset(
    (
        "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
        "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_config",
        "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
        "velora_config",
    )
)  # fmt: skip
_HONOURED = frozenset(
    (
        "alpha_pattern", "base_model_name_or_path", "bias", "init_lora_weights", "lora_alpha", "lora_dropout",
        "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "target_parameters", "use_dora",
        "use_rslora",
    )
)  # fmt: skip
# What they do to a product is not computed here; false or empty, as they are by default, they mean nothing.
_REFUSED = {
    "alora_invocation_tokens": "the adapter works from certain tokens on (activated LoRA)",
    "arrow_config": "several adapters are mixed by a router (Arrow)",
    "kasa_config": "the adapter changes the weights that it is added to (KaSA)",
    "layer_replication": "layers of the base are repeated",
    "lora_bias": "lora_B has biases",
    "monteclora_config": "weights are drawn at random (MonteCLoRA)",
    "trainable_token_indices": "rows of the embeddings are replaced",
    "use_bdlora": "the matrices are block-diagonal (BD-LoRA)",
    "use_qalora": "inputs are pooled in groups (QALoRA)",
}
# These take a part of the base's weights into the adapter, which then only fits what is left of the base.
_CHANGED_BASE = re.compile("pissa.*|olora|corda|loftq|lora_ga", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What an adapter_config.json says that tensors do not. ``notes``: what is worth telling of the rest of it."""

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    dora: bool
    base: str
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: tuple[str, ...]
    notes: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        """Of a module, by the name that it had in the model that was trained."""
        return self.rank_pattern.get(_matching(self.rank_pattern, module), self.rank)

    def names_target(self, module: str) -> bool:
        """Whether the file lists a module, by its released name, among those that have an adapter."""
        return any(f".{module}".endswith(f".{target}") for target in self.targets)

    def alpha_of(self, module: str) -> float:
        return self.alpha_pattern.get(_matching(self.alpha_pattern, module), self.alpha)


def _matching(patterns: Iterable[str], module: str) -> str:
    """The first pattern that ends the module's name, as peft matches them; else the name."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), module)


def read(path: Path) -> PeftConfig:
    """Reads an adapter_config.json.

    Raises:
      CheckpointError: it is missing or damaged, no LoRA's, or asks for something that is not computed here.
    """
    raw = read_json_object(path, CheckpointError, _ADVICE)
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {kind!r}; adapters of the kinds LoRA and DoRA (peft_type LORA) are read. Merge the "
            "adapter into its model with peft, or train a LoRA."
        )
    problems = [f"{name}: {text}" for name, text in _REFUSED.items() if raw.get(name)]
    values = {name: _value(raw, name, *rule, problems) for name, rule in _NUMBERS.items()}
    for name in ("use_rslora", "use_dora"):
        if not isinstance(raw.get(name, False) or False, bool):
            problems.append(f"{name}: found {raw[name]!r}, expected true or false")
    patterns = {
        name: _patterns(raw, name, _NUMBERS[number], problems)
        for name, number in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    }
    start = raw.get("init_lora_weights", True)
    if isinstance(start, str) and _CHANGED_BASE.fullmatch(start):
        problems.append(
            f"init_lora_weights {start!r}: the adapter fits a base whose weights were changed when it was made; save "
            "it with peft's path_initial_model_for_weight_conversion, which makes it a plain LoRA, or merge it there"
        )
    base = raw.get("base_model_name_or_path") or ""
    if not isinstance(base, str):
        problems.append(f"base_model_name_or_path: found {base!r}, expected a name")
    if problems:
        raise CheckpointError(f"{path}: the adapter cannot be read:\n{listed(problems)}")
    named = raw.get("target_modules")
    narrowed = any(raw.get(name) for name in ("exclude_modules", "layers_to_transform", "target_parameters"))
    # A regular expression, or what is narrowed further, says less than the tensors do.
    targets = tuple(map(str, named)) if isinstance(named, list) and not narrowed else ()
    notes = []
    unknown = sorted(raw.keys() - _WITHOUT_EFFECT - _HONOURED - _REFUSED.keys())
    if unknown:
        notes.append(f"{len(unknown)} keys of {CONFIG_NAME} are not known, so not heeded: {', '.join(unknown[:5])}")
    return PeftConfig(
        int(values["r"]),
        float(values["lora_alpha"]),
        float(values["lora_dropout"]),
        bool(raw.get("use_rslora")),
        bool(raw.get("use_dora")),
        base,
        patterns["rank_pattern"],
        patterns["alpha_pattern"],
        targets,
        tuple(notes),
    )


_NUMBERS: dict[str, tuple[Any, str, Callable[[Any], bool]]] = {
    "r": (8, "a whole number from 1", lambda x: isinstance(x, int) and x > 0),
    "lora_alpha": (8, "a number, not 0", lambda x: isinstance(x, int | float) and x != 0 and math.isfinite(x)),
    "lora_dropout": (0.0, "from 0 to below 1", lambda x: isinstance(x, int | float) and 0 <= x < 1),
}


def _value(
    raw: Mapping[str, Any], name: str, default: Any, expected: str, right: Callable[[Any], bool], problems: list[str]
) -> Any:
    value = raw.get(name, default)
    if isinstance(value, bool) or not right(value):
        problems.append(f"{name}: found {value!r}, expected {expected}")
        return default
    return value


def _patterns(
    raw: Mapping[str, Any], name: str, rule: tuple[Any, str, Callable[[Any], bool]], problems: list[str]
) -> dict[str, Any]:
    patterns = raw.get(name) or {}
    if not isinstance(patterns, dict):
        problems.append(f"{name}: found {patterns!r}, expected an object of module names to numbers")
        return {}
    for pattern in patterns:
        _value(patterns, pattern, *rule, problems)
        try:
            if len(pattern) > _MAX_PATTERN or _SLOW.search(pattern):
                raise re.error("it may take very long to match: list the modules' names instead")
            re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, RecursionError, OverflowError) as error:
            problems.append(f"{name}: {pattern[:100]!r} is neither a module's name nor a regular expression ({error})")
    return patterns


def document(
    *,
    rank: int,
    alpha: float,
    dropout: float,
    rslora: bool,
    dora: bool,
    base: str,
    targets: list[str],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
) -> dict[str, Any]:
    """The content of an adapter_config.json; ``ranks`` and ``alphas`` by regular expressions of module names."""

    def number(value: float) -> int | float:
        return int(value) if float(value).is_integer() else value

    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": number(alpha),
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "use_dora": dora,
        "target_modules": targets,
        "rank_pattern": dict(ranks),
        "alpha_pattern": {pattern: number(value) for pattern, value in alphas.items()},
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def shortest_targets(adapted: set[str], modules: Iterable[str]) -> list[str]:
    """The ends of names by which peft finds ``adapted`` modules, and no other of the model.

    ``modules``: those of the model that have weights; what they are in, layers and blocks, are modules too.
    """
    all_modules = {module[: dot.start()] for module in modules for dot in re.finditer(r"\.|$", module)}
    others = {end for module in all_modules - adapted for end in _ends(module)}
    return sorted({next(end for end in _ends(module) if end not in others) for module in adapted})


def _ends(module: str) -> list[str]:
    """``gate_proj``, ``mlp.gate_proj``, … up to the whole name."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]
