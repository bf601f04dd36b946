"""How a model's rotary positions are scaled for longer contexts: ``rope_scaling`` of config.json. Imports no jax.

The kinds and keys are those of the official DeepseekV2 configuration; transformers 5 writes the same into an object
``rope_parameters``, with the base of the positions (``rope_theta``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dsvl2_jax import fields
from dsvl2_jax.errors import DSVL2Error
from dsvl2_jax.fields import setting
from dsvl2_jax.json_files import parse_json

KINDS = ("linear", "dynamic", "yarn")

# What each kind reads; every kind's softmax scale depends on mscale_all_dim, as in the official attention.
_KEYS = {
    "linear": {"factor", "mscale_all_dim"},
    "dynamic": {"factor", "mscale_all_dim"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "truncate",
    },
}
# That may stand beside them without a meaning: ``rope_theta`` is read apart, and a factor of 1 changes nothing.
_BESIDE = {"type", "rope_type", "rope_theta", "finetuned"}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """One of `KINDS`, with the numbers that it needs.

    - linear: all frequencies are divided by ``factor`` (position interpolation, arXiv 2306.15595).
    - dynamic: the base grows with a sequence's length beyond ``max_position_embeddings`` (NTK-aware scaling).
    - yarn: frequencies that turn less than ``beta_slow`` times in the original context are divided by ``factor``, those
      that turn more than ``beta_fast`` times stay, and between them is a ramp (arXiv 2309.00071).
    """

    kind: str = setting("linear", choices=KINDS)
    factor: float = setting(1.0, least=1, most=1 << 20)
    original_max_position_embeddings: int | None = setting(None, least=1, most=1 << 28)  # None: the model's
    beta_fast: float = setting(32.0, above=0)
    beta_slow: float = setting(1.0, above=0)
    mscale: float | None = setting(None, least=0)
    mscale_all_dim: float | None = setting(None, least=0)
    attention_factor: float | None = setting(None, above=0)
    truncate: bool = True

    @property
    def rotary_factor(self) -> float:
        """What cos and sin are multiplied with: 1 but for yarn."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)

    @property
    def softmax_factor(self) -> float:
        """What latent attention's scores are multiplied with besides."""
        return _mscale(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def problems(self, width: int) -> list[str]:
        """What is wrong with the numbers together, for a rotated width."""
        problems = []
        if self.kind == "dynamic" and width <= 2:
            problems.append(f"dynamic needs a rotated width above 2, not {width}")
        if self.kind == "yarn" and self.beta_fast < self.beta_slow:
            problems.append(f"beta_fast {self.beta_fast} is less than beta_slow {self.beta_slow}")
        if self.kind == "yarn" and self.attention_factor is None:
            mscale = 1.0 if self.mscale is None else self.mscale
            official = _mscale(self.factor, mscale) / _mscale(self.factor, self.mscale_all_dim or 0.0)
            if not math.isclose(official, self.rotary_factor, rel_tol=1e-9):
                problems.append(
                    f"with mscale {self.mscale} and mscale_all_dim {self.mscale_all_dim}, DeepSeek's code multiplies "
                    f"cos and sin with {official:.6g} and transformers with {self.rotary_factor:.6g}; say which by "
                    "attention_factor"
                )
        return problems

    def described(self) -> dict[str, Any]:
        """As config.json has it."""
        numbers = {key: getattr(self, key) for key in sorted(_KEYS[self.kind])}
        return {"rope_type": self.kind} | {key: value for key, value in numbers.items() if value is not None}

    def inverse_frequencies(self, width: int, theta: float, context: int) -> np.ndarray:
        """f32[width / 2], radians a position; of "dynamic" those of a sequence that is not longer than the context.

        Args:
          width: of what is rotated.
          theta: the base.
          context: ``max_position_embeddings``.
        """
        frequencies = plain_frequencies(width, theta)
        if self.kind == "linear":
            return frequencies / np.float32(self.factor)
        if self.kind != "yarn":
            return frequencies
        original = self.original_max_position_embeddings or context

        def index(turns: float) -> float:
            """Of the pair that turns so often in the original context."""
            return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high += 0.001 if low == high else 0
        ramp = np.clip((np.arange(width // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
        kept = 1 - ramp
        stretched = 1 / (np.float32(self.factor) * _powers(width, theta))
        return stretched * (1 - kept) + frequencies * kept


def parse_scaling(text: str, given: str, error: type[DSVL2Error]) -> dict[str, Any]:
    """A ``rope_scaling`` object that stands as JSON in an option or a setting; its keys are not looked at.

    Args:
      given: what the message begins with, the option or setting and its value.
      error: raised where the text is no JSON object.
    """
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        example = '{"type": "yarn", "factor": 4}'
        raise error(f"{given} is no JSON object; write it as in config.json: '{example}'.")
    return value


def read_rope(language: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What ``language_config`` says of its positions, in any spelling.

    Args:
      language: with ``rope_scaling`` (``type`` or ``rope_type`` and the numbers), ``rope_parameters`` (the same and
        ``rope_theta``), both saying the same, or neither.

    Returns:
      The values of the fields ``rope_scaling`` and, where it is given, ``rope_theta``; and all problems.
    """
    problems: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    for name in ("rope_scaling", "rope_parameters"):
        raw = language.get(name)
        if raw is not None and not isinstance(raw, Mapping):
            problems.append(f"{name}: must be an object or null, not {fields.literal(raw)}.")
        elif raw:
            found[name] = {key: value for key, value in raw.items() if value is not None}
    thetas = {f"{name}.rope_theta": raw["rope_theta"] for name, raw in found.items() if "rope_theta" in raw}
    if language.get("rope_theta") is not None:
        thetas["rope_theta"] = language["rope_theta"]
    if any(theta != other for theta in thetas.values() for other in thetas.values()):
        problems.append(f"{' and '.join(thetas)}: found {' and '.join(map(str, thetas.values()))}; keep the right one.")
    scalings = {name: _scaling(name, raw, problems) for name, raw in found.items()}
    values = list(scalings.values())
    if len(values) == 2 and values[0] != values[1]:
        problems.append("rope_scaling and rope_parameters say different things; keep the right one.")
    rope: dict[str, Any] = {"rope_scaling": values[0] if values else None}
    return rope | ({"rope_theta": next(iter(thetas.values()))} if thetas else {}), problems


def _scaling(name: str, raw: Mapping[str, Any], problems: list[str]) -> dict[str, Any] | None:
    """The fields of a `RopeScaling`, or None for positions that do not scale."""
    spelled = {raw[key] for key in ("type", "rope_type") if isinstance(raw.get(key), str)}
    others = raw.keys() - _BESIDE
    if len(spelled) > 1:
        problems.append(f"{name}: type is {raw['type']!r} and rope_type {raw['rope_type']!r}; keep the right one.")
        return None
    kind = spelled.pop() if spelled else "default" if not others else None
    if kind in ("default", "none"):
        for key in sorted(others):
            if not (key in ("factor", "partial_rotary_factor") and raw[key] == 1):
                problems.append(f"{name}.{key}: found {raw[key]!r}, which means nothing with type {kind!r}.")
        return None
    if kind not in KINDS:
        given = "missing" if kind is None else f"found {kind!r}"
        problems.append(f"{name}.type: {given}; supported are {', '.join(KINDS)}, those of DeepSeek's own code.")
        return None
    if "factor" not in raw:
        problems.append(f"{name}.factor: missing; how many times as long the context is to be.")
    for key in sorted(others - _KEYS[kind]):
        if not (key == "partial_rotary_factor" and raw[key] == 1):
            known = ", ".join(sorted(_KEYS[kind]))
            problems.append(f"{name}.{key}: means nothing with type {kind!r}, which has {known}.")
    return {"kind": kind} | {key: raw[key] for key in others & _KEYS[kind]}


def _powers(width: int, theta: float) -> np.ndarray:
    """f32[width / 2], theta^(2i / width), each rounded once."""
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return (np.float64(np.float32(theta)) ** exponents.astype(np.float64)).astype(np.float32)


def plain_frequencies(width: int, theta: float) -> np.ndarray:
    """f32[width / 2], radians a position, without scaling; rounded as PyTorch does, so that far positions agree."""
    return 1 / _powers(width, theta)


def _mscale(factor: float, mscale: float) -> float:
    """How much yarn sharpens attention that is stretched by a factor."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
