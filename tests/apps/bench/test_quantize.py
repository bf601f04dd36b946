"""The table of what quantized weights lose: its figures for a mini checkpoint, and the options."""

import json

import pytest

from dsvl2_jax.apps.bench.quantize import bench_quantize
from dsvl2_jax.errors import UsageError


def test_the_mini_checkpoints_loss_on_the_golden_prompts(checkpoints, data, capsys):
    name = str(checkpoints / "mini-tiny")
    bench_quantize(
        [name], kinds=["int8", "int4"], data=data / "golden_prompts.jsonl", samples=0, prompts=4, as_json=True
    )
    plain, int8, int4 = json.loads(capsys.readouterr().out)[name]
    assert plain["kl"] == 0 and plain["same"] == plain["quantized"] == plain["whole"] == plain["decode"] == 1
    assert 0 < int8["kl"] < 0.01 < int4["kl"] < 0.05
    assert int4["whole"] < int8["whole"] < 1 and int4["decode"] < int8["decode"] < 1
    assert int8["score"] is None


def test_wrong_options_are_named(tmp_path):
    with pytest.raises(UsageError, match="--quantize int5"):
        bench_quantize([], kinds=["int5"])
    with pytest.raises(UsageError, match="--prompts"):
        bench_quantize([], prompts=0)
    with pytest.raises(UsageError, match="--samples"):
        bench_quantize([], samples=-1)
