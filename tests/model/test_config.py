"""Released config.json files parse as released, and what cannot be honoured is refused by name."""

import copy
import dataclasses
import json
import math

import pytest
from flax.traverse_util import flatten_dict
from golden import DATA
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvl2_jax.errors import ConfigError
from dsvl2_jax.model.config import Config, LanguageConfig, ProjectorConfig, VisionConfig, keys_without_meaning
from dsvl2_jax.model.deepseek_vl2 import abstract_params

REFERENCE = DATA / "reference"
SIZES = ("tiny", "small", "base")


def released(size: str) -> dict:
    return json.loads((REFERENCE / f"released_config_{size}.json").read_text())


def changed(**fields) -> dict:
    """The released base configuration with ``section__field`` replaced, or removed where the value is `...`."""
    raw = copy.deepcopy(released("base"))
    for path, value in fields.items():
        *sections, name = path.split("__")
        where = raw[f"{sections[0]}_config"] if sections else raw
        if value is ...:
            del where[name]
        else:
            where[name] = value
    return raw


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("tiny", {"heads": 10, "mla": False, "cache": 2560, "router": ("softmax", "greedy", False, 1.0)}),
        ("small", {"heads": 16, "mla": True, "cache": 576, "router": ("softmax", "greedy", False, 1.0)}),
        ("base", {"heads": 32, "mla": True, "cache": 576, "router": ("sigmoid", "noaux_tc", True, 2.0)}),
    ],
)
def test_released_sizes_parse(size, expected):
    config = Config.from_file(REFERENCE / f"released_config_{size}.json")
    language = config.language
    router = (language.scoring_func, language.topk_method, language.norm_topk_prob, language.routed_scaling_factor)
    assert router == expected["router"]
    assert language.num_attention_heads == expected["heads"]
    assert (language.use_mla, language.cache_width) == (expected["mla"], expected["cache"])
    assert language.num_hidden_layers == {"tiny": 12, "small": 27, "base": 30}[size]
    assert [language.is_moe_layer(i) for i in range(3)] == [False, True, True]
    assert (language.bos_token_id, language.eos_token_id) == ((100000, 100001) if size == "small" else (0, 1))
    assert (config.vision.patches, config.vision.head_dim, config.vision.mlp_dim) == (729, 72, 4304)
    assert (config.tokens_per_side, config.tokens_per_tile) == (14, 196)
    assert len(config.candidate_resolutions) == 23
    assert hash(config) == hash(Config.from_dict(released(size)))


@pytest.mark.parametrize("size", SIZES)
def test_released_sizes_have_the_released_parameter_counts(size):
    expected = json.loads((REFERENCE / f"released_param_counts_{size}.json").read_text())
    shapes, _ = abstract_params(Config.from_dict(released(size)))
    found = dict.fromkeys(expected, 0)
    for path, leaf in flatten_dict(shapes).items():
        count = math.prod(leaf.shape)
        found[component(path)] += count
        found["TOTAL"] += count
    assert found == expected


def component(path: tuple[str, ...]) -> str:
    """Where the reference counts a parameter."""
    if path[0] in ("image_newline", "view_seperator"):
        return "image_newline+view_seperator"
    if path[0] == "vision":
        pool = "vision.attn_pool (present, unused: ignore_head)"
        return pool if path[1] == "attn_pool" else "vision (used)"
    if path[0] == "projector":
        return "projector"
    if path[1] in ("embed_tokens", "lm_head"):
        return f"language.{path[1]}"
    if path[1] == "norm" or path[2].endswith("_layernorm"):
        return "language.norms"
    if path[2] == "self_attn":
        return "language.attention"
    return {
        "router": "language.router",
        "experts": "language.routed_experts",
        "shared_experts": "language.shared_experts",
    }.get(path[3], "language.dense_mlp")


@pytest.mark.parametrize(
    ("section", "cls"),
    [("language_config", LanguageConfig), ("vision_config", VisionConfig), ("projector_config", ProjectorConfig)],
)
def test_missing_keys_take_the_official_defaults(section, cls):
    official = json.loads((REFERENCE / "config_defaults.json").read_text())[section]
    ours = dataclasses.asdict(cls())
    differing = {name for name in official if name in ours and ours[name] != official[name]}
    assert differing == ({"topk_method"} if cls is LanguageConfig else set())  # its official default does not run
    # Without meaning here: padding is no token of ours, and dropout is 0 everywhere.
    assert official.keys() - ours.keys() <= {"pad_token_id", "attention_dropout"}
    assert ours.keys() <= official.keys()


