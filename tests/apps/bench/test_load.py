"""`dsvl2 bench load`: each process holds its shard, and reads little more from either layout."""

from __future__ import annotations

import json
import math

import pytest
from flax.traverse_util import flatten_dict

from dsvl2_jax.apps.bench.load import bench_load
from dsvl2_jax.apps.bench.random_checkpoint import random_checkpoint
from dsvl2_jax.apps.cli.main import main
from dsvl2_jax.convert.to_orbax import convert
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import abstract_leaves, entry_axes, param_shardings
from dsvl2_jax.model.parameter_paths import path_name
from dsvl2_jax.sharding import make_mesh

MESHES = {2: {"expert": 2}, 4: {"tensor": 2, "expert": 2}}


@pytest.fixture(scope="module")
def layouts(data, tmp_path_factory):
    """(configuration, directory of each layout) of a checkpoint whose large parameters are stored in pieces."""
    content = json.loads((data / "checkpoints" / "mini-tiny" / "config.json").read_text())
    content["language_config"] |= {"hidden_size": 512, "moe_intermediate_size": 384, "intermediate_size": 3072}
    content["language_config"] |= {"num_attention_heads": 8, "num_key_value_heads": 8, "n_routed_experts": 16}
    content["language_config"] |= {"vocab_size": 8192, "num_hidden_layers": 3}
    content["projector_config"]["n_embed"] = 512
    work = tmp_path_factory.mktemp("load")
    random_checkpoint(work / "released", content)
    convert(work / "released", work / "orbax")
    return Config.from_dict(content), {name: work / name for name in ("released", "orbax")}


@pytest.mark.parametrize("count", MESHES)
def test_each_process_holds_its_shard_and_reads_little_more(layouts, count, capsys):
    import jax

    config, directories = layouts
    mesh = make_mesh(**MESHES[count], devices=jax.devices()[:count])
    shardings = flatten_dict(param_shardings(config, mesh))
    leaves = {path: shape for path, (shape, _) in abstract_leaves(config).items()}
    sizes = {path: (4 if "router" in path else 2) for path in leaves}  # bytes of an entry
    shard = sum(math.prod(shardings[path].shard_shape(shape)) * sizes[path] for path, shape in leaves.items())
    whole = sum(math.prod(shape) * sizes[path] for path, shape in leaves.items())
    assert whole > 50e6 and shard < 0.6 * whole
    for layout, directory in directories.items():
        found = bench_load(str(directory), count=count)[layout]
        assert [one.process for one in found] == list(range(count))
        for one in found:
            assert one.shard == shard
            assert one.leaf == max(math.prod(shape) * sizes[path] for path, shape in leaves.items())
            assert 0.9 * shard < one.read < 0.7 * whole, one  # leaves under 1 MiB are read whole
            assert one.baseline > 50e6 and one.peak > 0
        assert (
            f"{layout}, data=1, tensor={MESHES[count].get('tensor', 1)}, expert=2, bfloat16" in capsys.readouterr().out
        )


def test_experts_and_heads_have_one_axis_each(layouts):
    config, _ = layouts
    axes = {path_name(path): axis for path, axis in entry_axes(config).items()}
    assert axes["language/layers_1/mlp/experts/gate_proj"] == 0
    assert axes["language/layers_1/self_attn/q_proj/kernel"] == axes["language/layers_1/self_attn/v_proj/kernel"] == 1
    assert axes["language/layers_1/self_attn/o_proj/kernel"] == 0
    assert not any("vision" in path or "embed_tokens" in path for path in axes)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--processes", "0"], 2, "--processes: found 0"),
        (["--processes", "2", "--mesh", "expert=3"], 2, "expert=3 needs 3 devices, but there are 2"),
        (["nowhere"], 1, "nowhere: no such directory"),
    ],
)
def test_wrong_calls_are_named(arguments, status, message, capsys):
    assert main(["bench", "load", *arguments]) == status
    assert message in capsys.readouterr().err


def test_a_process_that_fails_ends_the_measurement(layouts, tmp_path, capfd):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in layouts[1]["released"].iterdir():
        if file.suffix == ".json":
            (broken / file.name).symlink_to(file)
    (broken / "model.safetensors.index.json").write_text("{}")
    assert main(["bench", "load", str(broken), "--dtype", "bfloat16"]) == 1
    errors = capfd.readouterr().err
    assert "not an index of shards" in errors and f"{broken}: process 0 ended with status 1" in errors
