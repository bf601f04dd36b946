"""Adapters as files: what is written is read again, and what cannot be read is told. Against peft: test_peft.py."""

import dataclasses
import json
import re

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from dsvl2_jax.checkpoint import adapters, rules
from dsvl2_jax.checkpoint.adapters import AdapterSettings, read_adapter, write_adapter
from dsvl2_jax.checkpoint.peft_config import shortest_targets
from dsvl2_jax.errors import CheckpointError, UsageError
from dsvl2_jax.model.config import Config

ATTENTION = "base_model.model.language.model.layers.0.self_attn."
EXPERT = "base_model.model.language.model.layers.1.mlp.experts."


@pytest.fixture(scope="module")
def config(checkpoints):
    return Config.from_file(checkpoints / "mini-small")


def drawn(config, described, names, dtype=np.float32):
    """An adapter of random numbers for the parameters of these names."""
    rng = np.random.default_rng(0)
    leaves = [leaf for leaf in rules.linear_leaves(config).values() if leaf.name in names]
    return unflatten_dict(
        {
            (*leaf.path, part): rng.normal(size=shape).astype(dtype)
            for leaf in leaves
            for part, shape in adapters.array_shapes(leaf, described.rank_of(leaf.name)).items()
            if part != "magnitude" or described.kind == "dora"
        }
    )


def assert_same(found, expected):
    found, expected = flatten_dict(found), flatten_dict(expected)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype
        np.testing.assert_array_equal(found[path], array, str(path))


@given(data=st.data())
@settings(max_examples=25)
def test_what_is_written_is_read_again(data, config, tmp_path_factory):
    names = [leaf.name for leaf in rules.linear_leaves(config).values()]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=6, unique=True))
    alphas = st.one_of(st.integers(1, 64), st.floats(0.125, 64))
    described = AdapterSettings(
        data.draw(st.sampled_from(["lora", "dora"])),
        data.draw(st.integers(1, 5)),
        float(data.draw(alphas)),
        data.draw(st.floats(0, 0.9)),
        data.draw(st.text(max_size=5)),
        data.draw(st.booleans()),
        data.draw(st.sampled_from(["", "deepseek-ai/deepseek-vl2-small"])),
        data.draw(st.sampled_from([None, "12ab-34cd"])),
    )
    ranks = data.draw(st.dictionaries(st.sampled_from(chosen), st.integers(1, 5)))
    own = data.draw(st.dictionaries(st.sampled_from(chosen), alphas.map(float)))
    ranks = {name: rank for name, rank in ranks.items() if rank != described.rank}
    own = {name: alpha for name, alpha in own.items() if alpha != described.alpha}
    described = dataclasses.replace(described, ranks=ranks, alphas=own)
    dtype = data.draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
    adapter = drawn(config, described, chosen, dtype)
    directory = tmp_path_factory.mktemp("adapter") / "one"
    write_adapter(directory, config, adapter, described)
    found, again = read_adapter(directory, config)
    assert again == described
    assert_same(found, adapter)


def test_targets_are_named_as_peft_finds_them():
    """By the ends of names, which no other module of the model has, be it one with weights or a layer."""
    modules = ["a.layers.0.q", "a.layers.0.mlp.up", "a.layers.1.q", "a.layers.1.mlp.up", "b.layers.0.q", "c.layers.0"]
    for chosen, expected in (
        ({"a.layers.0.mlp.up", "a.layers.1.mlp.up"}, ["up"]),
        ({"a.layers.0.q", "a.layers.1.q"}, ["1.q", "a.layers.0.q"]),
        ({"c.layers.0"}, ["c.layers.0"]),
        (set(modules), ["c.layers.0", "q", "up"]),
    ):
        assert shortest_targets(chosen, modules) == expected
        found = {name for name in modules if any(f".{name}".endswith(f".{end}") for end in expected)}
        assert found == chosen


NAMES = ("language/layers_0/self_attn/o_proj/kernel", "language/layers_1/mlp/experts/up_proj")


@pytest.fixture
def written(config, tmp_path):
    """A function that writes an adapter, changed: the tensors or the keys of its adapter_config.json."""

    def write(change=lambda tensors: tensors, kind="lora", **keys):
        directory = tmp_path / "adapter"
        described = AdapterSettings(kind, 3, 6.0)
        write_adapter(directory, config, drawn(config, described, NAMES), described)
        (directory / adapters.MANIFEST_NAME).unlink()
        tensors = change(load_file(directory / adapters.WEIGHTS_NAME))
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, directory / adapters.WEIGHTS_NAME)
        path = directory / adapters.CONFIG_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
        return directory

    return write


