"""The checkpoint bundled with the package: a stand-in that has learnt its own pictures by heart.

    python -m dsvl2_jax.train.bundled --out configs/micro

makes, from one seed, the two pictures of ``configs/images`` and a model of a million parameters with every
architectural part of DeepSeek-VL2 base, in the released layout. It is fitted to the bundled pictures and a few
random scenes until it answers their questions exactly, and it has no notion of other pictures: a model that
sees will replace it. No code at run time knows the one from the other. Needs the ``train`` extra.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from dsvl2_jax import model
from dsvl2_jax.batch import collate
from dsvl2_jax.config import Config
from dsvl2_jax.convert import rules
from dsvl2_jax.convert.export import ShardWriter
from dsvl2_jax.errors import DSVL2Error
from dsvl2_jax.grounding import format_boxes
from dsvl2_jax.orbax_io import nest, unnest
from dsvl2_jax.processor import ModelInputs, Processor, extended_candidate_resolutions
from dsvl2_jax.tokenizer import DEFAULT_PAD_TOKEN, IMAGE_TOKEN, PROCESSOR_TOKENS, REF_END_TOKEN, REF_TOKEN
from dsvl2_jax.train.batch import TrainBatch, one_sample_a_row
from dsvl2_jax.train.loss import LossOptions, loss_fn, step_totals

SEED, STEPS, PEAK_RATE = 0, 450, 3e-3
RANDOM_SCENES, RANDOM_PER_STEP = 8, 2
MIN_MARGIN = 1.0  # of every answer's tokens, best logit over second: more than CPUs and dtypes differ by

COLOURS = {
    "red": "#d63031",
    "orange": "#eb821e",
    "yellow": "#fdd03c",
    "green": "#27864b",
    "blue": "#2860c8",
    "purple": "#8446aa",
    "white": "#fafaf6",
}
_STAR_X = (0.5, 0.618, 1, 0.691, 0.809, 0.5, 0.191, 0.309, 0, 0.382)
_STAR_Y = (0, 0.382, 0.382, 0.618, 1, 0.764, 1, 0.618, 0.382, 0.382)
# Corners of a polygon that fills the unit square; none: the ellipse in it.
KINDS = {
    "circle": (),
    "square": ((0, 0), (1, 0), (1, 1), (0, 1)),
    "triangle": ((0.5, 0), (1, 1), (0, 1)),
    "star": tuple(zip(_STAR_X, _STAR_Y, strict=True)),
}
NUMBERS = ("no shapes", "one shape", "two shapes", "three shapes")

# `base` in little. The tilings are added to both files.
CONFIG = """{
"model_type": "deepseek_vl_v2", "architectures": ["DeepseekVLV2ForCausalLM"], "torch_dtype": "bfloat16",
"tile_tag": "2D", "global_view_pos": "head",
"vision_config": {
  "model_type": "vision", "model_name": "siglip_so400m_patch14_384", "image_size": 126, "patch_size": 14,
  "width": 96, "layers": 3, "heads": 4, "mlp_ratio": 3.7362},
"projector_config": {"model_type": "mlp_projector", "input_dim": 96, "n_embed": 96},
"language_config": {
  "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "torch_dtype": "bfloat16",
  "vocab_size": 512, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 4096,
  "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "initializer_range": 0.1,
  "use_mla": true, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": null, "kv_lora_rank": 32,
  "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
  "first_k_dense_replace": 1, "moe_intermediate_size": 32, "n_routed_experts": 8, "n_shared_experts": 2,
  "num_experts_per_tok": 2, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1,
  "norm_topk_prob": true, "routed_scaling_factor": 2.0, "aux_loss_alpha": 0.001, "lm_head": true, "rm_head": false}
}"""
PROCESSOR_CONFIG = """{
"processor_class": "DeepseekVLV2Processor", "patch_size": 14, "downsample_ratio": 2, "normalize": true,
"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "image_token": "<image>", "add_special_token": false,
"pad_token": "<｜▁pad▁｜>", "sft_format": "deepseek", "mask_prompt": false, "ignore_id": -100
}"""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A coloured shape that fills ``box`` (x1, y1, x2, y2 in pixels)."""

    kind: str
    colour: str
    box: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        return f"the {self.colour} {self.kind}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """Up to three shapes, no two of one kind, on a background that shades from ``top`` to ``bottom``."""

    size: tuple[int, int]
    top: tuple[int, int, int]
    bottom: tuple[int, int, int]
    shapes: tuple[Shape, ...]

    def draw(self) -> Image.Image:
        """The picture, in RGB."""
        fine = 4  # drawn so many times larger, for smooth edges
        shade = Image.linear_gradient("L").resize(self.size)
        image = Image.composite(Image.new("RGB", self.size, self.bottom), Image.new("RGB", self.size, self.top), shade)
        for shape in self.shapes:
            x1, y1, x2, y2 = (fine * side for side in shape.box)
            mask = Image.new("L", (fine * self.size[0], fine * self.size[1]))
            draw = ImageDraw.Draw(mask)
            if corners := KINDS[shape.kind]:
                draw.polygon([(x1 + x * (x2 - x1 - 1), y1 + y * (y2 - y1 - 1)) for x, y in corners], fill=255)
            else:
                draw.ellipse((x1, y1, x2 - 1, y2 - 1), fill=255)
            image.paste(COLOURS[shape.colour], mask=mask.reduce(fine))
        return image

    def questions(self) -> list[tuple[str, str]]:
        """Every question about the scene with its answer: each shape's colour and place, and how many there are."""
        pairs = [(f"What colour is the {s.kind}?", f"The {s.kind} is {s.colour}.") for s in self.shapes]
        verb = "is" if len(self.shapes) == 1 else "are"
        pairs.append(("How many shapes are there?", f"There {verb} {NUMBERS[len(self.shapes)]}."))
        for shape in self.shapes:
            pairs.append((f"{REF_TOKEN}{shape.name}{REF_END_TOKEN}", format_boxes(shape.name, [shape.box], self.size)))
        return pairs


