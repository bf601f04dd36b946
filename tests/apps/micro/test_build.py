"""The bundled model: whole, in the released layout, made by its jobs, and mostly right about fresh pictures."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import toy_run
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops

import dsvl2_jax
from dsvl2_jax import configs
from dsvl2_jax.apps.cli.main import main
from dsvl2_jax.apps.micro import build, synthetic
from dsvl2_jax.apps.micro.demo import ASKED, LOCATED, _judge, demo
from dsvl2_jax.checkpoint import rules
from dsvl2_jax.checkpoint.digests import SUMS_NAME, check_sums
from dsvl2_jax.checkpoint.load import load_params
from dsvl2_jax.checkpoint.locate import PARAMS_NAME, resolve
from dsvl2_jax.checkpoint.safetensors_source import Source
from dsvl2_jax.convert.doctor import doctor
from dsvl2_jax.errors import CheckpointError, UsageError
from dsvl2_jax.infer.loading import LoadOptions
from dsvl2_jax.inputs.processor import Processor
from dsvl2_jax.inputs.tokenizer import IMAGE_TOKEN, PROCESSOR_TOKENS, Tokenizer
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.parameter_paths import stays_float32
from dsvl2_jax.train.run_directory import Identity, model_identity, opened
from dsvl2_jax.train.settings.load import load

CONFIGS = Path(configs.__file__).parent
MICRO, IMAGES = CONFIGS / "micro", CONFIGS / "images"
LIMIT = 12_000_000  # bytes of weights
MODEL_FILES = {
    "config.json",
    "model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}

# ---- what is shipped


def listed(directory: Path) -> set[str]:
    """The files that a directory's SHA256SUMS has."""
    return {line.split("  ", 1)[1] for line in (directory / SUMS_NAME).read_text().splitlines()}


def test_files_are_complete_small_and_as_their_digests_say():
    assert {file.name for file in MICRO.iterdir()} == MODEL_FILES | {"README.md", SUMS_NAME, build.LOG_NAME, "train"}
    assert sum(file.stat().st_size for file in MICRO.glob("*.safetensors")) <= LIMIT
    assert listed(MICRO) == MODEL_FILES
    check_sums(MICRO)


def test_every_part_of_base_is_there():
    config = Config.from_file(MICRO)
    language = config.language
    assert len(config.candidate_resolutions) == 23
    assert config.vision.grid == 9 and config.tokens_per_side == 5  # odd, so that the last row and column are padding
    assert language.use_mla and language.q_lora_rank is None and language.n_shared_experts == 2
    assert (language.topk_method, language.scoring_func, language.norm_topk_prob) == ("noaux_tc", "sigmoid", True)
    assert [language.is_moe_layer(i) for i in range(language.num_hidden_layers)] == [False, True, True, True]
    assert language.vocab_size == build.VOCABULARY


def test_weights_have_the_released_names_and_finite_values():
    config = Config.from_file(MICRO)
    with Source(MICRO) as source:
        rules.check(source.shapes_and_dtypes, config, str(MICRO))
        for leaf in rules.expand(config):
            found = {source.tensors[name].dtype for name in leaf.sources}
            assert found == {"F32" if stays_float32(leaf.path) else "BF16"}, leaf.name
            values = np.asarray(source.read_leaf(leaf, np.dtype(np.float32)))
            assert np.isfinite(values).all(), leaf.name
            if leaf.path[-1] == "correction_bias":
                assert np.ptp(values, -1).min() > 0, "a correction bias that was not trained tests nothing"