def renamed(old, new):
    return lambda tensors: {re.sub(old, new, name): x for name, x in tensors.items()}


FORMS = {
    "wrapped": renamed("base_model.model.", "module.base_model.model._orig_mod."),
    "a language model's": renamed("language.", ""),
    "with the adapter's name": renamed(r"(lora_[AB])\.weight", r"\1.mine.weight"),
    "without a prefix": renamed("base_model.model.", ""),
}


@pytest.mark.parametrize("form", FORMS)
def test_names_as_tools_write_them_are_read(form, written, config):
    found, described = read_adapter(written(FORMS[form]), config)
    assert_same(found, drawn(config, described, NAMES))


def test_experts_of_their_own_ranks_lie_in_one_array(written, config):
    """The rest is zeros, and what differs in the factor is in ``lora_b``."""

    def change(tensors):
        tensors = {name: x for name, x in tensors.items() if f"{EXPERT}4." not in name}
        tensors[f"{EXPERT}2.up_proj.lora_A.weight"] = tensors[f"{EXPERT}2.up_proj.lora_A.weight"][:1]
        tensors[f"{EXPERT}2.up_proj.lora_B.weight"] = tensors[f"{EXPERT}2.up_proj.lora_B.weight"][:, :1]
        return tensors

    directory = written(change, rank_pattern={r"experts\.2\.up_proj": 1}, alpha_pattern={"2.up_proj": 5})
    found, described = read_adapter(directory, config)
    whole = drawn(config, described, NAMES)
    a, b = (found["language"]["layers_1"]["mlp"]["experts"]["up_proj"][name] for name in ("lora_a", "lora_b"))
    a0, b0 = (whole["language"]["layers_1"]["mlp"]["experts"]["up_proj"][name] for name in ("lora_a", "lora_b"))
    assert not a[4].any() and not b[4].any() and not a[2, :, 1:].any() and not b[2, 1:].any()
    np.testing.assert_allclose(described.factor(NAMES[1]) * a[2] @ b[2], 5 * a0[2, :, :1] @ b0[2, :1], rtol=1e-5)
    np.testing.assert_array_equal(b[3], b0[3])


def test_what_is_left_out_is_noted(written, config, capsys):
    directory = written(
        lambda tensors: {name: x for name, x in tensors.items() if f"{EXPERT}4." not in name},
        target_modules=["o_proj", "up_proj", "q_proj"],
        a_new_key=1,
    )
    read_adapter(directory, config)
    err = capsys.readouterr().err
    assert "1 keys of adapter_config.json are not known, so not heeded: a_new_key" in err
    assert "1 parameters have an adapter for some of their experts alone" in err and "for 7 of 8" in err
    assert re.search(r"\d+ modules that target_modules names have no tensors", err)


def without(*names):
    return lambda tensors: {name: x for name, x in tensors.items() if not name.endswith(names)}


def added(name, *shape):
    return lambda tensors: tensors | {name: np.ones(shape, np.float32)}


def cut(tensors):
    return {name: x[:, :-1] if name.endswith("o_proj.lora_A.weight") else x for name, x in tensors.items()}


def spoilt(tensors):
    return {name: x * np.nan if name.endswith("o_proj.lora_A.weight") else x for name, x in tensors.items()}


def untouched(tensors):
    return tensors