_MEADOW = (
    Shape("circle", "yellow", (352, 32, 440, 120)),
    Shape("triangle", "green", (58, 96, 202, 272)),
    Shape("square", "red", (250, 172, 350, 272)),
)
_NIGHT = (Shape("star", "white", (44, 52, 140, 148)), Shape("circle", "orange", (142, 214, 262, 334)))
BUNDLED = {
    "meadow.png": Scene((480, 320), (150, 205, 235), (150, 200, 120), _MEADOW),
    "night.png": Scene((300, 450), (24, 28, 70), (96, 84, 150), _NIGHT),
}


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene of one to three shapes side by side, small enough for one or two local tiles."""
    long, short, count = int(rng.integers(100, 250)), int(rng.integers(96, 126)), int(rng.integers(1, 4))
    upright = bool(rng.integers(2))
    colours = rng.choice(sorted(COLOURS), count, replace=False)
    cell, shapes = long // count, []
    for i, (kind, colour) in enumerate(zip(rng.choice(sorted(KINDS), count, replace=False), colours, strict=True)):
        side = int(rng.integers(min(cell, short) // 2, min(cell, short) - 4))
        x, y = i * cell + int(rng.integers(cell - side)), int(rng.integers(short - side))
        x, y = (y, x) if upright else (x, y)
        shapes.append(Shape(str(kind), str(colour), (x, y, x + side, y + side)))
    top, bottom = (tuple(int(c) for c in rng.integers(60, 200, 3)) for _ in range(2))
    return Scene((short, long) if upright else (long, short), top, bottom, tuple(shapes))


def write_config(out: Path) -> None:
    """Writes config.json and processor_config.json."""
    config, processor = json.loads(CONFIG), json.loads(PROCESSOR_CONFIG)
    tilings = extended_candidate_resolutions(9, config["vision_config"]["image_size"])
    _write_json(out / "config.json", config | {"candidate_resolutions": tilings})
    _write_json(out / "processor_config.json", processor | {"candidate_resolutions": tilings})


def write_tokenizer(out: Path, texts: list[str]) -> None:
    """Trains a byte-level BPE in the style of the released one, but with single digits, and writes its three files."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    patterns = (r"\p{N}", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False, special=True) for token in (bos, eos, DEFAULT_PAD_TOKEN)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in PROCESSOR_TOKENS])
    tokenizer.save(str(out / "tokenizer.json"))
    names = {"bos_token": bos, "eos_token": eos, "pad_token": DEFAULT_PAD_TOKEN}
    extra = {"additional_special_tokens": list(PROCESSOR_TOKENS[-2:])}
    settings = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False, "add_eos_token": False}
    settings |= {"clean_up_tokenization_spaces": False, "model_max_length": 4096}
    _write_json(out / "special_tokens_map.json", names | extra)
    _write_json(out / "tokenizer_config.json", settings | names | extra)


def samples(rng: np.random.Generator, processor: Processor, scenes: list[Scene]) -> Iterator[list[ModelInputs]]:
    """Endless steps: a conversation about each bundled picture and some random scenes, questions in random order."""
    pictures = {scene: scene.draw() for scene in [*BUNDLED.values(), *scenes]}
    while True:
        chosen = [scenes[i] for i in rng.choice(len(scenes), RANDOM_PER_STEP, replace=False)]
        step = []
        for scene in [*BUNDLED.values(), *chosen]:
            pairs, kinds = scene.questions(), len(scene.shapes) + 1
            asked, located = rng.permutation(pairs[:kinds]).tolist(), rng.permutation(pairs[kinds:]).tolist()
            # A grounding question tells a colour that must be learnt from the picture, so it mostly comes later.
            order = located + asked if rng.random() < 0.25 else asked + located
            turns = []
            for question, answer in order:
                turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            turns[0] |= {"content": f"{IMAGE_TOKEN}\n{turns[0]['content']}", "images": [pictures[scene]]}
            step.append(processor(turns, inference=False, mask_prompt=True))
        yield step


