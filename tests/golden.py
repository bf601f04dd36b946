"""Reading of the golden files, shared by the tests: outputs of the official code on small random checkpoints."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

DATA = Path(__file__).parent / "data"
MODELS = ("mini-tiny", "mini-small", "mini-base")


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """The tensors of data/model/NAME.safetensors, e.g. of "mini-tiny.f32", bfloat16 ones as float32."""
    tensors = load_file(DATA / "model" / f"{name}.safetensors")
    return {k: v if v.dtype.kind in "iu" else v.astype(np.float32) for k, v in tensors.items()}


@functools.cache
def notes(name: str) -> dict[str, Any]:
    return json.loads((DATA / "model" / f"{name}.json").read_text())


@functools.cache
def conversations() -> dict[str, list[dict[str, Any]]]:
    """Case → conversation with full image paths; the model goldens' inference cases."""
    cases = {k: v["case"] for k, v in json.loads((DATA / "processor_mini.json").read_text()).items()}
    cases |= {k: v["case"] for k, v in notes("mini-tiny.f32").items() if k.endswith("_synth")}
    return {k: with_paths(v["conversations"]) for k, v in cases.items() if "conversations" in v}


def with_paths(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        turn | {"images": [DATA / "images" / name for name in turn["images"]]} if "images" in turn else turn
        for turn in turns
    ]


def cases(name: str) -> list[str]:
    """The single-prompt inference cases of a golden file."""
    return [k.split("/")[0] for k in arrays(name) if k.endswith("/greedy_ids") and not k.startswith("batch")]


def until_eos(ids: np.ndarray, eos: int = 1) -> list[int]:
    """Golden ids without the padding after the eos."""
    ids = ids.reshape(-1).tolist()
    return ids[: ids.index(eos) + 1] if eos in ids else ids


@functools.cache
def _margins() -> dict[str, Any]:
    return notes("margins")


def sure_steps(name: str, case: str, run: str, row: int = 0, least: float = 2e-4) -> int | None:
    """How many first greedy steps have a top-2 margin that a correct implementation cannot flip."""
    rows = _margins().get(name, {}).get(case, {}).get(run)
    if rows is None:
        return None
    return next((i for i, margin in enumerate(rows[row]) if margin < least), None)


def logits_rows(name: str, case: str) -> tuple[np.ndarray, np.ndarray, int]:
    """(rows, their golden logits, vocabulary stride)."""
    tensors = arrays(name)
    values = tensors[f"{case}/logits.sub"]
    index = tensors.get(f"{case}/logits.sub.idx", tensors.get(f"{case}/logits.idx"))
    return index, values, 1024 // values.shape[-1]


def assert_same_tokens(found: list[int], expected: list[int], sure: int | None) -> None:
    """Equal up to the first step whose margin is too small to tell."""
    if sure is not None:
        found, expected = found[:sure], expected[:sure]
    assert found == expected
