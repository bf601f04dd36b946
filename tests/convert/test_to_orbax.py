"""Conversion: bit for bit, in bounded memory, all or nothing; and a message for every checkpoint that does not fit."""

import json
import shutil
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import released_checkpoint
from flax.traverse_util import flatten_dict

from dsvl2_jax.apps.bench.random_checkpoint import random_checkpoint
from dsvl2_jax.checkpoint import orbax_io
from dsvl2_jax.checkpoint.load import load_params
from dsvl2_jax.checkpoint.locate import PARAMS_NAME, resolve
from dsvl2_jax.convert import to_orbax
from dsvl2_jax.convert.to_orbax import convert
from dsvl2_jax.convert.to_safetensors import export
from dsvl2_jax.errors import CheckpointError, ConfigError, TokenizerError, UsageError
from dsvl2_jax.model.config import Config

torch = pytest.importorskip("torch")

EXPERT = "language.model.layers.1.mlp.experts.{}.up_proj.weight"


@pytest.fixture
def mini(checkpoints, tmp_path):
    """A copy of mini-small that the test may damage."""
    return released_checkpoint.copy(checkpoints / "mini-small", tmp_path / "mini")


def round_trip(source, tmp_path, **options):
    """The tensors after convert and export."""
    convert(source, tmp_path / "converted", **options)
    export(tmp_path / "converted", tmp_path / "exported")
    return released_checkpoint.tensors(tmp_path / "exported")


@pytest.mark.parametrize("name", ["mini-tiny", "mini-small", "mini-base", "mini-small-f32"])
def test_round_trip_is_bit_identical(checkpoints, tmp_path, name):
    source = checkpoints / name
    released_checkpoint.assert_same_tensors(round_trip(source, tmp_path), released_checkpoint.tensors(source))
    carried = {file.name for file in source.iterdir() if file.suffix == ".json"} - {released_checkpoint.INDEX}
    for directory in (tmp_path / "converted", tmp_path / "exported"):
        for file in carried:
            assert (directory / file).read_bytes() == (source / file).read_bytes()


def test_tensors_of_different_dtypes_round_trip(mini, tmp_path):
    dtypes, random = (torch.float32, torch.float16, torch.bfloat16), np.random.default_rng(0)
    tensors = {name: t.to(dtypes[random.integers(3)]) for name, t in released_checkpoint.tensors(mini).items()}
    released_checkpoint.put(mini, tensors, shards=3)
    result = convert(mini, tmp_path / "out")
    assert "another dtype" in result.notes[0]
    config = Config.from_file(mini)
    params = load_params(tmp_path / "out", config)
    expert = np.stack([tensors[EXPERT.format(e)].float().numpy().T for e in range(8)])
    np.testing.assert_array_equal(params["language"]["layers_1"]["mlp"]["experts"]["up_proj"], expert)
    assert (
        params["language"]["embed_tokens"].dtype
        == {
            torch.float32: np.float32,
            torch.float16: np.float16,
            torch.bfloat16: ml_dtypes.bfloat16,
        }[tensors["language.model.embed_tokens.weight"].dtype]
    )
    export(tmp_path / "out", tmp_path / "back")
    released_checkpoint.assert_same_tensors(released_checkpoint.tensors(tmp_path / "back"), tensors)


def test_a_single_file_and_licence_files_convert(mini, tmp_path):
    tensors = released_checkpoint.tensors(mini)
    released_checkpoint.put(mini, tensors, shards=1)
    for name in ("LICENSE", "README.md", "tokenizer.model"):
        (mini / name).write_text(name)
    (mini / "pytorch_model.bin").write_text("not carried")
    released_checkpoint.assert_same_tensors(round_trip(mini, tmp_path), tensors)
    assert {"LICENSE", "README.md", "tokenizer.model"} < {file.name for file in (tmp_path / "converted").iterdir()}
    assert not (tmp_path / "converted" / "pytorch_model.bin").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_casts_every_tensor_as_torch_does(checkpoints, tmp_path, dtype):
    source = checkpoints / ("mini-small" if dtype == "float32" else "mini-small-f32")
    expected = {name: t.to(getattr(torch, dtype)) for name, t in released_checkpoint.tensors(source).items()}
    released_checkpoint.assert_same_tensors(round_trip(source, tmp_path, dtype=dtype), expected)


