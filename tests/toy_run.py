"""A model and data so small that a training run takes seconds; shared by the tests of runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dsvl2_jax import configs

Tables = dict[str, dict[str, Any]]

MICRO = Path(configs.__file__).parent / "micro"

COMPUTE = {"dtype": "float32", "loss_chunk": 128, "remat": "none"}  # what compiles quickly


def make_model(directory: Path) -> Path:
    """Configuration and tokenizer of the micro model with fewer and narrower layers, without weights."""
    directory.mkdir()
    for file in MICRO.glob("*.json"):
        if not file.name.endswith("index.json"):
            shutil.copyfile(file, directory / file.name)
    config = json.loads((MICRO / "config.json").read_text())
    config["vision_config"] |= {"layers": 1, "width": 32, "heads": 2}
    config["projector_config"] |= {"input_dim": 32, "n_embed": 48}
    config["language_config"] |= {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "n_routed_experts": 4,
        "initializer_range": 0.02,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def make_data(directory: Path, name: str = "train.jsonl", samples: int = 24, seed: int = 0) -> Path:
    """A JSON Lines file of which every third sample has an image, and its images."""
    directory.mkdir(exist_ok=True)
    random = np.random.default_rng(seed)
    lines = []
    for i in range(samples):
        words = " ".join(random.choice(["red", "blue", "two", "three", "a", "shape"], size=8 + i % 5))
        images = []
        if i % 3 == 0:
            images = [f"{Path(name).stem}-{i}.png"]
            Image.fromarray(random.integers(0, 256, (40, 60, 3), np.uint8)).save(directory / images[0])
        question = {"role": "user", "content": "<image>" * len(images) + f" {words}?", "images": images}
        lines.append(json.dumps({"messages": [question, {"role": "assistant", "content": f"{words}."}]}))
    (directory / name).write_text("\n".join(lines) + "\n")
    return directory / name


def write_config(path: Path, model: Path, data: Path, run: Path, tables: Tables | None = None) -> Path:
    """A CONFIG.toml for them; ``tables`` add to or replace the values of a table."""
    content: Tables = {
        "model": {"checkpoint": str(model), "random_init": True},
        "data": {"sequence_length": 128, "tiles_per_sequence": 2, "max_segments": 8, "packing_bins": 2},
        "data.train.toy": {"path": str(data)},
        "batch": {"sequences": 2, "microbatch_size": 2},
        "stage": {"bias_update_speed": 0.01},
        "optimizer": {"learning_rate": 0.003, "schedule": "cosine", "warmup_steps": 2},
        "compute": COMPUTE,
        "run": {"directory": str(run), "steps": 12, "checkpoint_every": 4, "validate_every": 4, "keep_last": 2},
    }
    for name, table in (tables or {}).items():
        content[name] = content.get(name, {}) | table
    lines = []
    for name, table in content.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    lines += ["[[stage.parameters]]", "match = 'attn_pool|correction_bias'", "train = false"]
    lines += ["[[stage.parameters]]", "match = 'vision'", "lr_multiplier = 0.1", "[[stage.parameters]]", "match = '.'"]
    path.write_text("\n".join(lines) + "\n")
    return path
