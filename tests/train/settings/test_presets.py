"""The nine presets of the paper's Table 2, with rules that cover each released model, and those of adapters."""

import functools

import pytest
from flax.traverse_util import flatten_dict

from dsvl2_jax.errors import SettingsError
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import abstract_params
from dsvl2_jax.model.parameter_paths import path_name
from dsvl2_jax.model.released import released_config
from dsvl2_jax.train.adapter import adapter_leaves
from dsvl2_jax.train.parameter_rules import GRADIENT_FREE, assign
from dsvl2_jax.train.settings.load import find, load, presets
from dsvl2_jax.train.settings.schema import Settings

STAGES = ("align", "pretrain", "sft")
# Per size, for the three stages: learning rate, tokens in 1e9, sequences a step, bias update speed.
BY_STAGE = {
    "tiny": ((5.4e-4, 5.4e-4, 3.0e-5), (2.0, 798.5, 19.5), (256, 2304, 64), (0, 0, 0)),
    "small": ((4.2e-4, 4.2e-4, 1.4e-5), (2.0, 808.9, 20.0), (256, 2304, 64), (0, 0, 0)),
    "base": ((4.5e-4, 4.5e-4, 2.0e-5), (2.0, 796.5, 19.5), (256, 3360, 64), (0, 1e-3, 0)),
}
BALANCE = {"tiny": 1e-3, "small": 1e-3, "base": 1e-4}
STATE = {"tiny": "float32", "small": "float32", "base": "bfloat16"}
HUB = {
    size: f"deepseek-ai/deepseek-vl2{suffix}" for size, suffix in (("tiny", "-tiny"), ("small", "-small"), ("base", ""))
}
NAMES = [(size, stage) for size in BY_STAGE for stage in STAGES]


def preset(size: str, stage: str, *overrides: str) -> Settings:
    paths = ["data.train.vl.path=vl.jsonl"] + ["data.train.text.path=text.jsonl"] * (stage == "pretrain")
    return load(f"{size}-{stage}", [*paths, *overrides])


@functools.cache
def parameters(size: str) -> dict[str, tuple[int, ...]]:
    shapes, _ = abstract_params(Config.from_dict(released_config(size)))
    return {path: leaf.shape for path, leaf in flatten_dict(shapes, sep="/").items()}


def test_there_are_nine_of_the_paper_and_one_adapter_a_size():
    names = {f"{size}-{stage}" for size in BY_STAGE for stage in (*STAGES, "lora")}
    assert {name for name in presets() if not name.startswith("micro-")} == names


@pytest.mark.parametrize("size", BY_STAGE)
def test_adapters_are_of_the_released_models_and_fit_them(size):
    loaded = preset(size, "lora")
    assert (loaded.model.checkpoint, loaded.model.size, loaded.adapter.kind) == (HUB[size], size, "lora")
    shapes = parameters(size)
    leaves = adapter_leaves(Config.from_dict(released_config(size)), loaded.adapter)
    adapted = {path_name(path[:-1]) for path in leaves}
    expected = {
        path
        for path in shapes
        if ("/self_attn/" in path and not path.endswith("/scale"))
        or ("/mlp/" in path and path.endswith("_proj/kernel"))
    }
    assert adapted == expected and len(leaves) == 2 * len(adapted)


@pytest.mark.parametrize(("size", "stage"), NAMES)
def test_numbers_are_those_of_the_paper(size, stage):
    loaded, index = preset(size, stage), STAGES.index(stage)
    rate, tokens, sequences, speed = (column[index] for column in BY_STAGE[size])
    optimizer, data = loaded.optimizer, loaded.data
    assert optimizer.learning_rate == rate
    assert optimizer.schedule == ("cosine", "step", "constant")[index]
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert optimizer.state_dtype == STATE[size]
    assert loaded.batch.sequences == sequences
    assert (loaded.stage.balance_loss_weight, loaded.stage.bias_update_speed) == (BALANCE[size], speed)
    assert (data.sequence_length, data.packing, data.mask_prompt) == (4096, stage != "align", stage == "sft")
    # Unpacked, 1.2 M samples make up the tokens of stage 1.
    steps = 1.2e6 / sequences if stage == "align" else tokens * 1e9 / (sequences * 4096)
    assert abs(loaded.run.steps - steps) <= 0.5
    weights = {name: source.weight for name, source in data.train.items()}
    assert weights == ({"vl": 0.7, "text": 0.3} if stage == "pretrain" else {"vl": 1.0})
    assert loaded.compute.dtype == "bfloat16"


@pytest.mark.parametrize("size", BY_STAGE)
def test_each_stage_starts_where_the_one_before_ended(size):
    loaded = [preset(size, stage) for stage in STAGES]
    assert [x.model.checkpoint for x in loaded] == [HUB[size], loaded[0].run.directory, loaded[1].run.directory]
    assert {x.model.size for x in loaded} == {size}


@pytest.mark.parametrize(("size", "stage"), NAMES)
def test_rules_cover_the_released_model_and_freeze_what_they_should(size, stage):
    shapes = parameters(size)
    rules = assign(shapes, preset(size, stage).stage.parameters)
    assert set(rules) == set(shapes)
    for path, rule in rules.items():
        frozen = bool(GRADIENT_FREE.search(path)) or (stage == "align" and path.startswith("language/"))
        assert rule.train != frozen, path
        if rule.train:
            assert rule.lr_multiplier == (0.1 if path.startswith("vision/") else 1.0), path
            vector = path.endswith(("/bias", "/scale", "_embed", "_tokens")) or len(shapes[path]) == 1
            assert rule.decay != vector, path
    trained = sum(rule.train for rule in rules.values())
    assert trained > 300 and rules["image_newline"].train and rules["view_seperator"].train


def test_what_the_user_must_give_is_named():
    with pytest.raises(SettingsError, match=r"data\.train\.vl\.path=my\.jsonl") as caught:
        load("tiny-pretrain")
    assert "data.train.text.path=my.jsonl" in str(caught.value) and "data.train.text.weight=0" in str(caught.value)
    assert load("tiny-pretrain", ["data.train.vl.path=x", "data.train.text.weight=0"]).data.train.keys() == {"vl"}


def test_presets_are_found_by_name_path_and_nearest():
    assert find("small-sft") == presets()["small-sft"]
    assert find(str(presets()["small-sft"])) == presets()["small-sft"]
    with pytest.raises(SettingsError, match="did you mean tiny-align"):
        find("tiny-algin")


@pytest.mark.parametrize("mesh", ["data=8", "data=8,expert=2", "data=8,expert=4", "data=32"])
def test_suggested_meshes_divide_the_batch(mesh):
    for size, stage in NAMES:
        assert preset(size, stage, f"compute.mesh={mesh}").compute.mesh == mesh
