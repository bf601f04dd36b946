"""``model.context`` and ``model.rope_scaling`` of a run: the configuration that it trains and writes."""

import json

import pytest

from dsvl2_jax.errors import ConfigError, SettingsError
from dsvl2_jax.model.config import Config
from dsvl2_jax.train.positions import with_positions
from dsvl2_jax.train.settings.schema import ModelSettings

YARN = '{"type": "yarn", "factor": 4, "mscale": 1, "mscale_all_dim": 1}'


def of(checkpoints, folder, **fields):
    folder.mkdir()
    return Config.from_file(with_positions(ModelSettings("x", **fields), checkpoints / "mini-base", folder)).language


def test_a_longer_context_is_written_with_the_positions_that_it_has(checkpoints, tmp_path):
    before = Config.from_file(checkpoints / "mini-base").language
    assert of(checkpoints, tmp_path / "none") == before
    assert not list((tmp_path / "none").iterdir())
    longer = of(checkpoints, tmp_path / "longer", context=16384, rope_scaling=YARN)
    assert longer.max_position_embeddings == longer.longest_context == 16384
    assert longer.rope_scaling.original_max_position_embeddings == before.max_position_embeddings == 4096
    assert longer.softmax_scale > before.softmax_scale
    kept = json.loads((tmp_path / "longer" / "config.json").read_text())["language_config"]["rope_scaling"]
    assert kept["type"] == "yarn" and kept["mscale_all_dim"] == 1
    assert (tmp_path / "longer" / "processor_config.json").is_file()
    dynamic = of(checkpoints, tmp_path / "dynamic", rope_scaling='{"type": "dynamic", "factor": 2}')
    assert dynamic.longest_context == 8192


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"rope_scaling": "yarn"}, SettingsError, "model.rope_scaling: 'yarn' is no JSON object"),
        ({"context": 9, "rope_scaling": '{"type": "dynamic", "factor": 2}'}, SettingsError, "model.context: dynamic"),
        ({"rope_scaling": '{"type": "su", "factor": 2}'}, ConfigError, "model.rope_scaling: config.json .*\n.*'su'"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(checkpoints, tmp_path, fields, error, message):
    with pytest.raises(error, match=message):
        of(checkpoints, tmp_path / "x", **fields)