def fit(params: model.Params, config: Config, steps: Iterator[list[ModelInputs]], count: int) -> model.Params:
    """AdamW on the project's loss for ``count`` steps."""
    import optax

    rate = optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, min(20, count // 2), count)
    matrices = jax.tree.map(lambda p: p.ndim > 1, params)
    adamw = optax.adamw(rate, 0.9, 0.95, weight_decay=0.01, mask=matrices)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    half = np.full(3, 0.5, np.float32)  # image mean and deviation

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: model.Params, state: optax.OptState, batch: TrainBatch):
        loss = functools.partial(loss_fn, totals=step_totals(batch), mean=half, std=half, options=LossOptions(1))
        (_, sums), gradient = jax.value_and_grad(loss, has_aux=True)(params, config, batch.micro(0))
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, sums

    state, started = optimizer.init(params), time.monotonic()
    length, tiles = 416, 7 + 7 + 3 * RANDOM_PER_STEP  # one shape, so that the step compiles once
    for number, step in zip(range(1, count + 1), steps, strict=False):
        batch = one_sample_a_row(collate(step, config, length=length, tile_count=tiles))
        params, state, sums = update(params, state, batch)
        if number % 20 == 0 or number == count:
            loss = sums.loss / sums.supervised_tokens
            print(f"step {number}/{count}: loss {loss:.4f}, {time.monotonic() - started:.0f} s", flush=True)
    return params


def write_weights(out: Path, config: Config, params: model.Params) -> None:
    """Writes the safetensors and their index in bfloat16, by the table of `dsvl2_jax.convert.rules`."""
    flat = dict(unnest(params))
    leaves = rules.expand(config)
    tensors = {name: (leaf.layout.source_shape, jnp.dtype("bfloat16")) for leaf in leaves for name in leaf.sources}
    for old in out.glob("*.safetensors"):
        old.unlink()
    with ShardWriter(out, tensors) as writer:
        for leaf in leaves:
            writer.write(dict(leaf.parts(np.array(flat[leaf.path].astype("bfloat16")))))
        writer.finish()


def make(out: Path, seed: int = SEED, steps: int = STEPS) -> None:
    """Writes the checkpoint into the existing directory ``out``; on one machine it depends on the arguments alone."""
    rng = np.random.default_rng(seed)
    scenes = prepare(out, rng)
    config = Config.from_file(out)
    flat = dict(unnest(model.init_params(config, jax.random.key(seed))))
    for path in flat:
        if path[-1] == "correction_bias":  # gradient-free; at zero, code that forgot it would go unseen
            flat[path] = jnp.asarray(rng.normal(0, 0.05, flat[path].shape), jnp.float32)
    params = fit(nest(flat), config, samples(rng, Processor.from_dir(out), scenes), steps)
    write_weights(out, config, params)


def prepare(out: Path, rng: np.random.Generator) -> list[Scene]:
    """Writes everything but the weights, and returns the random scenes to train on besides the bundled ones."""
    scenes = [random_scene(rng) for _ in range(RANDOM_SCENES)]
    pairs = [pair for scene in [*BUNDLED.values(), *scenes] for pair in scene.questions()]
    write_config(out)
    write_tokenizer(out, [re.sub(r"<\|[^|]*\|>", "\n", ": {}\n\n: {}".format(*pair)) for pair in pairs])
    return scenes


def check(out: Path, images: Path) -> None:
    """Prints every bundled question with its answer and margin, through the whole path. Raises unless all are right."""
    from dsvl2_jax.infer.engine import load

    wrong = 0
    for dtype in ("float32", "bfloat16"):
        loaded = load(out, dtype)
        for name, scene in BUNDLED.items():
            for question, expected in scene.questions():
                turn = {"role": "user", "content": f"{IMAGE_TOKEN}\n{question}", "images": [images / name]}
                answer = loaded.generate(loaded.processor([turn]), 80)
                told = loaded.processor([turn, {"role": "assistant", "content": answer.text}], inference=False)
                logits = np.sort(loaded.logits(told)[-len(answer.token_ids) - 1 : -1])
                margin = float((logits[:, -1] - logits[:, -2]).min())
                right = answer.text == expected and margin > MIN_MARGIN
                wrong += not right
                print(f"{'ok' if right else 'WRONG'} {dtype} {name} {question} -> {answer.text} (margin {margin:.1f})")
    if wrong:
        raise DSVL2Error(f"{out}: {wrong} answers are wrong or unsure; fit it for more steps.")


def main() -> None:
    """Makes the pictures and the checkpoint, and checks every answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to make; pictures go to images/ beside it")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    images = args.out.parent / "images"
    args.out.mkdir(parents=True, exist_ok=True)
    images.mkdir(exist_ok=True)
    for name, scene in BUNDLED.items():
        scene.draw().save(images / name, optimize=True)
    make(args.out, args.seed, args.steps)
    check(args.out, images)


def _write_json(path: Path, value: dict) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
