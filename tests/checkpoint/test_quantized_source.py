"""Weights that others have quantized are read as what they stand for, exactly; what cannot be read is named."""

from __future__ import annotations

import itertools
import json

import jax
import numpy as np
import pytest
import quantized_checkpoint
import released_checkpoint
from flax.traverse_util import flatten_dict

from dsvl2_jax.checkpoint import rules
from dsvl2_jax.checkpoint.load import load_params
from dsvl2_jax.checkpoint.safetensors_source import Source, numpy_dtype
from dsvl2_jax.convert.doctor import examine
from dsvl2_jax.convert.to_orbax import convert
from dsvl2_jax.convert.to_safetensors import export
from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.model.config import Config


@pytest.fixture
def mini(checkpoints, tmp_path):
    """A copy of mini-base that the test may quantize."""
    return released_checkpoint.copy(checkpoints / "mini-base", tmp_path / "mini")


def open_source(directory) -> Source:
    source = Source(directory)
    source.fit(Config.from_file(directory))
    return source


@pytest.mark.parametrize("form", quantized_checkpoint.FORMS)
def test_weights_are_read_as_what_they_stand_for(mini, form):
    meant = quantized_checkpoint.quantize(mini, form)
    with open_source(mini) as source:
        config = Config.from_file(mini)
        rules.check(source.shapes_and_dtypes, config, str(mini))
        for leaf in rules.expand(config):
            for dtype in ("float32", "bfloat16"):
                found = source.read_leaf(leaf, numpy_dtype(dtype))
                for name, part in leaf.parts(found):
                    expected = meant[name].float().numpy().astype(numpy_dtype(dtype))
                    np.testing.assert_array_equal(part, expected, err_msg=f"{name} in {dtype}")
            stays_float32 = (
                not quantized_checkpoint.is_quantized(leaf.sources[0]) and meant[leaf.sources[0]].itemsize == 4
            )
            assert source.leaf_dtype(leaf) == numpy_dtype("float32" if stays_float32 else "bfloat16")


def test_rows_begin_and_end_anywhere(mini):
    """As slices of a mesh and blocks of memory make them."""
    for form in ("fp8-blocks-cut-off", "int4-groups-zero-points", "nf4-nested"):
        directory = released_checkpoint.copy(mini, mini.parent / form)
        meant = quantized_checkpoint.quantize(directory, form)
        with open_source(directory) as source:
            name = "language.model.layers.0.mlp.down_proj.weight"  # [64, 176]
            tensor = source.tensors[name]
            for first, stop in itertools.combinations(range(0, 65, 7), 2):
                rows = tensor.rows(first, stop - first, source._read)
                np.testing.assert_array_equal(rows, meant[name][first:stop].numpy())


def test_a_slice_reads_its_own_rows_alone(mini, monkeypatch):
    meant = quantized_checkpoint.quantize(mini, "fp8-blocks-cut-off")
    with open_source(mini) as source:
        (leaf,) = (x for x in rules.expand(Config.from_file(mini)) if x.name.endswith("layers_0/mlp/gate_proj/kernel"))
        read = []
        original = Source._read
        monkeypatch.setattr(
            Source, "_read", lambda self, tensor, at, out: (read.append(out.nbytes), original(self, tensor, at, out))
        )
        window = slice(0, 64), slice(44, 88)  # a quarter of the outputs
        found = source.read_slice(leaf, window, np.dtype(np.float32))
        np.testing.assert_array_equal(found, meant[leaf.sources[0]].numpy().T[window])
        # 44 rows of 64 bytes, and the scales of the rows 24 to 96: 3 × 2 of 4 bytes.
        assert sum(read) == 44 * 64 + 3 * 2 * 4


def test_a_mesh_gets_what_one_device_does(mini):
    from dsvl2_jax.sharding import make_mesh

    quantized_checkpoint.quantize(mini, "int4-groups")
    config = Config.from_file(mini)
    mesh = make_mesh(tensor=2, expert=2, devices=jax.devices()[:4])
    one, split = (flatten_dict(load_params(mini, config, "float32", on)) for on in (None, mesh))
    for path, array in one.items():
        np.testing.assert_array_equal(array, split[path], err_msg=str(path))


def test_converted_and_exported_it_is_a_plain_checkpoint(mini, capsys):
    meant = quantized_checkpoint.quantize(mini, "fp8-blocks-128")
    converted = convert(mini, mini.parent / "converted")
    (note,) = (note for note in converted.notes if "quantized" in note)
    assert (
        "float8 with a scale for each block of 128 × 128 (routed experts, shared experts, encoder, attention," in note
    )
    assert "read as bfloat16" in note
    export(mini.parent / "converted", mini.parent / "exported")
    quantized = quantized_checkpoint.is_quantized
    expected = {name: tensor.bfloat16() if quantized(name) else tensor for name, tensor in meant.items()}
    released_checkpoint.assert_same_tensors(released_checkpoint.tensors(mini.parent / "exported"), expected)
    for directory in ("converted", "exported"):
        assert "quantization_config" not in json.loads((mini.parent / directory / "config.json").read_text())


