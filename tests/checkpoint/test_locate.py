"""Which directories, names and hub ids are a checkpoint, of which layout, and what is said of the others.

A run's checkpoints are found in tests/train/test_run_directory.py; damaged directories are in test_load.py.
"""

import pytest
import released_checkpoint

from dsvl2_jax.checkpoint.locate import kind, open_model, resolve
from dsvl2_jax.convert.to_orbax import convert
from dsvl2_jax.errors import CheckpointError, UsageError


def test_kind_and_resolve_know_both_layouts(checkpoints, tmp_path):
    convert(checkpoints / "mini-tiny", tmp_path / "converted")
    assert kind(resolve(str(checkpoints / "mini-tiny"))) == "released"
    assert kind(resolve(tmp_path / "converted")) == "orbax"
    with pytest.raises(CheckpointError, match="cannot be downloaded"):
        resolve("deepseek-ai/deepseek-vl2-tiny")  # the tests are offline
    with pytest.raises(CheckpointError, match="no such directory"):
        resolve("a/b/c")


def test_sources_that_are_no_released_checkpoint(checkpoints, tmp_path):
    (tmp_path / "empty").mkdir()
    convert(checkpoints / "mini-small", tmp_path / "converted")
    cases = {
        tmp_path / "empty": "not a checkpoint",
        tmp_path / "absent": "no such directory",
        tmp_path / "converted": "is a converted checkpoint already",
        checkpoints / "mini-small" / "config.json": "is a file",
        "someone/no-such-model": "cannot be downloaded",
    }
    for source, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            convert(source, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["converted", "empty"]


def test_a_processor_with_other_tiles_than_the_encoders_is_refused(checkpoints, tmp_path):
    directory = released_checkpoint.copy(checkpoints / "mini-tiny", tmp_path / "mini")
    config, processor = open_model(directory)
    assert processor.config.tile_size == config.vision.image_size
    released_checkpoint.edit_json(
        directory / "processor_config.json", lambda c: c.update(candidate_resolutions=[[126, 126]])
    )
    with pytest.raises(UsageError, match=r"tiles of 126 pixels .* encoder takes 384"):
        open_model(directory)
