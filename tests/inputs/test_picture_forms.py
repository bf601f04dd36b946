"""Pictures on their way into the processor: every form gives the same tiles, and what is read otherwise is said."""

import base64
import contextlib
import dataclasses
import io
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from golden import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dsvl2_jax.errors import DSVL2Error, ImageError
from dsvl2_jax.inputs.processor import Processor


@pytest.fixture(scope="module")
def mini() -> Processor:
    return Processor.from_dir(DATA / "checkpoints" / "mini-tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


def png(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=0, **options)
    return buffer.getvalue()


@settings(deadline=None, max_examples=12)
@given(size=st.tuples(st.integers(1, 500), st.integers(1, 500)), seed=st.integers(0, 9), as_seen=st.booleans())
def test_every_way_to_give_a_picture_gives_the_same_tokens_and_tiles(mini, folder, size, seed, as_seen):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    data, path = png(Image.fromarray(pixels)), folder / "a.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    url = f"data:image/png;base64,{text}"
    given = [path, str(path), data, bytearray(data), url, {"url": url}, {"base64": text}, {"path": str(path)}]
    given += [{"media_type": "image/png", "data": text}, Image.open(path), pixels, jnp.asarray(pixels)]
    processor = dataclasses.replace(mini, as_seen=as_seen)
    expected = processor(prompt="<image>\nWhat?", apply_sft_format=True, images=[Image.fromarray(pixels)])
    for number, picture in enumerate(given):
        key = ("image", "image_url")[number % 2]
        parts = {"role": "User", "content": [{"type": key, key: picture}, {"type": "text", "text": "What?"}]}
        string = {"from": "HUMAN", "value": "<image>\nWhat?", "image": picture}
        inputs = processor([(parts, string)[number // 2 % 2]])
        for name in ("input_ids", "labels", "image_index", "tiles", "tile_grid", "image_sizes"):
            np.testing.assert_array_equal(getattr(inputs, name), getattr(expected, name))


texts = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=8)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.none() | texts, max_size=4), min_size=1, max_size=3))
def test_a_conversation_in_parts_and_in_strings_gives_the_same_tokens(mini, turns):
    picture = Image.new("RGB", (8, 8), "red")
    parts, strings, count = [], [], 0
    for content in turns:
        count += content.count(None)
        listed = [{"type": "image", "image": picture} if part is None else part for part in content]
        text = "".join(
            "<image>\n" if part is None else ("\n" if before is not None else "") + part
            for before, part in zip([None, *content], content, strict=False)
        )
        parts += [{"role": "USER", "content": listed}, {"role": "Assistant", "content": ["Yes."]}]
        strings += [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]
    one = mini(parts, inference=False)
    other = mini(strings, [picture] * count, inference=False)
    for name in ("input_ids", "labels", "image_index", "tiles"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_pictures_that_are_read_otherwise_than_seen_are_warned_of_once_a_kind(mini):
    exif = Image.Exif()
    exif[0x0112] = 6
    odd = [png(Image.new("RGBA", (8, 4)), exif=exif), Image.new("RGBA", (8, 8), (1, 2, 3, 254))]
    fine = [Image.new("RGBA", (8, 8), "red"), Image.new("RGB", (8, 8))]

    def warned(processor: Processor, pictures: list) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            processor(prompt="<image>" * len(pictures), images=pictures)
        return [str(warning.message) for warning in caught]

    turned, transparent = warned(mini, [*fine, *odd])
    assert turned.startswith("1 picture with an EXIF orientation") and "as_seen=True turns them" in turned
    assert transparent.startswith("2 pictures with transparent pixels")
    assert not warned(mini, fine)
    assert not warned(dataclasses.replace(mini, as_seen=True), odd)
    assert not warned(dataclasses.replace(mini, warns=False), odd)
    seen = dataclasses.replace(mini, as_seen=True)(prompt="<image>", images=odd[:1])
    assert seen.image_traits == ("turned", "transparent")
    assert seen.image_sizes.tolist() == [[4, 8]]  # boxes are in the pixels of the turned picture


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("https://example.com/a.png", "on the web"),
        ("data:image/png;base64,%%%", "not valid base64"),
        ({"url": ""}, "found dict"),
        ("nowhere/a.png", r"nowhere/a\.png: no such file"),
        ("a\0.png", "cannot be read"),
        ("x" * 5000, "cannot be read"),
        (3.5, "image object float: expected a path"),
    ],
)
def test_a_picture_that_cannot_be_had_says_why(mini, picture, message):
    with pytest.raises(ImageError, match=message):
        mini([{"role": "user", "content": [{"type": "image", "image": picture}]}])


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=4)
leaves |= st.sampled_from(["<image>", "a\ud800", "<image_placeholder>", "data:image/png;base64,AAAA", "/9j/" * 20, "."])
leaves |= st.builds(lambda shape: np.zeros(shape, np.uint8), st.lists(st.integers(0, 4), max_size=4))
keys = st.sampled_from(["type", "text", "image", "image_url", "url", "path", "base64", "data", "source", "x"])
anything = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3))
kinds = st.sampled_from(["text", "image", "image_url"])
odd_parts = st.fixed_dictionaries(
    {"type": kinds | anything}, optional=dict.fromkeys(("text", "image", "url"), anything)
)
odd_turns = st.fixed_dictionaries(
    {"role": st.just("user") | anything, "content": st.just("<image>") | st.lists(odd_parts, max_size=3) | anything},
    optional={"images": anything, "image": anything, "x": anything},
)


@settings(deadline=None, max_examples=150)
@given(st.lists(odd_turns, min_size=1, max_size=2), st.none() | st.lists(anything, max_size=2), st.booleans())
def test_whatever_a_conversation_is_it_becomes_inputs_or_an_error_for_people(mini, conversation, images, inference):
    with contextlib.suppress(DSVL2Error):
        assert mini(conversation, images, inference=inference).input_ids.size > 0
