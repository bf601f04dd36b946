"""The training step that `dsvl2 bench model` measures: that of a released model's fine-tuning preset.

Tested in tests/apps/bench/test_model.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.stages import Compiled, Lowered

from dsvl2_jax.apps.bench.model_jobs import HALF, Program, Repeated, random_ids, random_tiles
from dsvl2_jax.apps.bench.model_options import ModelOptions
from dsvl2_jax.apps.bench.random_params import random_params, shapes_of
from dsvl2_jax.apps.plan.training_step import preset_settings, training_work
from dsvl2_jax.model.config import IGNORED_LABEL, TEXT_POSITION, Config
from dsvl2_jax.model.released import SIZES, variant
from dsvl2_jax.train.data.batch import TrainBatch
from dsvl2_jax.train.objectives.language import LanguageTrainer
from dsvl2_jax.train.settings.schema import Settings

PARTS = ("vision", "language")


def step_settings(config: Config, options: ModelOptions, dtype: Any) -> Settings:
    """Of one sequence as long as the longest prompt, with as many tiles as the most that are encoded."""
    size = variant(config)
    if size not in SIZES:  # a released preset whose rules fit: base's router alone has a bias, which is not trained
        size = "base" if config.language.topk_method == "noaux_tc" else "tiny"
    given = [f"data.tiles_per_sequence={max(options.tiles)}", f"compute.dtype={dtype.name}"]
    return preset_settings(
        size, "sft", sequences=1, length=max(options.tokens), micro=1, overrides=[*given, *options.overrides]
    )


def train(config: Config, settings: Settings, dtype: Any) -> Program:
    """A step: forward, backward and the update of every parameter that the preset trains."""
    trainer = LanguageTrainer(config, settings, HALF, HALF, None)
    batch = random_batch(config, settings)

    def lower() -> Lowered:
        state = trainer.abstract_state()
        stored = flatten_dict(shapes_of(config, dtype, PARTS), sep="/")
        frozen = {
            path: jax.ShapeDtypeStruct(leaf.shape, stored[path].dtype if path in stored else dtype)
            for path, leaf in state.frozen.items()
        }
        return trainer.lower(dataclasses.replace(state, frozen=frozen), batch)

    def start(compiled: Compiled, _: Any) -> Repeated:
        state = trainer.init(random_params(shapes_of(config, dtype, PARTS)))

        def call() -> Any:
            nonlocal state
            state, metrics = compiled(state, batch)
            return metrics

        return Repeated(call, lambda metrics: {"loss": metrics.loss, "gradient_norm": metrics.gradient_norm})

    rows, length = batch.ids.shape[0] * batch.ids.shape[1], batch.ids.shape[2]
    sizes = {"tokens": length, "tiles": settings.data.tiles_per_sequence}
    least = training_work(config, settings)
    return Program("train", sizes, least, "tokens", rows * length, lower, start)


def random_batch(config: Config, settings: Settings) -> TrainBatch:
    """Random tokens, each row one sample that begins with its tiles; all text is learnt."""
    micro, length = settings.batch.microbatch_size, settings.data.sequence_length
    steps, tiles = settings.batch.sequences // micro, settings.data.tiles_per_sequence
    shape = (steps, micro, length)
    image = min(length, tiles * config.tokens_per_tile)  # positions of a row that tiles take
    index = np.full(shape, TEXT_POSITION, np.int32)
    index[..., :image] = np.arange(micro)[:, None] * (tiles * config.tokens_per_tile) + np.arange(image)
    ids = random_ids(config, shape)
    return TrainBatch(
        ids=ids,
        labels=np.where(index == TEXT_POSITION, ids, IGNORED_LABEL).astype(np.int32),
        image_index=index,
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), shape),
        segments=np.ones(shape, np.int32),
        with_images=np.full(shape, bool(tiles)),
        tiles=random_tiles(config, steps * micro * tiles).reshape(
            steps, micro * tiles, *[config.vision.image_size] * 2, 3
        ),
    )
