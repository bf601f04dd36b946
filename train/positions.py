"""The positions of the model that a run trains: those of its checkpoint, or longer ones.

Tested in tests/train/test_positions.py.
"""

from __future__ import annotations

import json
from pathlib import Path

from dsvl2_jax.checkpoint.locate import carry_files, model_files
from dsvl2_jax.errors import ConfigError, SettingsError
from dsvl2_jax.json_files import read_json_object
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.rope_scaling import parse_scaling
from dsvl2_jax.train.settings.schema import ModelSettings


def with_positions(settings: ModelSettings, source: Path, folder: Path) -> Path:
    """Where the files are that say what the model is: those of a checkpoint, or copies with the settings' positions.

    Args:
      source: the checkpoint, as `resolve` returns it.
      folder: an empty directory for the copies.

    Raises:
      SettingsError: the settings contradict each other, or are no JSON.
      ConfigError: positions that are not supported.
    """
    files = model_files(source)
    if not settings.context and not settings.rope_scaling:
        return files
    carry_files(files, folder)
    raw = read_json_object(folder / "config.json", ConfigError)
    before = Config.from_dict(raw, source=str(files / "config.json")).language
    language = dict(raw["language_config"])
    text, scaling = settings.rope_scaling, None
    if text:
        scaling = parse_scaling(text, f"model.rope_scaling: {text!r}", SettingsError)
    if scaling is None:
        scaling = language.get("rope_scaling") or language.get("rope_parameters")
    kind = scaling and (scaling.get("type") or scaling.get("rope_type"))
    if settings.context and kind == "dynamic":
        raise SettingsError(
            "model.context: dynamic positions scale beyond max_position_embeddings, which a new context would move; "
            "leave model.context out, rows may be longer than it, and say --context where the model is used."
        )
    if kind == "yarn":
        # Otherwise the new context would be taken for the original one.
        scaling = {"original_max_position_embeddings": before.max_position_embeddings} | scaling
    language.pop("rope_parameters", None)
    language |= {"rope_theta": before.rope_theta, "rope_scaling": scaling}
    if settings.context:
        language["max_position_embeddings"] = settings.context
    raw["language_config"] = language
    Config.from_dict(raw, source="model.context and model.rope_scaling: config.json")
    (folder / "config.json").write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder
