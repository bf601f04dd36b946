"""The table of what quantized weights lose: its figures for a mini checkpoint, and the options."""

import json
import shutil

import pytest

from dsvl2_jax.apps.bench.quantize import bench_quantize
from dsvl2_jax.errors import UsageError


def test_the_mini_checkpoints_loss_on_golden_prompts(checkpoints, data, tmp_path, capsys):
    name = str(checkpoints / "mini-tiny")
    lines = [json.loads(line) for line in (data / "golden_prompts.jsonl").read_text().splitlines()]
    short = [line for line in lines if line["id"] in ("text", "text_zh_code", "img_tiny20")]
    (tmp_path / "images").mkdir()
    shutil.copy(data / "images" / "tiny_20x20.png", tmp_path / "images")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in short))
    bench_quantize([name], kinds=["int8", "int4"], data=prompts, samples=0, as_json=True)
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
