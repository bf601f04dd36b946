"""The stages of the presets on mini models of each variant: they learn what they should, and nothing else moves."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from dsvl2_jax import configs
from dsvl2_jax.inputs.batch import collate
from dsvl2_jax.inputs.processor import Processor
from dsvl2_jax.model import deepseek_vl2 as model
from dsvl2_jax.model.config import TEXT_POSITION, Config
from dsvl2_jax.train.data.batch import TrainBatch, one_sample_a_row
from dsvl2_jax.train.objectives.language import LanguageTrainer
from dsvl2_jax.train.settings.load import load
from dsvl2_jax.train.settings.schema import Settings

MICRO = Path(configs.__file__).parent / "micro"  # 126-pixel tiles, and a vocabulary of 512
SIZES = ("tiny", "small", "base")
COLOURS = ["red", "green", "blue", "white", "black", "yellow", "cyan", "magenta"]

# What makes each variant different; all else is as in the micro model, with fewer layers.
VARIANTS = {
    "tiny": {"use_mla": False, "kv_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0}
    | {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "small": {
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    "base": {},
}
HALF = np.full(3, 0.5, np.float32)
RATE = 3e-3


def config(size: str) -> Config:
    raw = json.loads((MICRO / "config.json").read_text())
    raw["language_config"] |= VARIANTS[size] | {"num_hidden_layers": 3}
    raw["vision_config"] |= {"layers": 1}
    return Config.from_dict(raw)


def settings(size: str, stage: str, *more: str) -> Settings:
    """The preset's rules, balance weight and optimizer, at a rate that suits few small steps, in float32."""
    overrides = ["model.checkpoint=unused", "data.train.vl.path=unused", "run.directory=unused"]
    if stage != "align":
        overrides.append("data.train.text.path=unused")
    overrides += [f"optimizer.learning_rate={RATE}", "optimizer.schedule=constant", "optimizer.warmup_steps=0"]
    overrides += ["batch.sequences=8", "batch.microbatch_size=8", "data.max_segments=1"]
    overrides += ["compute.dtype=float32", "compute.remat=none"]
    return load(f"{size}-{stage}", [*overrides, *more])


def samples(*, mask_prompt: bool) -> TrainBatch:
    """Eight pictures of one colour each, and what colour it is."""
    processor = Processor.from_dir(MICRO)

    def sample(colour: str):
        picture = Image.new("RGB", (126, 126), colour)
        question = {"role": "user", "content": "<image>\nWhat colour?", "images": [picture]}
        answer = {"role": "assistant", "content": colour}
        return processor([question, answer], inference=False, mask_prompt=mask_prompt)

    return one_sample_a_row(collate([sample(colour) for colour in COLOURS], config("tiny"), length=96))


def start(size: str, stage: str):
    trainer = LanguageTrainer(config(size), settings(size, stage), HALF, HALF, None)
    params = model.init_params(config(size), jax.random.key(0))
    kept = {path: np.asarray(leaf) for path, leaf in flatten_dict(params).items()}
    return trainer, trainer.init(params), kept


# Multi-head attention, latent attention with each kind of router, and each stage; the other pairs are exhaustive.
USUAL = {("tiny", "pretrain"), ("base", "sft"), ("small", "align")}


def pairs(*stages: str) -> list:
    """(size, stage) of a test."""
    every = [(size, stage) for size in SIZES for stage in stages]
    return [pytest.param(*pair, marks=[] if pair in USUAL else pytest.mark.exhaustive) for pair in every]


@pytest.mark.parametrize(("size", "stage"), pairs("pretrain", "sft"))
def test_eight_image_samples_are_learnt(size, stage):
    trainer, state, _ = start(size, stage)
    batch = samples(mask_prompt=trainer.settings.data.mask_prompt)
    losses = []
    for _ in range(300):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics.loss))
        if losses[-1] < 0.05:
            break
    assert losses[-1] < 0.05
    assert losses[0] > 2.0


@pytest.mark.parametrize(("size", "stage"), pairs("align"))
def test_alignment_learns_without_moving_the_language_model(size, stage):
    trainer, state, before = start(size, stage)
    batch = samples(mask_prompt=trainer.settings.data.mask_prompt)
    losses = []
    for _ in range(30):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.98 * losses[0]
    after = flatten_dict(trainer.params(state))
    moved = {path for path in before if not np.array_equal(after[path], before[path])}
    assert not {path for path in moved if path[0] == "language" or path[:2] == ("vision", "attn_pool")}
    expected = {path for path in before if path[0] != "language" and path[:2] != ("vision", "attn_pool")}
    assert moved == expected


def random_text(rng: np.random.Generator) -> TrainBatch:
    ids = rng.integers(8, 512, (1, 8, 128)).astype(np.int32)
    positions = np.broadcast_to(np.arange(128, dtype=np.int32), ids.shape)
    tiles = np.zeros((1, 0, 126, 126, 3), np.uint8)
    return TrainBatch(
        ids, ids, np.full_like(ids, TEXT_POSITION), positions, np.ones_like(ids), np.zeros(ids.shape, bool), tiles
    )


def test_the_bias_update_balances_experts_from_an_unbalanced_start():
    chosen = settings("base", "pretrain", "optimizer.learning_rate=1e-4", "stage.bias_update_speed=5e-3")
    trainer = LanguageTrainer(config("base"), chosen, HALF, HALF, None)
    state = trainer.init(model.init_params(config("base"), jax.random.key(0)))
    steep = np.linspace(-0.25, 0.25, config("base").language.n_routed_experts, dtype=np.float32)
    state = dataclasses.replace(state, biases={path: 0 * bias + steep for path, bias in state.biases.items()})
    rng, balance = np.random.default_rng(0), []
    for _ in range(120):
        state, metrics = trainer.step(state, random_text(rng))
        load = np.asarray(metrics.load)
        balance.append(load.max(-1) / load.mean(-1))  # of both MoE layers
    assert (balance[0] > 2.0).all()
    assert (np.array(balance[-10:]) < 1.5).all()
