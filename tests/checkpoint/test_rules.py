"""The rule table: complete at the released sizes, a bijection for any configuration, right in both directions."""

import gzip
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvl2_jax.checkpoint import rules
from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.messages import MAX_LISTED
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import weight_inputs
from dsvl2_jax.model.released import SIZES, released_config, variant

dimension = st.integers(1, 7)


@pytest.fixture(scope="session", params=SIZES)
def released(request, data):
    """(config, name → shape) of a released model."""
    config = Config.from_file(data / "reference" / f"released_config_{request.param}.json")
    with gzip.open(data / "reference" / f"released_param_shapes_{request.param}.json.gz") as file:
        shapes = {name: tuple(shape) for name, shape in json.load(file).items()}
    return config, shapes


def test_expanded_rules_are_exactly_the_released_tensors(released):
    config, shapes = released
    expected = rules.expected_shapes(config)
    assert expected.keys() - shapes.keys() == set()
    assert shapes.keys() - expected.keys() == set()
    assert expected == shapes


def test_parameters_and_tensors_have_the_same_number_of_elements(released):
    config, shapes = released
    leaves = rules.expand(config)
    assert len({leaf.path for leaf in leaves}) == len(leaves)
    for leaf in leaves:
        assert math.prod(leaf.shape) == len(leaf.sources) * math.prod(leaf.layout.source_shape), leaf.name
    assert sum(math.prod(leaf.shape) for leaf in leaves) == sum(map(math.prod, shapes.values()))


def test_the_built_in_sizes_are_the_released_configurations(data):
    for size in SIZES:
        reference = Config.from_file(data / "reference" / f"released_config_{size}.json")
        assert Config.from_dict(released_config(size)) == reference
        assert variant(reference) == size


@given(st.lists(dimension, min_size=2, max_size=4), st.integers(1, 3))
def test_linear_is_the_transposed_torch_weight(target, inputs):
    target, inputs = tuple(target), min(inputs, len(target) - 1)
    layout = rules.linear(inputs)(target)
    weight = np.random.default_rng(0).standard_normal(layout.source_shape, np.float32)
    kernel = np.empty(target, np.float32)
    layout.view(kernel)[...] = weight
    x = np.random.default_rng(1).standard_normal((2, *target[:inputs]), np.float32)
    torch = pytest.importorskip("torch")
    expected = torch.nn.functional.linear(torch.from_numpy(x.reshape(2, -1)), torch.from_numpy(weight))
    found = np.tensordot(x, kernel, inputs)
    np.testing.assert_allclose(found.reshape(2, -1), expected, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 5), st.integers(1, 6))
def test_patch_conv_is_the_torch_convolution_over_one_patch(side, width):
    layout = rules.patch_conv((side * side * 3, width))
    weight = np.random.default_rng(0).standard_normal(layout.source_shape, np.float32)
    kernel = np.empty((side * side * 3, width), np.float32)
    layout.view(kernel)[...] = weight
    patch = np.random.default_rng(1).standard_normal((side, side, 3), np.float32)
    torch = pytest.importorskip("torch")
    expected = torch.nn.functional.conv2d(torch.from_numpy(patch.transpose(2, 0, 1))[None], torch.from_numpy(weight))
    np.testing.assert_allclose(patch.reshape(-1) @ kernel, expected.reshape(-1), rtol=1e-4, atol=1e-5)


LAYOUTS = (
    rules.same,
    rules.flat,
    rules.rows,
    rules.leading_ones(1),
    rules.leading_ones(2),
    rules.linear(1),
    rules.linear(2),
)


@given(st.sampled_from(LAYOUTS), st.lists(dimension, min_size=3, max_size=4))
def test_every_layout_is_a_bijection_of_elements(layout_of, target):
    target = tuple(target)
    parameter = np.arange(math.prod(target)).reshape(target)
    seen = layout_of(target).view(parameter)
    assert seen.shape == layout_of(target).source_shape
    assert np.shares_memory(seen, parameter)
    assert sorted(seen.reshape(-1).tolist()) == list(range(parameter.size))
    again = np.empty_like(parameter)
    layout_of(target).view(again)[...] = seen
    np.testing.assert_array_equal(again, parameter)