def test_little_memory_changes_nothing(checkpoints, tmp_path):
    source = checkpoints / "mini-small"
    released_checkpoint.assert_same_tensors(
        round_trip(source, tmp_path, max_memory="1B"), released_checkpoint.tensors(source)
    )


def test_many_batches_in_flight_and_chunked_leaves_change_nothing(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(to_orbax, "WRITE_BATCH_BYTES", 20_000)
    monkeypatch.setattr(orbax_io, "CHUNK_BYTES", 5_000)
    for name in ("mini-tiny", "mini-base"):
        (tmp_path / name).mkdir()
        source = checkpoints / name
        released_checkpoint.assert_same_tensors(
            round_trip(source, tmp_path / name), released_checkpoint.tensors(source)
        )


def test_memory_stays_near_the_largest_parameter(tmp_path, data):
    config = json.loads((data / "checkpoints" / "mini-tiny" / "config.json").read_text())
    config["language_config"] |= {"hidden_size": 512, "moe_intermediate_size": 1024, "num_hidden_layers": 5}
    config["language_config"] |= {"n_routed_experts": 32}
    config["projector_config"]["n_embed"] = 512
    total = random_checkpoint(tmp_path / "large", config)
    assert total > 400e6
    script = (
        "import resource, sys; from dsvl2_jax.convert.to_orbax import convert;"
        "from dsvl2_jax.model.quantization import Quantization;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "convert(sys.argv[1], sys.argv[2], max_memory='100MiB');"
        "convert(sys.argv[1], sys.argv[2] + '-int4', max_memory='100MiB', quantization=Quantization('int4'));"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "large"), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) * 1024 < 0.4 * total
    shutil.rmtree(tmp_path / "large")
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out-int4")


# Where a conversion is killed: (name, what to replace, how many calls are let through first).
MOMENTS = {
    "first write": ("orbax_io.ParamWriter.write", 0),
    "after a write": ("orbax_io.ParamWriter.write", 1),
    "before the checkpoint is assembled": ("orbax_io.ParamWriter.finalize", 0),
    "before the manifest": ("to_orbax.write_manifest", 0),
    "before the rename": ("staging.sync_tree", 0),
}
KILL_SCRIPT = """
import os, signal, sys
from dsvl2_jax.checkpoint import orbax_io, staging
from dsvl2_jax.convert import to_orbax
to_orbax.WRITE_BATCH_BYTES = 200_000
owner, name = sys.argv[3].rsplit(".", 1)
for part in owner.split("."):
    owner = globals()[part] if isinstance(owner, str) else getattr(owner, part)
original, left = getattr(owner, name), [int(sys.argv[4])]
def replaced(*args, **kwargs):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return original(*args, **kwargs)
setattr(owner, name, replaced)
to_orbax.convert(sys.argv[1], sys.argv[2])
"""


def test_a_killed_conversion_leaves_nothing_to_load_and_a_rerun_finishes(checkpoints, tmp_path):
    source = checkpoints / "mini-small"
    config, runs = Config.from_file(source), {}
    for moment, (target, calls) in MOMENTS.items():
        (tmp_path / moment).mkdir()
        command = [sys.executable, "-c", KILL_SCRIPT, str(source), str(tmp_path / moment / "out"), target, str(calls)]
        runs[moment] = subprocess.Popen(command, stderr=subprocess.PIPE)
    for moment, run in runs.items():
        _, stderr = run.communicate()
        assert run.returncode == -signal.SIGKILL, stderr.decode()
        (left,) = (tmp_path / moment).iterdir()
        assert left.name != "out"
        with pytest.raises(CheckpointError, match="unfinished conversion"):
            load_params(left, config)
        with pytest.raises(CheckpointError, match="no such directory"):
            resolve(tmp_path / moment / "out")
    for moment in ("after a write", "before the rename"):
        convert(source, tmp_path / moment / "out")
        assert [file.name for file in (tmp_path / moment).iterdir()] == ["out"]
        load_params(tmp_path / moment / "out", config)


# ---- what can be wrong with a checkpoint: (how to break it, the error, what its message must contain)


