"""Quantized checkpoints: converted, loaded, examined, exported, placed on a mesh; and what can be wrong with one."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released_checkpoint
from flax.traverse_util import flatten_dict, unflatten_dict

from dsvl2_jax.checkpoint import orbax_io
from dsvl2_jax.checkpoint.load import load_params, open_orbax
from dsvl2_jax.checkpoint.locate import MANIFEST_NAME, PARAMS_NAME, read_manifest
from dsvl2_jax.convert import to_orbax
from dsvl2_jax.convert.doctor import examine
from dsvl2_jax.convert.to_orbax import convert
from dsvl2_jax.convert.to_safetensors import export
from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.kernels.quantized import KINDS, Quantized, dequantize, quantize
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import embed_tokens, forward, output_logits, weight_inputs
from dsvl2_jax.model.quantization import Quantization, kinds_of, quantization_of, quantized_weights
from dsvl2_jax.sharding import make_mesh

WEIGHT = ("language", "layers_1", "mlp", "experts", "up_proj")


@pytest.fixture(scope="module")
def source(checkpoints):
    return checkpoints / "mini-base"


@pytest.fixture(scope="module")
def config(source):
    return Config.from_file(source)


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """Kind → directory."""
    folder = tmp_path_factory.mktemp("quantized")
    for kind in KINDS:
        convert(source, folder / kind, quantization=Quantization(kind))
    return {kind: folder / kind for kind in KINDS}


def dequantized(params, config):
    """The same parameters as plain arrays of float32."""
    flat, inputs = flatten_dict(params), weight_inputs(config)
    for path, kind in kinds_of(flat).items():
        values, scale = flat.pop((*path, kind)), flat.pop((*path, "scale"))
        flat[path] = dequantize(Quantized(values, scale, kind, inputs[path][-1] - values.ndim), jnp.float32)
    return unflatten_dict(flat)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_the_source_rounded(source, config, converted, kind):
    found = flatten_dict(load_params(converted[kind], config, "float32"))
    plain = flatten_dict(load_params(source, config))
    kinds, inputs = quantized_weights(config, Quantization(kind)), weight_inputs(config)
    assert kinds_of(found) == kinds
    for path, array in plain.items():
        if path not in kinds:
            np.testing.assert_array_equal(found[path], array.astype(np.float32))
            continue
        values, scale = (found[*path, name] for name in (kinds[path], "scale"))
        expected = quantize(np.asarray(array), kinds[path], inputs[path])
        np.testing.assert_allclose(scale, expected["scale"], rtol=1e-6)
        same = np.asarray(values).view(np.uint8) == expected[kinds[path]].view(np.uint8)
        assert same.mean() > 0.99  # of those half-way between two values XLA may take the other


def test_large_weights_are_rounded_in_parts_to_the_same(monkeypatch):
    weight = np.random.default_rng(0).normal(size=(6, 32, 20)).astype(np.float32)
    expected = {kind: to_orbax.quantize_in_parts(weight, kind, (1,)) for kind in KINDS}
    monkeypatch.setattr(to_orbax, "_ROUND_AT_ONCE", 32 * 20 * 4)
    for kind, whole in expected.items():
        for name, array in to_orbax.quantize_in_parts(weight, kind, (1,)).items():
            assert array.shape == whole[name].shape and array.dtype == whole[name].dtype
            same = array.view(np.uint8) == whole[name].view(np.uint8)
            assert same.mean() > 0.98 if name == kind else np.allclose(array, whole[name], rtol=1e-6)


def test_logits_are_those_of_the_dequantized_weights(config, converted):
    params = load_params(converted["int4"], config, "float32")
    plain = dequantized(params, config)
    whole = config
    config = dataclasses.replace(config, language=dataclasses.replace(config.language, num_hidden_layers=2))
    ids = jnp.arange(2 * 16).reshape(2, 16)

    @jax.jit
    def logits(params):
        return output_logits(params, config, forward(params, config, embed_tokens(params, config, ids)))

    expected = logits(plain)
    np.testing.assert_allclose(logits(params), expected, atol=2e-5 * np.abs(expected).max())
    mesh = make_mesh(2, 2, 2)
    placed = load_params(converted["int4"], whole, "float32", mesh)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(logits(placed), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["int4", "float8"])
def test_export_gives_the_values_times_their_scales_which_quantize_to_the_same(
    source, config, converted, tmp_path, capsys, kind
):
    export(converted[kind], tmp_path / "exported")
    assert "rounding took" in capsys.readouterr().err
    ours, theirs = (released_checkpoint.tensors(path) for path in (source, tmp_path / "exported"))
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    convert(tmp_path / "exported", tmp_path / "again", quantization=Quantization(kind))
    before, after = (
        flatten_dict(dequantized(load_params(path, config), config)) for path in (converted[kind], tmp_path / "again")
    )
    for path, array in before.items():
        np.testing.assert_allclose(np.asarray(after[path], np.float32), np.asarray(array, np.float32), rtol=0.008)


def test_int8_exports_to_float32_without_loss(config, converted, tmp_path, capsys):
    export(converted["int8"], tmp_path / "exported", dtype="float32")
    assert "rounds" not in capsys.readouterr().err
    expected = flatten_dict(dequantized(load_params(converted["int8"], config, "float32"), config))
    for path, array in flatten_dict(load_params(tmp_path / "exported", config)).items():
        np.testing.assert_array_equal(array, expected[path])


def test_manifest_and_doctor_say_how(config, converted):
    manifest, stored = open_orbax(converted["int4"], config)
    assert manifest["quantization"] == Quantization("int4").described()
    assert manifest["quantization"]["kind"] == "int4" and manifest["quantization"]["group"] == 128
    assert set(manifest["parameters"]) == {"/".join(path) for path in stored}
    report = examine(converted["int4"], verify=True)
    assert report.ok and set(report.quantized) == {"int4", "int8"}
    assert report.bfloat16_bytes < examine(converted["int8"]).bfloat16_bytes


def test_a_converted_directory_is_quantized_as_its_source(source, config, converted, tmp_path):
    convert(source, tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "out", quantization=Quantization("int4"))
    expected = flatten_dict(load_params(converted["int4"], config))
    for path, array in flatten_dict(load_params(tmp_path / "out", config)).items():
        np.testing.assert_array_equal(array, expected[path])
    assert read_manifest(tmp_path / "out")["source_sha256"] == read_manifest(tmp_path / "plain")["source_sha256"]
    with pytest.raises(CheckpointError, match="quantized already"):
        convert(tmp_path / "out", tmp_path / "twice", quantization=Quantization("int8"))
    with pytest.raises(CheckpointError, match="converted checkpoint already"):
        convert(tmp_path / "out", tmp_path / "twice")


def test_a_mesh_gets_each_value_with_its_scale(source, config, tmp_path):
    every = quantization_of("int4", [".=int4"])
    convert(source, tmp_path / "out", quantization=every, max_memory="1B")
    one = flatten_dict(load_params(tmp_path / "out", config))
    for fsdp in (False, True):
        for path, array in flatten_dict(
            load_params(tmp_path / "out", config, mesh=make_mesh(2, 2, 2), fsdp=fsdp)
        ).items():
            np.testing.assert_array_equal(array, one[path])
            assert len(array.sharding.device_set) == 8
    values = load_params(tmp_path / "out", config, mesh=make_mesh(1, 2, 4))["language"]["layers_1"]["mlp"]["experts"]
    assert values["up_proj"]["int4"].sharding.spec == values["up_proj"]["scale"].sharding.spec


KILL = """
import os, signal, sys
from dsvl2_jax.convert import to_orbax
from dsvl2_jax.model.quantization import Quantization
left = [3]
def quantize(*args, **options):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **options)
original, to_orbax.quantize_in_parts = to_orbax.quantize_in_parts, quantize
to_orbax.convert(sys.argv[1], sys.argv[2], quantization=Quantization("int4"))
"""


def test_a_killed_quantization_leaves_nothing_to_load(source, config, tmp_path):
    run = subprocess.run([sys.executable, "-c", KILL, str(source), str(tmp_path / "out")], capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", quantization=Quantization("int4"))
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    load_params(tmp_path / "out", config, verify=True)


def rewritten(directory, config, edit, quantization=None):
    """The checkpoint with other arrays and a manifest that fits them, as another program may write it."""
    _, stored = open_orbax(directory, config)
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    structs = {path: jax.ShapeDtypeStruct(*entry, sharding=host) for path, entry in stored.items()}
    arrays = {path: np.asarray(array) for path, array in orbax_io.read(directory / PARAMS_NAME, structs).items()}
    edit(arrays)
    shutil.rmtree(directory / PARAMS_NAME)
    with orbax_io.ParamWriter(directory / PARAMS_NAME, {}) as writer:
        writer.write(arrays)
        writer.finalize()
    (directory / MANIFEST_NAME).unlink()
    plan = {path: (array.shape, array.dtype) for path, array in arrays.items()}
    to_orbax.write_manifest(directory, plan, source="", mixed={}, own_digests={}, quantization=quantization)


def test_a_damaged_scale_is_named(config, converted, tmp_path):
    def infinite(arrays):
        arrays[*WEIGHT, "scale"] = np.full_like(arrays[*WEIGHT, "scale"], np.inf)

    def cut(arrays):
        arrays[*WEIGHT, "scale"] = arrays[*WEIGHT, "scale"][:, :, :-1]

    copy = released_checkpoint.copy(converted["int8"], tmp_path / "infinite")
    rewritten(copy, config, infinite, Quantization("int8"))
    report = examine(copy)
    assert not report.ok and any("up_proj/scale" in problem for problem in report.problems)
    copy = released_checkpoint.copy(converted["int8"], tmp_path / "cut")
    rewritten(copy, config, cut, Quantization("int8"))
    with pytest.raises(CheckpointError, match=r"up_proj/scale: found \[12, 1, 31\], expected \[12, 1, 32\]"):
        load_params(copy, config)


def test_a_manifest_that_says_otherwise_is_refused(config, converted, tmp_path):
    copy = released_checkpoint.copy(converted["int8"], tmp_path / "copy")
    rewritten(copy, config, lambda arrays: None)
    with pytest.raises(CheckpointError, match="the manifest says nothing"):
        load_params(copy, config)
    manifest = json.loads((converted["int8"] / MANIFEST_NAME).read_text())
    assert manifest["parameters"]["/".join((*WEIGHT, "int8"))] == {"shape": [12, 64, 32], "dtype": "int8"}