def test_doctor_says_which_parts_are_quantized(mini):
    quantized_checkpoint.quantize(mini, "llm-int8")
    report = examine(mini)
    assert report.ok, report.problems
    assert {"int8", "bfloat16"} <= set(report.dtypes)
    assert any("int8 with a scale for each output (routed experts" in note for note in report.notes)


def edited(mini, form, edit):
    """The message with which a checkpoint is refused whose tensors ``edit`` has changed."""
    quantized_checkpoint.quantize(mini, form)
    tensors = released_checkpoint.tensors(mini)
    edit(tensors)
    released_checkpoint.put(mini, tensors)
    with pytest.raises(CheckpointError) as refusal:
        open_source(mini)
    return str(refusal.value)


LAYER = "language.model.layers.1.self_attn.o_proj"


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("fp8-blocks-128", {".weight_scale_inv": None}, f"{LAYER}.weight is F8_E4M3, but has no scale"),
        ("int8-channel", {".weight_scale": None}, f"{LAYER}.weight is I8, but has no scale"),
        (
            "fp8-blocks-cut-off",
            {".weight_scale_inv": (3, 1)},
            "found shape [3, 1], expected one of [3, 2], [64, 1], [64]",
        ),
        ("int8-channel", {".weight_scale": (7,)}, f"{LAYER}.weight_scale: found shape [7], expected one of"),
        ("llm-int8", {".SCB": (1, 64)}, f"{LAYER}.SCB: found shape [1, 64]"),
        ("llm-int8", {".weight_format": 2}, f"{LAYER}.weight_format: found 2, expected 0"),
        ("int8-zero-points", {".weight_zero_point": (3, 1)}, f"{LAYER}.weight_zero_point: found F32 [3, 1]"),
        ("int4-groups", {".weight_shape": None}, f"{LAYER}.weight_shape: missing"),
        ("int4-groups", {".weight_packed": (64, 7)}, f"{LAYER}.weight_packed: found F32 [64, 7]"),
        ("int4-groups", {".weight_scale": None}, f"{LAYER}.weight has no scale"),
        ("nf4-nested", {".weight.absmax": None}, f"{LAYER}.weight.absmax: missing; expected U8"),
        ("nf4-nested", {".weight.nested_absmax": (3,)}, f"{LAYER}.weight.nested_absmax: found 3 elements, expected 4"),
        ("nf4", {".weight.quant_map": (15,)}, f"{LAYER}.weight.quant_map: found shape [15], expected [16]"),
        ("nf4", {".weight": (3,)}, f"{LAYER}.weight, in bytes: found 12 elements, expected 2,048"),
        ("nf4", {".weight": None}, f"{LAYER}.weight is missing"),
    ],
)
def test_parts_that_are_missing_or_wrong_are_named(mini, form, change, message):
    torch = pytest.importorskip("torch")

    def edit(tensors):
        for ending, value in change.items():
            del tensors[LAYER + ending]
            if isinstance(value, tuple):
                tensors[LAYER + ending] = torch.zeros(value)
            elif value is not None:
                tensors[LAYER + ending] = torch.tensor(value, dtype=torch.uint8)

    found = edited(mini, form, edit)
    assert message in found and "1 quantized weights cannot be read" in found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "the weights are quantized as 'gptq', which is not read"),
        ({"quant_method": "awq"}, "the weights are quantized as 'awq', which is not read"),
        ({"bits": 4}, "something without a name, which is not read"),
        ("fp8", "quantization_config is no object"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config.format is 'sparse-24-bitmask', which is not read",
        ),
    ],
)
def test_formats_that_are_not_read_are_named(mini, settings, message):
    released_checkpoint.edit_json(mini / "config.json", lambda raw: raw.update(quantization_config=settings))
    with pytest.raises(CheckpointError) as refusal:
        open_source(mini)
    assert message in str(refusal.value)
    assert not examine(mini).ok


def test_tensors_of_other_formats_are_named(mini):
    def edit(tensors):
        tensors[f"{LAYER}.qweight"] = tensors.pop(f"{LAYER}.weight")

    tensors = released_checkpoint.tensors(mini)
    edit(tensors)
    released_checkpoint.put(mini, tensors)
    with pytest.raises(CheckpointError, match=r"quantized as GPTQ or AWQ, such as .*o_proj\.qweight"):
        open_source(mini)


def test_scales_of_activations_and_a_key_without_use_are_harmless(mini):
    torch = pytest.importorskip("torch")
    tensors = released_checkpoint.tensors(mini) | {f"{LAYER}.input_scale": torch.ones(1)}
    released_checkpoint.put(mini, tensors)
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    released_checkpoint.edit_json(mini / "config.json", lambda raw: raw.update(quantization_config=settings))
    with open_source(mini) as source:
        rules.check(source.shapes_and_dtypes, Config.from_file(mini), str(mini))
        assert any("1 scales of activations, such as" in note for note in source.notes)
        assert any("no weight is quantized" in note for note in source.notes)
