"""Writing and reading small checkpoints in the released layout with PyTorch's own safetensors functions.

Tests that call these functions are skipped where there is no PyTorch; see the extra ``test`` in setup.cfg.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"


def copy(source: Path, target: Path) -> Path:
    """A copy of a checkpoint that a test may damage."""
    return Path(shutil.copytree(source, target))


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory."""
    load_file = pytest.importorskip("safetensors.torch").load_file
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def put(directory: Path, contents: dict[str, torch.Tensor], shards: int = 2) -> Path:
    """Replaces the tensors of a directory; one shard means a single file without an index."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    for file in [*directory.glob("*.safetensors"), directory / INDEX]:
        file.unlink(missing_ok=True)
    names = list(contents)
    weight_map = {}
    for i in range(shards):
        part = names[i::shards]
        # The released shard names mix five and six digits.
        file = f"model-{i + 1:05d}-of-{shards:06d}.safetensors" if shards > 1 else "model.safetensors"
        save_file({name: contents[name].contiguous() for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def edit_json(file: Path, edit) -> None:
    """Applies ``edit`` to the content of a json file."""
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Same names, dtypes, shapes and bits."""
    torch = pytest.importorskip("torch")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