@st.composite
def configs(draw):
    """Small valid configurations over everything that changes the parameter tree."""
    heads = draw(st.sampled_from([1, 2, 4]))
    mla = draw(st.booleans())
    hidden = 8 * heads
    language = {
        "vocab_size": draw(st.integers(1, 40)),
        "hidden_size": hidden,
        "intermediate_size": draw(st.integers(1, 12)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if mla else draw(st.sampled_from([h for h in (1, 2, 4) if heads % h == 0])),
        "first_k_dense_replace": draw(st.integers(0, 2)),
        "moe_layer_freq": draw(st.integers(1, 2)),
        "attention_bias": draw(st.booleans()),
        "use_mla": mla,
        "kv_lora_rank": draw(st.integers(1, 6)) if mla else None,
        "q_lora_rank": draw(st.sampled_from([None, 5])),
        "qk_rope_head_dim": 2,
        "qk_nope_head_dim": draw(st.integers(1, 4)),
        "v_head_dim": draw(st.integers(1, 4)),
        "n_shared_experts": draw(st.sampled_from([None, 1, 2])),
    }
    if draw(st.booleans()):
        method = draw(st.sampled_from(["greedy", "noaux_tc"]))
        language |= {
            "n_routed_experts": draw(st.sampled_from([2, 4])),
            "num_experts_per_tok": 2,
            "moe_intermediate_size": draw(st.integers(1, 6)),
            "topk_method": method,
            "scoring_func": "sigmoid" if method == "noaux_tc" else "softmax",
            "n_group": 1,
            "topk_group": 1,
        }
    width = 2 * draw(st.integers(1, 4))
    vision = {"width": width, "heads": 2, "layers": draw(st.integers(1, 2)), "patch_size": 14, "image_size": 28}
    projector = {"input_dim": width, "n_embed": hidden, "depth": draw(st.integers(2, 3))}
    return Config.from_dict(
        {"language_config": language, "vision_config": vision, "projector_config": projector, "tile_tag": "2D"}
    )


@settings(max_examples=10, deadline=None)
@given(configs())
def test_any_configuration_expands_to_a_bijection_that_inverts(config):
    leaves = rules.expand(config)
    names = [source for leaf in leaves for source in leaf.sources]
    assert len(set(names)) == len(names)
    assert not any("{" in name for name in names)
    for number, leaf in enumerate(leaves):
        parameter = np.random.default_rng(number).standard_normal(leaf.shape, np.float32)
        released = {name: part.copy() for name, part in leaf.parts(parameter)}
        assert {part.shape for part in released.values()} == {leaf.layout.source_shape}
        again = np.full_like(parameter, np.nan)
        for name, part in leaf.parts(again):
            part[...] = released[name]
        np.testing.assert_array_equal(again, parameter)


def test_all_problems_are_in_one_message_and_long_lists_are_cut(released):
    config, shapes = released
    found = {name: (shape, "BF16") for name, shape in shapes.items()}
    del found["image_newline"]
    found["extra.weight"] = ((3,), "F32")
    found["view_seperator"] = ((5,), "BF16")
    for name in [n for n in found if ".experts.0." in n]:
        found[name] = (found[name][0], "I8")
    with pytest.raises(CheckpointError) as error:
        rules.check(found, config, "/some/where")
    message = str(error.value)
    quantised = sum(dtype == "I8" for _, dtype in found.values())
    for part in ("/some/where", "1 missing tensors", "image_newline", "1 unknown tensors", "extra.weight [3]"):
        assert part in message
    assert "view_seperator: found [5], expected" in message
    assert f"{quantised} tensors that are not floating point" in message
    assert f"and {quantised - MAX_LISTED} more" in message
    assert message.count("\n") < 40


def test_a_fitting_checkpoint_passes_in_every_floating_dtype(released):
    config, shapes = released
    dtypes = ("F32", "F16", "BF16")
    rules.check({name: (shape, dtypes[i % 3]) for i, (name, shape) in enumerate(shapes.items())}, config, "here")


def test_the_table_and_the_model_agree_on_what_is_an_input(released):
    """Released matrices are [out, in]; the convolution, which is a matrix here, has no such layout."""
    config, _ = released
    found = {path: leaf.inputs for path, leaf in rules.linear_leaves(config).items()}
    expected = dict(weight_inputs(config))
    del expected["vision", "patch_embed", "kernel"]
    assert found == expected
    for leaf in rules.linear_leaves(config).values():
        outputs, inputs = (math.prod(leaf.shape[axis] for axis in axes) for axes in (leaf.outputs, leaf.inputs))
        assert leaf.layout.source_shape == (outputs, inputs)
