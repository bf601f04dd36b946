"""Rounding by the user's samples: its error on them, a whole conversion, and files that are of no use."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dsvl2_jax.checkpoint.load import load_params
from dsvl2_jax.convert.calibrate import gptq
from dsvl2_jax.convert.to_orbax import convert
from dsvl2_jax.errors import DataError, UsageError
from dsvl2_jax.kernels.quantized import quantize, unpack_int4
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.quantization import Quantization


def test_products_with_the_samples_change_less_than_by_rounding_to_nearest():
    random = np.random.default_rng(0)
    weight = random.normal(size=(256, 24)).astype(np.float32)
    rows = (random.normal(size=(400, 32)) @ random.normal(size=(32, 256))).astype(np.float32)  # that go together

    def error(values, scale):
        whole = values * np.repeat(scale, 128, 0)
        return np.square(rows @ whole - rows @ weight).sum()

    nearest = quantize(weight, "int4", (0,))
    plain = error(np.asarray(unpack_int4(jnp.asarray(nearest["int4"]), 2, 0)), nearest["scale"])
    values, scale = gptq(weight, rows, 128)
    assert values.min() >= -8 and values.max() <= 7
    assert error(values, scale) < 0.2 * plain
    # Nothing is known of what enters: to nearest.
    values, scale = gptq(weight, rows[:0], 128)
    np.testing.assert_allclose(scale, nearest["scale"], rtol=1e-6)
    np.testing.assert_array_equal(values, unpack_int4(jnp.asarray(nearest["int4"]), 2, 0))


@pytest.fixture
def samples(tmp_path):
    """Two samples of text and one that cannot be read."""
    turns = [[("user", "Name two colours."), ("assistant", "Red, blue.")], [("user", "Hi."), ("assistant", "Hello!")]]
    records = [{"messages": [{"role": role, "content": text} for role, text in turn]} for turn in turns]
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in [records[0], {"messages": "none"}, records[1]]))
    return file


def test_a_calibrated_checkpoint_differs_in_its_int4_values_alone(checkpoints, tmp_path, samples, capsys):
    source = checkpoints / "mini-base"
    found = {}
    for name, calibrate in (("nearest", None), ("calibrated", samples)):
        convert(source, tmp_path / name, quantization=Quantization("int4"), calibrate=calibrate)
        found[name] = flatten_dict(load_params(tmp_path / name, Config.from_file(source)))
    assert "1 samples cannot be read, such as" in capsys.readouterr().err
    changed = {
        path[:-1] for path, array in found["nearest"].items() if not np.array_equal(found["calibrated"][path], array)
    }
    int4 = {path[:-1] for path in found["nearest"] if path[-1] == "int4"}
    assert changed and changed <= int4 and len(changed) > 0.9 * len(int4)


def test_a_file_of_no_use_is_an_error(checkpoints, tmp_path, samples):
    source = checkpoints / "mini-base"
    with pytest.raises(UsageError, match=r"--calibrate .*give both, or neither"):
        convert(source, tmp_path / "out", calibrate=samples)
    with pytest.raises(UsageError, match="no weight is kept so"):
        convert(source, tmp_path / "out", quantization=Quantization("int8"), calibrate=samples)
    samples.write_text('{"messages": 1}\n\n')
    with pytest.raises(DataError, match=r"no sample of it can be read .*samples.jsonl:1"):
        convert(source, tmp_path / "out", quantization=Quantization("int4"), calibrate=samples)
    with pytest.raises(DataError, match="not-there"):
        convert(source, tmp_path / "out", quantization=Quantization("int4"), calibrate=tmp_path / "not-there.jsonl")
    assert not (tmp_path / "out").exists()
