"""Training of the encoder on named regions: reading them, features, loss, step."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_run
from flax.traverse_util import flatten_dict
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dsvl2_jax.apps.micro import pictures, synthetic
from dsvl2_jax.checkpoint import locate
from dsvl2_jax.errors import DataError, SampleError, SettingsError
from dsvl2_jax.inputs.image_sources import open_images
from dsvl2_jax.model.deepseek_vl2 import init_params
from dsvl2_jax.sharding import make_mesh
from dsvl2_jax.train.data.encoder_samples import PHRASE_COLUMNS, AttributeIds, Pairs, parse_regions, process_regions
from dsvl2_jax.train.data.pipeline import BatchShard, open_training
from dsvl2_jax.train.flops import region_flops
from dsvl2_jax.train.objectives.regions import (
    RegionTrainer,
    phrase_members,
    phrase_numbers,
    region_features,
    region_loss,
)
from dsvl2_jax.train.parameter_rules import assign
from dsvl2_jax.train.settings.load import load

IMAGES, PHRASES, LENGTH = 8, 6, 48
ALL = Pairs(200, 50)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A directory with ``model``, ``regions.jsonl`` with 24 pictures, and ``config.toml``."""
    directory = tmp_path_factory.mktemp("regions")
    config = toy_run.make_model(directory / "model") / "config.json"
    content = json.loads(config.read_text())
    content["vision_config"]["layers"] = content["language_config"]["num_hidden_layers"] = 2
    config.write_text(json.dumps(content))
    synthetic.write(directory, "regions", 24, mixture="regions parts")
    lines = f"""
        [model]
        checkpoint = "{directory}/model"
        random_init = true
        [data.train.toy]
        path = "{directory}/regions.jsonl"
        [batch]
        sequences = {IMAGES}
        microbatch_size = {IMAGES}
        [stage]
        objective = "regions"
        [[stage.parameters]]
        match = '^vision/attn_pool/'
        train = false
        [[stage.parameters]]
        match = '^vision/'
        [[stage.parameters]]
        match = '.'
        train = false
        [contrastive]
        text_length = {LENGTH}
        phrases = {PHRASES}
        initial_bias = -2.0
        different_phrases = 64
        [optimizer]
        learning_rate = 0.003
        [compute]
        dtype = "float32"
        remat = "none"
        mesh = "data=1"
        [run]
        directory = "{directory}/run"
        """
    (directory / "config.toml").write_text("\n".join(line.strip() for line in lines.splitlines()))
    return directory


def open_model(toy):
    return locate.open_model(toy / "model")


def read(toy, record, pairs=ALL, size=(126, 126)):
    """The record's image is plain, of this size."""
    Image.new("RGB", size, (90, 90, 90)).save(toy / "plain.png")
    store = open_images("", str(toy / "regions.jsonl"))
    regions = parse_regions({"image": "plain.png", **record})
    return process_regions(regions, open_model(toy)[1], store, pairs)


# Reading.