def change_tensors(directory, edit):
    tensors = released_checkpoint.tensors(directory)
    edit(tensors)
    released_checkpoint.put(directory, tensors)


def set_language(directory, **values):
    released_checkpoint.edit_json(directory / "config.json", lambda c: c["language_config"].update(values))


def remove_language(directory, key):
    released_checkpoint.edit_json(directory / "config.json", lambda c: c["language_config"].pop(key))


BAD = {
    "missing tensor": (
        lambda d: change_tensors(d, lambda t: t.pop("image_newline")),
        CheckpointError,
        ["1 missing tensors", "image_newline [64]"],
    ),
    "unknown tensor": (
        lambda d: change_tensors(d, lambda t: t.update(extra=torch.zeros(3))),
        CheckpointError,
        ["1 unknown tensors", "extra [3]"],
    ),
    "wrong shape": (
        lambda d: change_tensors(d, lambda t: t.update(image_newline=torch.zeros(65))),
        CheckpointError,
        ["image_newline: found [65], expected [64]"],
    ),
    "integer tensor": (
        lambda d: change_tensors(d, lambda t: t.update(image_newline=torch.zeros(64, dtype=torch.int8))),
        CheckpointError,
        ["image_newline is I8, but has no scale"],
    ),
    "config of another model": (
        lambda d: set_language(d, num_hidden_layers=4),
        CheckpointError,
        ["missing tensors", "language.model.layers.3.", "and ", " more", "config.json"],
    ),
    "no config": (lambda d: (d / "config.json").unlink(), ConfigError, ["config.json", "not found"]),
    "config without routing method": (
        lambda d: remove_language(d, "topk_method"),
        ConfigError,
        ["config.json", "topk_method"],
    ),
    "unknown routing method": (lambda d: set_language(d, topk_method="dice"), ConfigError, ["topk_method", "dice"]),
    "no processor config": (lambda d: (d / "processor_config.json").unlink(), ConfigError, ["processor_config.json"]),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), TokenizerError, ["tokenizer.json"]),
    "tokenizer without bos": (
        lambda d: [
            released_checkpoint.edit_json(d / name, lambda c: c.pop("bos_token", None))
            for name in ("tokenizer_config.json", "special_tokens_map.json")
        ],
        TokenizerError,
        ["bos_token"],
    ),
    "special tokens outside the embedding": (
        lambda d: set_language(d, vocab_size=900),
        TokenizerError,
        ["embedding of 900 rows", "<image>"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_broken_source_is_named_before_anything_is_written(mini, tmp_path, case):
    damage, error_type, parts = BAD[case]
    damage(mini)
    with pytest.raises(error_type) as error:
        convert(mini, tmp_path / "out")
    for part in parts:
        assert part in str(error.value)
    assert error.value.exit_status == 1
    assert [file.name for file in tmp_path.iterdir()] == ["mini"]


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "4 gallons", "1.2.3GB", "nan", "1e400"])
def test_nonsense_sizes_are_a_usage_error(text, checkpoints, tmp_path):
    with pytest.raises(UsageError, match="is not a size"):
        convert(checkpoints / "mini-small", tmp_path / "out", max_memory=text)


def test_an_unknown_dtype_is_a_usage_error(checkpoints, tmp_path):
    with pytest.raises(UsageError, match="int8"):
        convert(checkpoints / "mini-small", tmp_path / "out", dtype="int8")


def test_nothing_of_ours_imports_torch():
    script = (
        "import sys; from dsvl2_jax.convert import doctor, to_orbax, to_safetensors;"
        "from dsvl2_jax.apps.bench import convert;"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_converted_parameters_are_plain_orbax(checkpoints, tmp_path):
    """Without any of our reading code."""
    import orbax.checkpoint.experimental.v1 as ocp

    convert(checkpoints / "mini-tiny", tmp_path / "out")
    tree = ocp.load(tmp_path / "out" / PARAMS_NAME)
    expected = load_params(checkpoints / "mini-tiny", Config.from_file(checkpoints / "mini-tiny"))
    found, wanted = flatten_dict(tree), flatten_dict(expected)
    assert found.keys() == wanted.keys()
    for path, array in found.items():
        np.testing.assert_array_equal(np.asarray(array, np.float32), np.asarray(wanted[path], np.float32), str(path))