REFUSED = {
    "rank 0": (untouched, {"r": 0}, "r: found 0, expected a whole number from 1"),
    "another rank": (untouched, {"r": 4}, r"o_proj.lora_A: found \[3, \d+\], expected \[4, "),
    "a factor of 0": (untouched, {"lora_alpha": 0}, "lora_alpha: found 0, expected a number, not 0"),
    "no numbers": (
        untouched,
        {"lora_alpha": "x", "lora_dropout": 1},
        "lora_alpha: found 'x'(.|\n)*lora_dropout: found 1",
    ),
    "a broken pattern": (untouched, {"rank_pattern": {"(": 2}}, r"rank_pattern: '\(' is neither"),
    "a slow pattern": (untouched, {"rank_pattern": {"(a+)+b": 2}}, r"'\(a\+\)\+b' is neither(.|\n)*take very long"),
    "an adapter inside another": (
        lambda t: t | {n.replace("o_proj.", "o_proj.base_layer."): x for n, x in t.items() if "o_proj." in n},
        {},
        "o_proj: an adapter inside another one",
    ),
    "another kind": (untouched, {"peft_type": "IA3"}, "peft_type is 'IA3'; adapters of the kinds LoRA and DoRA"),
    "a variant": (untouched, {"use_qalora": True, "layer_replication": [[0, 2]]}, "layer_replication(.|\n)*use_qalora"),
    "a changed base": (untouched, {"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    "dora without magnitudes": (untouched, {"use_dora": True}, "o_proj: lacks lora_magnitude"),
    "half a pair": (without("o_proj.lora_B.weight"), {}, "o_proj: lacks lora_B"),
    "wrong shapes": (cut, {}, r"o_proj.lora_A: found \[3, \d+\], expected \[3, \d+\]"),
    "numbers that are none": (spoilt, {}, "o_proj.lora_A.weight: has numbers that are none"),
    "an unknown module": (added("base_model.model.language.model.layers.9.x.lora_A.weight", 3, 8), {}, "layers.9.x"),
    "the router": (added(f"{EXPERT[:-8]}gate.lora_A.weight", 3, 64), {}, "gate: cannot have an adapter here"),
    "embeddings": (added(f"{ATTENTION}q_proj.lora_embedding_A", 3, 64), {}, "is not one of LoRA's or DoRA's"),
    "a bias of B": (added(f"{ATTENTION}o_proj.lora_B.bias", 64), {}, "a bias of lora_B"),
    "two adapters": (
        lambda t: t | {f"{ATTENTION}q_proj.lora_A.{name}.weight": np.ones((3, 64), np.float32) for name in "xy"},
        {},
        r"holds several adapters \(x, y\)",
    ),
    "another beginning": (added("model.vision.blocks.0.mlp.fc1.lora_A.weight", 3, 24), {}, "begin in 2 ways"),
    "integers": (
        lambda t: t | {f"{ATTENTION}q_proj.lora_A.weight": np.ones((3, 64), np.int8)},
        {},
        "not floating point",
    ),
    "nothing": (lambda tensors: {}, {}, "it has no tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(case, written, config):
    change, keys, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message) as error:
        read_adapter(written(change, **keys), config)
    assert "adapter" in str(error.value)


DAMAGED = {
    "no directory": (None, "", "no such directory. Give the one that holds an adapter's"),
    "no configuration": (adapters.CONFIG_NAME, None, "adapter_config.json: not found"),
    "broken JSON": (adapters.CONFIG_NAME, "{", "cannot be read as JSON"),
    "no weights": (adapters.WEIGHTS_NAME, None, "neither adapter_model.safetensors nor adapter_model.bin"),
    "cut off": (adapters.WEIGHTS_NAME, "x", "not a complete safetensors file"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_missing_and_damaged_files_are_told(case, written, config, tmp_path):
    name, content, message = DAMAGED[case]
    directory = written()
    if name is None:
        directory = tmp_path / "nowhere"
    elif content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(directory, config)


def test_a_change_after_writing_is_told(config, tmp_path):
    described = AdapterSettings("lora", 2, 4.0)
    directory = tmp_path / "adapter"
    write_adapter(directory, config, drawn(config, described, NAMES), described)
    with pytest.raises(CheckpointError, match="exists already"):
        write_adapter(directory, config, drawn(config, described, NAMES), described)
    path = directory / adapters.CONFIG_NAME
    path.write_text(path.read_text().replace('"lora_alpha": 4', '"lora_alpha": 5'))
    with pytest.raises(CheckpointError, match=r"adapter_config.json: changed(.|\n)*"):
        read_adapter(directory, config)
    (directory / adapters.MANIFEST_NAME).unlink()
    assert read_adapter(directory, config)[1].alpha == 5


def test_an_adapter_of_another_model_is_not_written(config, tmp_path):
    described = AdapterSettings("lora", 2, 4.0)
    adapter = drawn(config, described, NAMES)
    cases = (
        (
            unflatten_dict({("language", "norm", "scale", "lora_a"): np.ones(3)}),
            described,
            "language/norm/scale: no parameter",
        ),
        (adapter, AdapterSettings("dora", 2, 4.0), "expected lora_a, lora_b, magnitude"),
        (adapter, AdapterSettings("lora", 3, 4.0), r"lora_a: found \[.*2\], expected \[.*3\]"),
        (adapter, AdapterSettings("lora", 0, 4.0), "its rank is 0"),
        ({}, described, "it has no arrays"),
    )
    for one, settings_, message in cases:
        with pytest.raises(UsageError, match=message):
            write_adapter(tmp_path / "adapter", config, one, settings_)
    assert not (tmp_path / "adapter").exists()