def test_a_row_is_the_phrases_one_after_the_other_with_their_rectangles_of_patches(toy):
    regions = [{"box": [0, 0, 63, 126], "kind": "star", "colour": "red"}, {"box": [64, 20, 100, 21], "kind": "star"}]
    inputs, phrases, attributes, truncated = read(toy, {"regions": regions})
    _, processor = open_model(toy)
    said = [processor.tokenizer.encode(text, special=False) for text in ("kind star", "colour red", "kind star")]
    np.testing.assert_array_equal(inputs.input_ids, [*itertools.chain(*said)])
    assert not truncated and inputs.tiles.shape == (1, 126, 126, 3)
    assert phrases.shape == (3, len(PHRASE_COLUMNS)) and phrases.dtype == np.int32
    assert phrases[:, 5].tolist() == [len(tokens) for tokens in said]
    patch = processor.config.patch_size
    grid = 126 // patch
    # Middles of patches in the box: of the first box half of all columns; the second box is thinner than a patch.
    columns = [c for c in range(grid) if 0 <= (c + 0.5) * patch < 63]
    assert phrases[0, :4].tolist() == phrases[1, :4].tolist() == [0, 0, len(columns), grid]
    left, top, right, bottom = phrases[2, :4].tolist()
    assert (top, bottom) == (20 // patch, 20 // patch + 1)
    assert [c for c in range(grid) if 64 <= (c + 0.5) * patch < 100] == list(range(left, right))
    assert phrases[0, 4] == phrases[2, 4] != phrases[1, 4]
    assert attributes == {phrases[0, 4]: "kind", phrases[1, 4]: "colour"}


def test_attributes_are_numbered_in_the_order_of_the_settings_or_else_by_checksum(toy):
    regions = [{"box": [0, 0, 50, 50], "kind": "star", "colour": "red"}]
    found = read(toy, {"regions": regions}, Pairs(200, 50, ("colour", "size", "kind")))
    assert found.phrases[:, 4].tolist() == [2, 0] and found.attributes == {2: "kind", 0: "colour"}
    found = read(toy, {"regions": regions})
    assert found.phrases[:, 4].tolist() == [zlib.crc32(b"kind") & 0x7FFFFFFF, zlib.crc32(b"colour") & 0x7FFFFFFF]


def test_attributes_that_would_be_taken_for_one_are_refused(toy):
    known = AttributeIds()
    known.add({1: "kind", 2: "colour"})
    known.add({2: "colour"})
    with pytest.raises(DataError, match="'colour' and 'size' have the same checksum"):
        known.add({2: "size"})
    # The whole way: two names of one checksum, in different records. With the attributes listed there is no confusion.
    names = equal_checksums()
    directory = toy / "collision"
    directory.mkdir()
    Image.new("RGB", (126, 126), (90, 90, 90)).save(directory / "plain.png")
    records = [{"image": "plain.png", "regions": [{"box": [0, 0, 9, 9], name: "star"}]} for name in names]
    (directory / "regions.jsonl").write_text("\n".join(map(json.dumps, records)))
    path = [f"data.train.toy.path={directory}/regions.jsonl", "batch.sequences=2", "batch.microbatch_size=2"]
    with pytest.raises(DataError, match="have the same checksum"):
        first_step(toy, path, 2)
    batch = first_step(toy, [*path, f"contrastive.attributes={', '.join(names)}"], 2).batch
    assert sorted(batch.phrases.attributes[0, :, 0]) == [0, 1]


def equal_checksums() -> tuple[str, str]:
    """The first two names of ten letters, of a random stream, whose lowest 31 bits of CRC-32 are equal."""
    random, known = np.random.default_rng(0), {}
    while True:
        letters = random.integers(97, 123, (1 << 16, 10), np.uint8)
        for row in letters:
            name = row.tobytes()
            other = known.setdefault(zlib.crc32(name) & 0x7FFFFFFF, name)
            if other != name:
                return other.decode(), name.decode()


@given(
    st.tuples(st.integers(1, 400), st.integers(1, 400)),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_every_box_has_patches_and_they_lie_in_the_padded_image(size, shares):
    from dsvl2_jax.train.data.encoder_samples import _patches

    (a, b), (c, d) = sorted(shares[:2]), sorted(shares[2:])
    if a == b or c == d:
        return
    box = (a * size[0], c * size[1], b * size[0], d * size[1])
    left, top, right, bottom = _patches(box, size, 126, 14)
    assert 0 <= left < right <= 9 and 0 <= top < bottom <= 9
    for low, high, first, last, side in ((a, b, left, right, size[0]), (c, d, top, bottom, size[1])):
        shift, scale = (126 - side * 126 / max(size)) / 2, side * 126 / max(size)
        inside = [i for i in range(9) if low * scale + shift <= 14 * i + 7 < high * scale + shift]
        middle = int(((low + high) / 2 * scale + shift) // 14)
        rounding = 1e-6 * 126  # boxes whose edges lie on a patch's middle may go either way
        edges = [low * scale + shift, high * scale + shift]
        if all(abs((edge - 7) / 14 - round((edge - 7) / 14)) > rounding for edge in edges):
            assert list(range(first, last)) == (inside or [min(max(middle, 0), 8)])


def test_only_the_attributes_that_are_asked_for_are_read_and_what_is_too_much_is_counted(toy):
    regions = [{"box": [0, 0, 50, 50], "kind": "star", "colour": "red"}, {"box": [60, 60, 90, 90], "kind": "cross"}]
    one, _, _, truncated = read(toy, {"regions": regions}, Pairs(200, 50, ("colour",)))
    tokenizer = open_model(toy)[1].tokenizer
    assert one.input_ids.tolist() == tokenizer.encode("colour red", special=False) and not truncated
    two = sum(len(tokenizer.encode(text, special=False)) for text in ("kind star", "colour red"))
    for pairs in (Pairs(200, 2), Pairs(two, 50)):
        few = read(toy, {"regions": regions}, pairs)
        assert few.truncated and len(few.phrases) == 2
    with pytest.raises(SampleError, match="none of its regions has an attribute that is asked for"):
        read(toy, {"regions": regions}, Pairs(200, 50, ("size",)))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, '"regions" is nothing, expected a list'),
        ({"regions": []}, '"regions" is a list, expected a list of one or more'),
        ({"regions": ["star"]}, "region 1 is a string, expected an object"),
        ({"regions": [{"kind": "star"}]}, r'region 1: "box" is None, expected \[x1'),
        ({"regions": [{"box": [5, 5, 5, 9], "kind": "star"}]}, "x1 < x2"),
        ({"regions": [{"box": [0, 0, 9, math.nan], "kind": "star"}]}, "nan"),
        ({"regions": [{"box": [0, 0, 9, 9], "kind": 3}]}, "'kind' is 3, expected a text"),
        ({"image": [], "regions": [{"box": [0, 0, 9, 9], "kind": "star"}]}, "has no image"),
        ({"image": "none.png", "regions": [{"box": [0, 0, 9, 9], "kind": "star"}]}, "none.png"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(toy, record, message):
    with pytest.raises((SampleError, OSError), match=message):
        read(toy, record)


# The pieces, against references of their own.


def first_step(toy, overrides=(), images=IMAGES):
    """The first step of the toy's data."""
    config, processor = open_model(toy)
    found = load(toy / "config.toml", ["data.shuffle=false", *overrides])
    with contextlib.closing(open_training(found, processor, config, BatchShard(rows=images))) as pipeline:
        return next(pipeline)


def test_phrases_are_found_in_the_packed_row_and_numbered_by_what_they_say(toy):
    batch = first_step(toy).batch.micro(0)
    assert batch.phrases.boxes.shape == (IMAGES, PHRASES, 4)
    lengths = batch.phrases.lengths
    member = phrase_members(jnp.asarray(lengths), LENGTH)
    numbers = np.asarray(phrase_numbers(jnp.asarray(batch.ids), member))
    member, said = np.asarray(member), {}
    for row in range(IMAGES):
        assert lengths[row].sum() == (batch.segments[row] > 0).sum() and (member[row].sum(0) <= 1).all()
        for place in range(PHRASES):
            tokens = tuple(batch.ids[row][member[row, place] > 0])
            assert len(tokens) == lengths[row, place]
            assert bool(tokens) == (batch.phrases.attributes[row, place] >= 0) == batch.phrases.boxes[row, place].any()
            assert bool(tokens) == (numbers[row, place] != 2**32 - 1)
            if tokens:
                said.setdefault(tokens, set()).add(int(numbers[row, place]))
    assert all(len(found) == 1 for found in said.values())  # equal phrases have one number
    assert len(set.union(*said.values())) == len(said) > 10  # others have others


def test_a_regions_feature_is_the_mean_of_its_patches():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 81, 5)).astype(np.float32)
    sides = np.array([[[0, 0, 9, 9], [2, 3, 5, 4]], [[8, 8, 9, 9], [0, 1, 3, 9]]])
    found = region_features(jnp.asarray(x), jnp.asarray(sides), 9)
    for image in range(2):
        for place in range(2):
            left, top, right, bottom = sides[image, place]
            expected = x[image].reshape(9, 9, 5)[top:bottom, left:right].mean((0, 1))
            np.testing.assert_allclose(found[image, place], expected, rtol=1e-5, atol=1e-6)


def test_a_region_is_compared_with_the_different_phrases_of_its_attribute():
    rng = np.random.default_rng(1)
    attributes = np.array([0, 0, 1, 0, 1, 0, 0])
    numbers = np.array([7, 9, 3, 7, 4, 8, 2**32 - 1], np.uint32)  # the last place is empty
    x, by_number = rng.normal(size=(7, 5)), {number: rng.normal(size=5) for number in numbers}
    y = np.stack([by_number[number] for number in numbers])
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y))
    total, right = 0.0, 0
    for i in range(6):
        cosines = {}
        for j in range(6):
            if attributes[i] == attributes[j]:
                cosines[numbers[j]] = x[i] @ y[j]
        total += sum(
            math.log1p(math.exp((-1 if number == numbers[i] else 1) * (6.0 * cosine - 2.0)))
            for number, cosine in cosines.items()
        )
        right += max(cosines, key=cosines.get) == numbers[i]
    args = (jnp.float32(x), jnp.float32(y), jnp.asarray(numbers), jnp.asarray(attributes))
    loss, accuracy = region_loss(*args, jnp.float32(math.log(6.0)), jnp.float32(-2.0), 16)
    np.testing.assert_allclose(loss, total / 6, rtol=1e-5)
    np.testing.assert_allclose(accuracy, right / 6)


