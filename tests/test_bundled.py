"""The bundled checkpoint and its pictures are whole and answer what their README says; the script draws truly."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

import dsvl2_jax
from dsvl2_jax import configs
from dsvl2_jax.config import Config
from dsvl2_jax.convert import rules
from dsvl2_jax.convert.source import Source
from dsvl2_jax.grounding import parse_boxes
from dsvl2_jax.processor import Processor
from dsvl2_jax.tokenizer import Tokenizer
from dsvl2_jax.train import bundled

CONFIGS = Path(configs.__file__).parent
MICRO, IMAGES = CONFIGS / "micro", CONFIGS / "images"
LIMIT = 3_000_000  # bytes
FILES = {
    "README.md",
    "config.json",
    "model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def suggested() -> list[tuple[str, str, str]]:
    """(picture, prompt, answer) of each row of the README's table."""
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \| `(.+?)` \|$", (MICRO / "README.md").read_text(), re.MULTILINE)
    return [tuple(cell.replace("\\|", "|") for cell in row) for row in rows]


def iou(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, width) * max(0, height)
    return both / (sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b)) - both)


@pytest.fixture(scope="module")
def loaded() -> dsvl2_jax.Model:
    return dsvl2_jax.load(None)


def test_files_are_complete_and_small():
    assert {file.name for file in MICRO.iterdir()} == FILES
    assert sum(file.stat().st_size for file in [*MICRO.iterdir(), *IMAGES.iterdir()]) <= LIMIT
    assert {file.name for file in IMAGES.iterdir()} == set(bundled.BUNDLED)


def test_every_part_of_base_is_there():
    config = Config.from_file(MICRO)
    language = config.language
    assert len(config.candidate_resolutions) == 23
    assert config.vision.grid == 9 and config.tokens_per_side == 5  # odd, so that the last row and column are padding
    assert language.use_mla and language.q_lora_rank is None and language.n_shared_experts == 2
    assert (language.topk_method, language.scoring_func, language.norm_topk_prob) == ("noaux_tc", "sigmoid", True)
    assert [language.is_moe_layer(i) for i in range(language.num_hidden_layers)] == [False, True, True, True]


def test_weights_have_the_released_names_and_finite_values():
    config = Config.from_file(MICRO)
    with Source(MICRO) as source:
        rules.check(source.shapes_and_dtypes, config, str(MICRO))
        assert {dtype for _, dtype in source.shapes_and_dtypes.values()} == {"BF16"}
        for leaf in rules.expand(config):
            values = np.asarray(source.read_leaf(leaf, np.dtype(np.float32)))
            assert np.isfinite(values).all(), leaf.name
            assert leaf.path[-1] != "correction_bias" or values.all(), "a correction bias of zero tests nothing"


def test_doctor_finds_nothing_wrong():
    doctor = pytest.importorskip("dsvl2_jax.convert.doctor")
    assert doctor.doctor(None) in (0, None)


def test_tokenizer_is_in_the_released_style():
    tokenizer = Tokenizer.from_dir(MICRO)
    assert (tokenizer.bos_token, tokenizer.bos_id) == ("<｜begin▁of▁sentence｜>", 0)
    assert (tokenizer.eos_token, tokenizer.eos_id) == ("<｜end▁of▁sentence｜>", 1)
    assert (tokenizer.pad_token, tokenizer.pad_id) == ("<｜▁pad▁｜>", 2)
    tokenizer.check_fits(Config.from_file(MICRO).language.vocab_size)
    assert len(tokenizer.encode("1234567890")) == 10
    for text in ("<|ref|>the red square<|/ref|><|det|>[[1, 23, 456, 999]]<|/det|>", "Grüße, 世界 🌍\n\n  x\t"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_script_makes_the_shipped_config_and_tokenizer(tmp_path):
    bundled.prepare(tmp_path, np.random.default_rng(bundled.SEED))
    for name in ("config.json", "processor_config.json", "special_tokens_map.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (MICRO / name).read_text(), name
    ours, shipped = Tokenizer.from_dir(tmp_path), Tokenizer.from_dir(MICRO)
    for scene in bundled.BUNDLED.values():
        for pair in scene.questions():
            assert [ours.encode(text) for text in pair] == [shipped.encode(text) for text in pair]


def test_pictures_have_different_tilings():
    processor = Processor.from_dir(MICRO)
    prompts = [processor(prompt="<image>", images=[IMAGES / name]) for name in bundled.BUNDLED]
    assert len({tuple(prompt.tile_grid[0]) for prompt in prompts}) == len(prompts)


@pytest.mark.parametrize("name", bundled.BUNDLED)
def test_pictures_are_what_the_script_draws(name):
    with Image.open(IMAGES / name) as image:
        difference = ImageChops.difference(image.convert("RGB"), bundled.BUNDLED[name].draw())
    assert max(high for _, high in difference.getextrema()) <= 16  # room for another Pillow's edges


def test_the_readme_suggests_a_question_and_a_grounding_question():
    rows = suggested()
    assert len(rows) == 2 and sum("<|ref|>" in prompt for _, prompt, _ in rows) == 1
    for picture, prompt, answer in rows:
        assert (prompt, answer) in bundled.BUNDLED[Path(picture).name].questions()


def test_suggested_questions_are_answered_exactly(loaded):
    turns = [
        [{"role": "user", "content": f"<image>\n{prompt}", "images": [CONFIGS.parent / picture]}]
        for picture, prompt, _ in suggested()
    ]
    answers = [loaded.generate(loaded.processor(turn), 48, logprobs=True) for turn in turns]
    tokenizer = loaded.processor.tokenizer
    for answer, (_, _, expected) in zip(answers, suggested(), strict=True):
        assert answer.text == expected and answer.finish_reason == "stop"
        assert answer.token_ids == [*tokenizer.encode(expected), tokenizer.eos_id]
        assert min(answer.logprobs) > np.log(0.8)  # sure, so that no processor's rounding changes it
    boxes = [box for answer in answers for box in answer.boxes]
    (shape,) = (s for scene in bundled.BUNDLED.values() for s in scene.shapes if [s.name] == [b.label for b in boxes])
    assert iou((boxes[0].x1, boxes[0].y1, boxes[0].x2, boxes[0].y2), shape.box) > 0.5


def test_random_scenes_come_from_their_seed():
    first, again = (bundled.random_scene(np.random.default_rng(7)) for _ in range(2))
    other = bundled.random_scene(np.random.default_rng(8))
    assert first == again != other
    assert first.draw().tobytes() == again.draw().tobytes()


@pytest.mark.parametrize("seed", range(8))
def test_boxes_are_where_the_shapes_are(seed):
    scene = bundled.random_scene(np.random.default_rng(seed))
    empty = bundled.Scene(scene.size, scene.top, scene.bottom, ()).draw()
    for shape in scene.shapes:
        alone = bundled.Scene(scene.size, scene.top, scene.bottom, (shape,)).draw()
        found = ImageChops.difference(alone, empty).convert("L").point(lambda v: 255 * (v > 8)).getbbox()
        assert found is not None and iou(found, shape.box) > 0.9
        assert iou(shape.box, (0, 0, *scene.size)) > 0


def test_questions_name_each_shape_and_its_box():
    scene = bundled.BUNDLED["night.png"]
    answers = dict(scene.questions())
    assert answers["What colour is the star?"] == "The star is white."
    assert answers["How many shapes are there?"] == "There are two shapes."
    (box,) = parse_boxes(answers["<|ref|>the orange circle<|/ref|>"], [scene.size])
    assert (box.x1, box.y1, box.x2, box.y2) == scene.shapes[1].box
