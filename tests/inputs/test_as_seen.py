"""Pictures as people see them: turned, over white and divided, and what is said where the official reading differs."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dsvl2_jax.inputs.images import image_size, load_image, read_image, trait_notes


def image_bytes(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def test_sixteen_bits_are_clipped_or_as_seen_divided():
    values = np.array([[0, 255, 256, 65535]], np.uint16)
    source = image_bytes(Image.fromarray(values))
    assert np.asarray(load_image(source))[0, :, 0].tolist() == [0, 255, 255, 255]
    assert np.asarray(load_image(source, as_seen=True))[0, :, 0].tolist() == [0, 0, 1, 255]
    assert read_image(source)[1] == read_image(source, as_seen=True)[1] == ("16-bit",)
    dim = image_bytes(Image.fromarray(values[:, :2]))
    for as_seen in (False, True):
        assert np.asarray(load_image(dim, as_seen))[0, :, 0].tolist() == [0, 255]
    assert read_image(dim)[1] == ()


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@settings(deadline=None, max_examples=10)
@given(orientation=st.integers(0, 9), width=st.integers(1, 20), height=st.integers(1, 20))
def test_as_seen_an_image_is_the_one_that_was_turned_before(file_format, orientation, width, height):
    pixels = np.random.default_rng(width * 100 + height).integers(0, 255, (height, width, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}}.get(file_format, {})
    stored = image_bytes(Image.fromarray(pixels), file_format, exif=exif, **options)
    plain = Image.open(io.BytesIO(image_bytes(Image.fromarray(pixels), file_format, **options))).convert("RGB")
    turns = [lambda a: a, np.fliplr, lambda a: a[::-1, ::-1], np.flipud]
    turns += [lambda a: a.swapaxes(0, 1), lambda a: np.rot90(a, -1), lambda a: np.rot90(a, 2).swapaxes(0, 1), np.rot90]
    turned = turns[orientation - 1](np.asarray(plain)) if 1 <= orientation <= 8 else np.asarray(plain)
    seen, traits = read_image(stored, as_seen=True)
    np.testing.assert_array_equal(np.asarray(seen), turned)
    assert image_size(stored, as_seen=True) == seen.size
    if file_format == "TIFF":  # PIL turns these itself, so that the official reading does
        assert traits == () and np.array_equal(np.asarray(load_image(stored)), turned)
        assert image_size(stored) == seen.size
    else:
        assert traits == (("turned",) if 2 <= orientation <= 8 else ())
        np.testing.assert_array_equal(np.asarray(load_image(stored)), np.asarray(plain))
        assert image_size(stored) == plain.size


@pytest.mark.parametrize("as_seen", [False, True])
def test_reading_an_image_again_changes_nothing(as_seen):
    exif = Image.Exif()
    exif[0x0112] = 6
    once, traits = read_image(image_bytes(Image.new("LA", (3, 2), (9, 50)), exif=exif), as_seen)
    again, none = read_image(once, True)
    assert traits == ("turned", "transparent") and none == ()
    np.testing.assert_array_equal(np.asarray(once), np.asarray(again))


@settings(deadline=None, max_examples=30)
@given(
    mode=st.sampled_from(["RGBA", "LA", "PA", "RGBa"]),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    data=st.data(),
)
def test_as_seen_alpha_is_laid_over_white(mode, size, data):
    channels = {"RGBA": 4, "LA": 2, "PA": 4, "RGBa": 4}[mode]
    raw = data.draw(st.binary(min_size=size[0] * size[1] * channels, max_size=size[0] * size[1] * channels))
    image = Image.frombytes("LA" if mode == "LA" else "RGBA", size, raw)
    image = image.convert(mode)
    straight = np.asarray(image.convert("RGBA"), np.float64)
    alpha = straight[..., 3:] / 255
    seen, traits = read_image(image, as_seen=True)
    expected = straight[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(np.asarray(seen) - expected).max() <= 1
    assert traits == (("transparent",) if alpha.min() < 1 else ())
    np.testing.assert_array_equal(np.asarray(load_image(image)), np.asarray(image.convert("RGB")))


def test_notes_count_the_pictures_of_each_kind():
    assert trait_notes([], "x") == []
    turned, deep = trait_notes(["16-bit", "turned", "turned"], "--as-seen")
    assert turned.startswith("2 pictures with an EXIF orientation") and "--as-seen turns them" in turned
    assert deep.startswith("1 picture with 16-bit")