# Steps.


def trainer(toy, mesh=None, **compute) -> RegionTrainer:
    config, processor = open_model(toy)
    found = load(toy / "config.toml")
    shards = 1 if mesh is None else mesh.shape["data"]
    batch = dataclasses.replace(found.batch, microbatch_size=IMAGES // shards)
    found = dataclasses.replace(found, batch=batch, compute=dataclasses.replace(found.compute, **compute))
    return RegionTrainer(config, found, processor.config.image_mean, processor.config.image_std, mesh)


def stepped(own, batch, steps):
    params = init_params(own.config, jax.random.key(0))
    before = flatten_dict(jax.device_get(params))
    state, found = own.init(params), []
    for _ in range(steps):
        state, metrics = own.step(state, batch)
        found.append(jax.device_get(metrics))
    return found, before, flatten_dict(jax.device_get(own.params(state)))


@pytest.fixture(scope="module")
def batch(toy):
    return first_step(toy).batch


@pytest.fixture(scope="module")
def one_device(toy, batch):
    return stepped(trainer(toy), batch, 40)


def test_a_fixed_batch_is_learnt_and_the_rest_of_the_model_keeps_every_bit(one_device, batch):
    metrics, before, after = one_device
    assert metrics[0].images == IMAGES and metrics[0].tokens == (batch.segments > 0).sum()
    assert metrics[-1].accuracy > 0.75 > 2 * metrics[0].accuracy and metrics[-1].loss < 0.3 * metrics[0].loss
    for path, value in before.items():
        same = np.array_equal(value.view(np.uint8), after[path].view(np.uint8))
        assert same == (path[0] != "vision" or path[1] == "attn_pool"), path


def test_losses_are_those_of_boxes_and_attributes_packed_into_labels(one_device):
    """As the trainer gave them when a phrase's box and attribute were bits of its tokens' labels."""
    before = [(3.576606035232544, 31.571157455444336), (4.278747081756592, 17.311126708984375)]
    for metrics, expected in zip(one_device[0], before, strict=False):
        np.testing.assert_allclose((metrics.loss, metrics.gradient_norm), expected, rtol=1e-4)


@pytest.mark.parametrize("sizes", [pytest.param({"data": 2}, marks=pytest.mark.exhaustive), {"data": 2, "tensor": 3}])
def test_a_mesh_computes_what_one_device_does(toy, one_device, batch, sizes):
    mesh = make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    metrics, _, _ = stepped(trainer(toy, mesh), batch, 3)
    for found, expected in zip(metrics, one_device[0], strict=False):
        for name in ("loss", "gradient_norm", "accuracy"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=3e-5)


def test_flops_agree_with_xla(toy, batch):
    own = trainer(toy, scan_layers=False)
    flops = region_flops(own.config, own.parameter_rules)
    state = jax.eval_shape(lambda: own.init(init_params(own.config, jax.random.key(0))))
    counted = own._step.lower(state, batch).cost_analysis()["flops"]
    assert 1.0 < counted / (flops.per_tile * IMAGES) < 1.3


def test_the_pooling_head_is_not_trained_on_regions(toy):
    rules = load(toy / "config.toml").stage.parameters[1:]
    with pytest.raises(SettingsError, match="no gradient from the regions objective"):
        assign(["vision/attn_pool/latent", "vision/norm/scale", "language/norm/scale"], rules, "regions")


# What the micro model's encoder reads.


def test_regions_say_what_is_drawn_and_letters_fill_the_writing():
    for index in range(60):
        picture = synthetic.sample(synthetic.rng_of(0, 5, index), "parts", 1).pictures[0]
        found = synthetic.regions(picture)
        width, height = picture.size
        for region in found:
            x1, y1, x2, y2 = region["box"]
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
            if "left" in region:
                assert abs(int(region["left"]) - 20 * x1 / width) <= 0.5
                assert abs(int(region["bottom"]) - 20 * y2 / height) <= 0.5
        assert [r["kind"] for r in found if "kind" in r] == [shape.kind for shape in picture.shapes]
        if picture.writing is not None:
            signs = [r for r in found if "digit" in r or "letter" in r]
            assert "".join(r.get("digit") or r["letter"] for r in signs) == picture.writing.text
            boxes = [r["box"] for r in signs]
            assert boxes[0][0] == picture.writing.box[0] and boxes[-1][2] == picture.writing.box[2]
            assert all(a[2] == b[0] for a, b in itertools.pairwise(boxes))
        if picture.chart is not None:
            assert [r["value"] for r in found] == [str(bar.value) for bar in picture.chart.bars]
        assert picture.chart or picture.writing or isinstance(picture.shapes[0], pictures.Shape)
