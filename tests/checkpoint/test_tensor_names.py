"""Checkpoints as other tools write them: what means the same is read and noted, the rest is refused by name."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import released_checkpoint
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

import dsvl2_jax
from dsvl2_jax.checkpoint.load import load_params
from dsvl2_jax.checkpoint.locate import MANIFEST_NAME, kind
from dsvl2_jax.convert.doctor import examine
from dsvl2_jax.convert.to_orbax import convert
from dsvl2_jax.convert.to_safetensors import export
from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.model.config import Config

NAME = "mini-small-f32"  # numpy has its dtype
POOL = "vision.attn_pool."
LAYER = "language.model.layers.0.self_attn."


@pytest.fixture(scope="module")
def tensors(checkpoints):
    """All tensors of the checkpoint."""
    found = {}
    for file in (checkpoints / NAME).glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.fixture(scope="module")
def config(checkpoints):
    return Config.from_file(checkpoints / NAME)


@pytest.fixture(scope="module")
def expected(checkpoints, config):
    return flatten_dict(jax.device_get(load_params(checkpoints / NAME, config)))


@pytest.fixture
def written(checkpoints, tmp_path):
    """Writes tensors as a checkpoint, in as many files as there are dicts, without an index."""

    def write(*files):
        directory = released_checkpoint.copy(checkpoints / NAME, tmp_path / "source")
        for file in [*directory.glob("*.safetensors"), directory / released_checkpoint.INDEX]:
            file.unlink()
        for number, content in enumerate(files):
            save_file(content, directory / f"part{number}.safetensors")
        return directory

    return write


def frequencies(config, theta=10000.0):
    width = config.language.qk_rope_head_dim
    return (theta ** -(np.arange(0, width, 2) / width)).astype(np.float32)


# How the tensors of a checkpoint may be written, and what is noted.
TOLERATED = {
    "one more prefix": (lambda t, c: [{f"model.{name}": x for name, x in t.items()}], ["begin with 'model.'"]),
    "two more prefixes": (
        lambda t, c: [{f"module._orig_mod.{name}": x for name, x in t.items()}],
        ["begin with 'module.'", "wrappers add"],
    ),
    "wrappers inside": (
        lambda t, c: [{name.replace("language.", "language._orig_mod."): x for name, x in t.items()}],
        ["names have parts that wrappers add"],
    ),
    "a prefix and buffers under it": (
        lambda t, c: [
            {f"model.{name}": x for name, x in t.items()}
            | {f"model.{LAYER}rotary_emb.inv_freq": frequencies(c), "model.vision.position_ids": np.arange(4)}
        ],
        ["begin with 'model.'", "2 buffers that are no parameters are not used"],
    ),
    "several files without an index": (
        lambda t, c: [dict(list(t.items())[i::3]) for i in range(3)],
        ["all 3 files *.safetensors are read"],
    ),
}


@pytest.mark.parametrize("case", TOLERATED)
def test_what_means_the_same_is_read_with_a_note(written, tensors, config, expected, tmp_path, capsys, case):
    change, notes = TOLERATED[case]
    directory = written(*change(tensors, config))
    found = flatten_dict(load_params(directory, config))
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, str(path))
    said = capsys.readouterr().err
    report = examine(directory)
    assert report.ok and len(report.notes) == len(notes)
    convert(directory, tmp_path / "converted")
    assert len(capsys.readouterr().err.splitlines()) == len(notes) + 1
    kept = json.loads((tmp_path / "converted" / MANIFEST_NAME).read_text())["notes"]
    for note in notes:
        assert said.count(note) == 1
        assert sum(note in text for text in kept) == 1
    assert examine(tmp_path / "converted").notes == kept
    export(tmp_path / "converted", tmp_path / "exported")
    again = {}
    for file in (tmp_path / "exported").glob("*.safetensors"):
        again |= load_file(file)
    assert again.keys() == tensors.keys()
    assert all(np.array_equal(again[name], tensors[name]) for name in tensors)


def test_the_unused_part_may_be_absent_and_export_says_that_it_leaves_it_out(
    written, tensors, config, expected, tmp_path, capsys
):
    used = {name: x for name, x in tensors.items() if not name.startswith(POOL)}
    directory = written(used)
    convert(directory, tmp_path / "converted")
    assert capsys.readouterr().err.count(f"no {POOL}*") == 1
    for source in (directory, tmp_path / "converted"):
        found = flatten_dict(load_params(source, config))
        for path, value in expected.items():
            np.testing.assert_array_equal(found[path], 0 * value if "attn_pool" in path else value, str(path))
        report = examine(source)
        assert report.ok and f"no {POOL}*" in "".join(report.notes)
        assert report.parameters["TOTAL"] == sum(x.size for x in used.values())
    capsys.readouterr()
    export(tmp_path / "converted", tmp_path / "exported")
    assert f"left out: {POOL}*" in capsys.readouterr().err
    again = {}
    for file in (tmp_path / "exported").glob("*.safetensors"):
        again |= load_file(file)
    assert again.keys() == used.keys()


def without(tensors, *names):
    return {name: x for name, x in tensors.items() if name not in names}


REFUSED = {
    "an adapter's names": (
        lambda t, c: {f"base_model.model.{LAYER}q_proj.lora_A.weight": np.ones((2, 2), np.float32)},
        [r"belong to an adapter", "dsvl2 merge CHECKPOINT ADAPTER", "lora_A"],
    ),
    "a base model inside an adapter": (
        lambda t, c: {name.replace("o_proj.", "o_proj.base_layer."): x for name, x in t.items()},
        [r"belong to an adapter", "base_layer"],
    ),
    "a part of the unused part": (
        lambda t, c: without(t, f"{POOL}latent"),
        [r"1 missing tensors:\n +vision\.attn_pool\.latent"],
    ),
    "one tensor under two names": (
        lambda t, c: t | {"_orig_mod.image_newline": t["image_newline"]},
        ["two tensors stand for image_newline: .*_orig_mod.image_newline"],
    ),
    "rotary frequencies of another model": (
        lambda t, c: t | {f"{LAYER}rotary_emb.inv_freq": frequencies(c, 500000.0)},
        [r"inv_freq holds .* but config\.json's rope_theta 10000\.0 gives"],
    ),
    "an unknown tensor under a prefix": (
        lambda t, c: {f"model.{name}": x for name, x in t.items()} | {"model.value_head.weight": np.ones(2)},
        [r"1 unknown tensors:\n +value_head\.weight"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_mean_the_same_is_refused_by_name(written, tensors, config, tmp_path, case):
    change, messages = REFUSED[case]
    directory = written(change(tensors, config))
    for use in (lambda: load_params(directory, config), lambda: convert(directory, tmp_path / "converted")):
        for message in messages:
            with pytest.raises(CheckpointError, match=message):
                use()
    assert not examine(directory).ok
    assert not (tmp_path / "converted").exists()


def test_half_precision_loads(written, tensors, config):
    directory = written({name: x.astype(np.float16) for name, x in tensors.items()})
    params = load_params(directory, config, "float32")
    np.testing.assert_array_equal(
        params["image_newline"], tensors["image_newline"].astype(np.float16).astype(np.float32)
    )


def test_an_adapter_alone_is_told_how_to_become_a_model(written, tensors):
    directory = written()
    save_file({"lora_A": np.ones(2)}, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds an adapter, which is no model by itself: give it as --adapter"):
        kind(directory)


def test_weights_of_another_kind_are_named(written):
    directory = written()
    (directory / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"not a checkpoint.*model\.gguf, is of a kind that is not read"):
        dsvl2_jax.load(directory)
