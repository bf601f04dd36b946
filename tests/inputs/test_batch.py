"""Samples in one batch: padded, their image rows rebased to the tiles of all, and refused where they do not fit."""

import numpy as np
import pytest
from golden import DATA
from PIL import Image

from dsvl2_jax.errors import UsageError
from dsvl2_jax.inputs.batch import collate
from dsvl2_jax.inputs.processor import Processor
from dsvl2_jax.model.config import IGNORED_LABEL, TEXT_POSITION, Config

DIRECTORY = DATA / "checkpoints" / "mini-tiny"


@pytest.fixture(scope="module")
def config():
    return Config.from_file(DIRECTORY)


@pytest.fixture(scope="module")
def samples():
    processor = Processor.from_dir(DIRECTORY)
    pictures = [Image.new("RGB", (384, 384)), Image.new("RGB", (768, 384))]
    one, two = (processor(prompt="a <image> b", images=[picture]) for picture in pictures)
    return [one, processor(prompt="text"), two]


def test_samples_are_padded_and_their_images_rebased(config, samples):
    batch = collate(samples, config, rows=4, length=1500, tile_count=7)
    assert batch.ids.shape == batch.labels.shape == batch.image_index.shape == (4, 1500)
    assert batch.tiles.shape == (7, 384, 384, 3)
    assert batch.lengths.tolist() == [len(sample.input_ids) for sample in samples] + [0]
    for row, (sample, first_tile) in enumerate(zip(samples, (0, 2, 2), strict=True)):
        length = len(sample.input_ids)
        np.testing.assert_array_equal(batch.ids[row, :length], sample.input_ids)
        rebased = np.where(sample.image_index >= 0, sample.image_index + first_tile * config.tokens_per_tile, 0)
        np.testing.assert_array_equal(np.maximum(batch.image_index[row, :length], 0), rebased)
        assert (batch.labels[row, length:] == IGNORED_LABEL).all()
        assert (batch.image_index[row, length:] == TEXT_POSITION).all()
        np.testing.assert_array_equal(batch.tiles[first_tile : first_tile + len(sample.tiles)], sample.tiles)
    assert not batch.tiles[5:].any()


def test_without_sizes_the_batch_is_as_small_as_the_samples_allow(config, samples):
    batch = collate(samples, config)
    assert batch.ids.shape == (3, max(len(sample.input_ids) for sample in samples))
    assert len(batch.tiles) == 5


def test_samples_that_do_not_fit_are_named(config, samples):
    with pytest.raises(UsageError, match=r"sample 2 of the batch has \d+ tokens, but rows have 600"):
        collate(samples, config, length=600)
    with pytest.raises(UsageError, match="has 5 tiles, but room for 4"):
        collate(samples, config, tile_count=4)