def test_doctor_finds_nothing_wrong(capsys):
    assert doctor(None, as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True and report["problems"] == [] and report["layout"] == "released"


def test_tokenizer_is_in_the_released_style():
    tokenizer = Tokenizer.from_dir(MICRO)
    assert (tokenizer.bos_token, tokenizer.bos_id) == ("<｜begin▁of▁sentence｜>", 0)
    assert (tokenizer.eos_token, tokenizer.eos_id) == ("<｜end▁of▁sentence｜>", 1)
    assert (tokenizer.pad_token, tokenizer.pad_id) == ("<｜▁pad▁｜>", 2)
    tokenizer.check_fits(Config.from_file(MICRO).language.vocab_size)
    assert len(tokenizer.encode("1234567890")) == 10
    for text in ("<|ref|>the red square<|/ref|><|det|>[[1, 23, 456, 999]]<|/det|>", "Grüße, 世界 🌍\n\n  x\t"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_special_token_of_the_processor_is_in_the_vocabulary():
    tokenizer = Tokenizer.from_dir(MICRO)
    for token in PROCESSOR_TOKENS:
        (found,) = tokenizer.encode(token)
        assert found < Config.from_file(MICRO).language.vocab_size


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_comes_back_from_its_tokens(text):
    tokenizer = Tokenizer.from_dir(MICRO)
    ids = tokenizer.encode(text, special=False)
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < build.LEARNT_TOKENS


def test_the_start_is_made_as_it_was_shipped(tmp_path):
    build.start(tmp_path / "start")
    for name in ("config.json", "processor_config.json", "special_tokens_map.json", "tokenizer_config.json"):
        assert (tmp_path / "start" / name).read_bytes() == (MICRO / name).read_bytes(), name
    ours, shipped = (json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path / "start", MICRO))
    # Pairs that are equally frequent but for one or two texts may have changed places.
    for tokenizer in (ours, shipped):
        model = tokenizer["model"]
        model["merges"], model["vocab"] = sorted(map(tuple, model["merges"])), sorted(model["vocab"])
    assert ours == shipped


def test_all_tilings_are_cut_as_in_base():
    processor = Processor.from_dir(MICRO)
    side = processor.config.tile_size
    for width, height in processor.config.candidate_resolutions:
        inputs = processor(prompt=IMAGE_TOKEN, images=[Image.new("RGB", (width, height), "teal")])
        columns, rows = width // side, height // side
        assert inputs.tile_grid.tolist() == [[columns, rows]]
        assert len(inputs.tiles) == 1 + columns * rows
        assert inputs.image_mask.sum() == 5 * 6 + 1 + 5 * rows * (5 * columns + 1)


def test_the_log_tells_of_every_stage():
    lines = [json.loads(line) for line in (MICRO / build.LOG_NAME).read_text().splitlines()]
    assert lines[0]["kind"] == "versions" and {"jax", "flax", "optax", "numpy"} < set(lines[0])
    assert list(dict.fromkeys(line["stage"] for line in lines[1:])) == list(build.STAGES)
    for stage in build.STAGES:
        steps = [line for line in lines[1:] if line["stage"] == stage and line["kind"] == "step"]
        assert steps and all(np.isfinite(line["loss"]) for line in steps)
        losses, third = [line["loss"] for line in steps], len(steps) // 3
        # A short stage that starts from another one's end begins low; 20 single batches of it say little.
        assert sum(losses[-third:]) < (1 if len(losses) > 25 else 1.2) * sum(losses[:third]), stage


def test_the_example_pictures_are_what_the_script_draws(tmp_path):
    build.examples(tmp_path / "images")
    assert {file.name for file in (tmp_path / "images").iterdir()} == {file.name for file in IMAGES.iterdir()}
    for file in IMAGES.iterdir():
        with Image.open(file) as shipped, Image.open(tmp_path / "images" / file.name) as drawn:
            difference = ImageChops.difference(shipped.convert("RGB"), drawn.convert("RGB"))
        assert max(high for _, high in difference.getextrema()) <= 16, file.name  # room for another Pillow's edges
    processor = Processor.from_dir(MICRO)
    grids = {f.name: processor(prompt=IMAGE_TOKEN, images=[f]).tile_grid[0].tolist() for f in IMAGES.iterdir()}
    assert grids == {"shapes.png": [2, 1], "number.png": [1, 1], "chart.png": [2, 2]}


# ---- the jobs that make it


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of all stages' runs, of a small model with random parameters; only the last has a checkpoint."""
    folder = tmp_path_factory.mktemp("micro")
    source = toy_run.make_model(folder / "model")
    (folder / "data.jsonl").write_text("{}\n")
    runs, last = folder / "runs", folder / "runs" / build.STAGES[-1]
    for stage in build.STAGES:
        (runs / stage).mkdir(parents=True)
    file = toy_run.write_config(folder / "config.toml", source, folder / "data.jsonl", last)
    random = np.random.default_rng(0)
    flat = {
        leaf.path: random.standard_normal(leaf.shape, np.float32) for leaf in rules.expand(Config.from_file(source))
    }
    with opened(last) as run:
        run.begin(load(file), source, Identity(model_identity(source), {"data.jsonl": "abc"}))
        run.save(6, {PARAMS_NAME: unflatten_dict(flat)}, {"count": np.zeros(1, np.float32)}, {"at": 6})
        run.wait()
    for stage in build.STAGES:
        steps = ({"kind": "step", "step": i, "loss": 1 / i, "image_loss": None, "tokens": 9} for i in range(1, 45))
        lines = [
            {"kind": "start", "step": 0, "time": 0.1},
            *steps,
            {"kind": "validation", "step": 44, "loss": 0.123456789},
        ]
        (runs / stage / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return runs


def test_ship_writes_weights_log_and_digests_and_leaves_the_readme(runs, tmp_path):
    out = tmp_path / "shipped"
    out.mkdir()
    (out / "README.md").write_text("mine")
    (out / "model-00001-of-00002.safetensors").write_text("an older one")
    build.ship(runs, out)
    names = {file.name for file in out.iterdir()}
    assert names == MODEL_FILES | {"README.md", SUMS_NAME, build.LOG_NAME}
    assert (out / "README.md").read_text() == "mine"
    assert listed(out) == MODEL_FILES
    config = Config.from_file(out)
    params = flatten_dict(load_params(resolve(runs / build.STAGES[-1]), config)).items()
    trained = {path: np.asarray(value) for path, value in params}
    with Source(out) as source:  # which checks the digests
        rules.check(source.shapes_and_dtypes, config, str(out))
        for leaf in rules.expand(config):
            dtype = np.dtype(np.float32) if stays_float32(leaf.path) else source.leaf_dtype(leaf)
            assert dtype.name == ("float32" if stays_float32(leaf.path) else "bfloat16")
            np.testing.assert_array_equal(source.read_leaf(leaf, dtype), trained[leaf.path].astype(dtype))
    lines = [json.loads(line) for line in (out / build.LOG_NAME).read_text().splitlines()]
    assert lines[0]["kind"] == "versions"
    assert [line["stage"] for line in lines[1:]] == [stage for stage in build.STAGES for _ in range(4)]
    assert lines[1:5] == [
        {"stage": build.STAGES[0], "kind": "start", "step": 0, "time": 0.1},
        {"stage": build.STAGES[0], "kind": "step", "step": 20, "loss": 0.05},
        {"stage": build.STAGES[0], "kind": "step", "step": 40, "loss": 0.025},
        {"stage": build.STAGES[0], "kind": "validation", "step": 44, "loss": 0.12346},
    ]
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    build.ship(runs, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert {folder.name for folder in runs.iterdir()} == set(build.STAGES)


def test_ship_names_the_stages_that_have_not_run(runs, tmp_path, capsys):
    shutil.copytree(runs, tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "align")
    (tmp_path / "runs" / "regions" / "log.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"has no log.jsonl of regions, align; run `make train-micro`"):
        build.ship(tmp_path / "runs", tmp_path / "out")
    assert main(["micro", "ship", str(tmp_path / "runs"), str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_unknown_data_sets_are_refused_before_anything_is_written(tmp_path, capsys):
    with pytest.raises(UsageError, match=r"no data set fool, text2; expected some of text, held-out-text"):
        build.data(tmp_path / "data", ["text", "fool", "text2"])
    assert main(["micro", "data", str(tmp_path / "data"), "fool"]) == 2
    assert capsys.readouterr().err.startswith("dsvl2: usage error: no data set fool; ")
    assert not (tmp_path / "data").exists()


def test_the_stages_read_the_data_that_is_made():
    for stage in build.STAGES:
        loaded = load(f"micro-{stage}")
        sources = [*loaded.data.train.values(), *loaded.data.validation.values()]
        assert {Path(source.path).stem for source in sources} <= set(build.DATA), stage
        assert {Path(source.path).parent for source in sources} == {Path("runs/micro/data")}
        assert Path(loaded.run.directory) == Path("runs/micro") / stage
    held_out = {(mix["mixture"], mix["seed"]) for _, mix in build.DATA.values() if mix.get("stream")}
    assert build.EVALUATION_SEED not in {seed for _, seed in held_out}


def test_one_question_of_each_task_is_written(tmp_path, capsys):
    assert main(["micro", "questions", str(tmp_path), "--samples", "1", "--seed", "9"]) == 0
    path = tmp_path / "questions-9-1.jsonl"
    assert capsys.readouterr().out == f"{path}\n"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["task"] for record in records] == list(synthetic.TASKS)


# ---- what it answers

SEED, QUESTIONS = 20_261, 8  # of each task; of the held-out stream, of a seed that nothing else has
LEAST_RIGHT = {"colour and shape": 0.7, "counting": 0.7, "position": 0.7, "grounding": 0.7, "digits": 0.7}


@pytest.fixture(scope="module")
def loaded() -> dsvl2_jax.Model:
    return dsvl2_jax.load(None)


@pytest.fixture(scope="module")
def answered(loaded) -> dict[str, list[tuple]]:
    """Task → (question, answer) for `QUESTIONS` held-out questions."""
    samples = {
        task: [synthetic.task_sample(synthetic.rng_of(synthetic.HELD_OUT, SEED, i), task) for i in range(QUESTIONS)]
        for task in synthetic.TASKS
    }
    inputs = {
        task: [
            loaded.processor([{**s.conversation()[0], "images": [picture.draw() for picture in s.pictures]}])
            for s in group
        ]
        for task, group in samples.items()
    }
    answers = {task: loaded.generate(group, 96) for task, group in inputs.items()}
    return {
        task: [(s.questions[0], answer) for s, answer in zip(group, answers[task], strict=True)]
        for task, group in samples.items()
    }


@pytest.mark.parametrize("task", LEAST_RIGHT)
def test_most_held_out_questions_are_answered_correctly(answered, task):
    judged = [(_judge(question, a.text, a.boxes)[0], question, a.text) for question, a in answered[task]]
    assert sum(right for right, *_ in judged) >= LEAST_RIGHT[task] * QUESTIONS, judged


def test_answers_of_every_task_end_and_have_the_form_of_right_ones(answered):
    pairs = [pair for group in answered.values() for pair in group]
    assert sum(answer.finish_reason == "stop" for _, answer in pairs) >= 0.95 * len(pairs)
    alike = [
        bool(answer.boxes) if question.metric == "iou" else not re.search(r"[<>\[\]]", answer.text)
        for question, answer in pairs
    ]
    assert sum(alike) >= 0.95 * len(pairs)


@pytest.mark.parametrize(
    ("name", "prompt", "expected"),
    [
        ("shapes.png", "What colour is the circle?", "blue"),
        ("shapes.png", "How many shapes are there?", "4"),
        ("number.png", "What number is written?", "7063"),
        ("chart.png", "Which bar is the highest?", "D"),
    ],
)
def test_the_example_pictures_are_seen(loaded, name, prompt, expected):
    question = {"role": "user", "content": f"{IMAGE_TOKEN}\n{prompt}", "images": [IMAGES / name]}
    assert loaded.generate(loaded.processor([question]), 16).text == expected


def test_the_demo_draws_and_asks(tmp_path, capsys):
    demo(None, seed=0, out=tmp_path / "out", options=LoadOptions())
    out, err = capsys.readouterr()
    files = {file.name for file in (tmp_path / "out").iterdir()}
    firsts = {f"{task.replace(' ', '-')}-0.png" for task in (*ASKED, LOCATED)}
    assert files == firsts | {"two-images-1.png", "boxes.png"}
    for task in (*ASKED, LOCATED):
        assert f"{task.replace(' ', '-')}-0.png" in out
    marks = re.findall(r"^  ([✓✗]) ", out, re.MULTILINE)
    assert len(marks) == len(ASKED) + 1
    assert f"\n{marks.count('✓')} of {len(marks)} right; boxes are drawn into {tmp_path / 'out' / 'boxes.png'}" in out
    assert "tokens/s" in err
    with Image.open(tmp_path / "out" / "boxes.png") as drawn, Image.open(tmp_path / "out" / "grounding-0.png") as plain:
        assert ImageChops.difference(drawn, plain).getbbox() is not None