def test_missing_top_level_keys_take_the_official_defaults():
    top = json.loads((REFERENCE / "config_defaults.json").read_text())["top"]
    config = Config.from_dict(changed(global_view_pos=..., candidate_resolutions=...))
    assert config.global_view_pos == top["global_view_pos"]
    assert [list(pair) for pair in config.candidate_resolutions] == top["candidate_resolutions"]


def test_keys_without_meaning_are_ignored():
    raw = changed(language__lm_head=False, language__rm_head=True, language__ep_size=8, auto_map={"AutoModel": "x"})
    assert Config.from_dict(raw) == Config.from_dict(released("base"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"language__topk_method": "gready"}, r"topk_method: unknown routing method 'gready'; expected one of greedy,"),
        ({"language__topk_method": ...}, r"language_config\.topk_method: missing; name one of greedy,"),
        ({"language__scoring_func": "tanh"}, r"scoring_func: unknown 'tanh'"),
        ({"language__rope_scaling": {"type": "llama3"}}, r"rope_scaling\.type: found 'llama3'; supported are linear,"),
        ({"tile_tag": "1D"}, r"tile_tag: found '1D', only \"2D\""),
        ({"tile_tag": ...}, r"tile_tag: missing"),
        ({"projector__projector_type": "identity"}, r"projector_config\.projector_type: found 'identity'"),
        ({"projector__token_pooling": True}, r"projector_config\.token_pooling: true is not supported"),
        ({"projector__depth": 1}, r"projector_config\.depth: must be from 2 to 1024, not 1"),
        ({"projector__n_embed": 64}, r"n_embed 64 differs from language_config\.hidden_size 2560"),
        ({"projector__input_dim": 64}, r"input_dim 64 differs from vision_config\.width 1152"),
        ({"vision__global_pool": "avg"}, r"vision_config: only global_pool map"),
        ({"vision__heads": 7}, r"width 1152 is not a multiple of heads 7"),
        ({"vision__image_size": 13}, r"image_size 13 is smaller than patch_size 14"),
        ({"vision__patch_size": 0}, r"vision_config\.patch_size: must be from 1 to 1048576, not 0"),
        ({"language__hidden_size": "2560"}, r'language_config\.hidden_size: must be a whole number, not "2560"'),
        ({"language__num_experts_per_tok": True}, r"num_experts_per_tok: must be a whole number, not true"),
        ({"language__rope_theta": "1e4"}, r'rope_theta: must be a number, not "1e4"'),
        ({"language__norm_topk_prob": 1}, r"norm_topk_prob: must be true or false, not 1"),
        ({"language__hidden_act": "gelu"}, r"hidden_act: found 'gelu', only \"silu\""),
        ({"language__tie_word_embeddings": True}, r"tie_word_embeddings: true is not supported"),
        ({"language__num_experts_per_tok": 73}, r"num_experts_per_tok: 73 of 72 experts is impossible"),
        ({"language__num_experts_per_tok": ...}, r"num_experts_per_tok: missing"),
        ({"language__n_group": 5}, r"n_group: 72 experts do not divide into 5 groups"),
        ({"language__n_group": ...}, r"n_group and topk_group: needed with topk_method noaux_tc"),
        ({"language__topk_group": 2}, r"topk_group: 2 of 1 groups is impossible"),
        ({"language__n_group": 36}, r"num_experts_per_tok: 6, but topk_group leaves 2 experts"),
        ({"language__kv_lora_rank": None}, r"kv_lora_rank: needed with use_mla true, found None"),
        ({"language__qk_rope_head_dim": 63}, r"qk_rope_head_dim: 63 is odd"),
        ({"language__use_mla": False, "language__num_key_value_heads": 5}, r"32 is not a multiple of .* 5"),
        ({"language__vocab_size": 0}, r"vocab_size: must be from 1 to"),
        ({"language__moe_layer_freq": 0}, r"moe_layer_freq: must be from 1 to"),
        ({"language_config": ...}, r"language_config: expected an object, found nothing"),
        ({"vision_config": []}, r"vision_config: expected an object, found list"),
        (
            {"candidate_resolutions": [384]},
            r"candidate_resolutions: must be a list of \[width, height\] pairs",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        Config.from_dict(changed(**change), source="some/config.json")
    assert str(refusal.value).startswith("some/config.json ")


CHANGING = {
    "language__mlp_bias": True,
    "language__sliding_window": 4096,
    "language__final_logit_softcapping": 30.0,
    "language__embedding_multiplier": 12,
    "language__num_nextn_predict_layers": 1,
    "projector__activation": "relu",
    "vision__qkv_bias": "rows",
    "vision__hidden_act": "quick_gelu",
    "tie_word_embeddings": True,
    "rope_scaling": {"type": "linear", "factor": 2},
}


@pytest.mark.parametrize("key", CHANGING)
def test_an_unknown_key_that_changes_the_computation_is_refused_by_name(key):
    name = key.replace("__", "_config.") if "__" in key else key
    with pytest.raises(ConfigError, match=rf"{name}: found .*this changes what the model computes"):
        Config.from_dict(changed(**{key: CHANGING[key]}))


NEUTRAL = {
    "language__rope_scaling": None,
    "language__rope_parameters": {"rope_type": "default", "rope_theta": 10000},
    "language__mlp_bias": False,
    "language__quantization_config": {"bits": 4},  # of the weights' files alone, whose reader looks at it
    "language__sliding_window": None,
    "language__use_sliding_window": False,
    "language__embedding_multiplier": 1.0,
    "language__partial_rotary_factor": 1.0,
    "language__rope_interleave": True,
    "language__num_nextn_predict_layers": 0,
    "vision__qkv_bias": True,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8"},
}


def test_unknown_keys_that_say_what_is_computed_anyway_are_fine_and_others_are_noted(tmp_path):
    raw = changed(**NEUTRAL)
    assert Config.from_dict(raw) == Config.from_dict(released("base"))
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert keys_without_meaning(tmp_path) == []
    raw = changed(language__favourite_colour="red", vision__weight_init="skip", project="mine", torch_dtype="float32")
    assert Config.from_dict(raw) == Config.from_dict(released("base"))
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (note,) = keys_without_meaning(tmp_path)
    assert set(note.partition(": ")[2].split(", ")) == {
        "language_config.favourite_colour", "vision_config.weight_init", "project"
    }  # fmt: skip


FIELDS = [
    (section, field.name)
    for section, cls in (("vision", VisionConfig), ("projector", ProjectorConfig), ("language", LanguageConfig))
    for field in dataclasses.fields(cls)
] + [("", "tile_tag"), ("", "global_view_pos"), ("", "candidate_resolutions")]
SIZES_THAT_ARE_NONE = [
    0, -1, 1, 2**31, 10**9, 10**400, -(10**18), 1.5, 1e300, float("inf"), float("nan"), True, False, None, "", "384",
    [], [1], [[0, 0]], [[1, 2, 3]], [["a", "b"]], [[1e400, 1]], {}, {"a": {}},
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(SIZES),
    st.lists(st.tuples(st.sampled_from(FIELDS), st.sampled_from(SIZES_THAT_ARE_NONE)), min_size=1, max_size=3),
)
def test_any_value_gives_a_model_that_can_be_named_or_an_error_that_names_the_file(size, values):
    raw = copy.deepcopy(released(size))
    for (section, name), value in values:
        where = raw[f"{section}_config"] if section else raw
        where[name] = value
    try:
        config = Config.from_dict(raw, source="some/config.json")
    except ConfigError as error:
        assert str(error).startswith("some/config.json ")
        return
    assert config.vision.mlp_dim > 0 and config.language.cache_width > 0 and config.tokens_per_tile > 0
    assert config.language.has_moe in (True, False)


def test_the_largest_sizes_together_are_refused_at_once_or_expand():
    with pytest.raises(ConfigError, match=r"n_routed_experts: 16384 times num_hidden_layers 1024 is more than"):
        Config.from_dict(changed(language__n_routed_experts=16384, language__num_hidden_layers=1024))


def test_several_problems_are_reported_together():
    raw = changed(tile_tag="1D", projector__token_pooling=True, vision__heads=7)
    with pytest.raises(ConfigError) as refusal:
        Config.from_dict(raw)
    assert all(name in str(refusal.value) for name in ("tile_tag", "token_pooling", "heads 7"))
    raw = changed(language__hidden_size=2.5, vision__layers="27", projector__depth=None)
    with pytest.raises(ConfigError) as refusal:
        Config.from_dict(raw)
    assert all(name in str(refusal.value) for name in ("hidden_size", "layers", "depth"))


@pytest.mark.parametrize("content", [None, "{", "[1]", b"\xff\xfe"], ids=["missing", "cut off", "no object", "binary"])
def test_files_that_are_no_configuration_are_named(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"config\.json"):
        Config.from_file(tmp_path)


def test_a_layer_is_moe_by_its_number_and_the_frequency():
    language = LanguageConfig(n_routed_experts=4, first_k_dense_replace=2, moe_layer_freq=3, num_hidden_layers=8)
    assert [i for i in range(8) if language.is_moe_layer(i)] == [3, 6]
    assert not LanguageConfig(n_routed_experts=None).has_moe
