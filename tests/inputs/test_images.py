"""Loading and tiling: the official rule, its arithmetic, and errors that name the file."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from golden import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, features

from dsvl2_jax.errors import ImageError
from dsvl2_jax.inputs.images import (
    FORMATS,
    image_size,
    load_image,
    read_image,
    select_best_resolution,
    tile_image,
)

S, GRAY = 384, (127, 127, 127)
RELEASED = [
    tuple(candidate)
    for candidate in json.loads((DATA / "checkpoints/mini-tiny/processor_config.json").read_text())[
        "candidate_resolutions"
    ]
]


def test_resolution_choice_equals_the_official_one():
    cases = json.loads((DATA / "reference/select_best_resolution.json").read_text())
    wrong = [(size, best) for size, best in cases if select_best_resolution(tuple(size), RELEASED) != tuple(best)]
    assert not wrong


@settings(deadline=None, max_examples=25)
@given(width=st.integers(1, 900), height=st.integers(1, 900), crop=st.booleans())
def test_tiles_put_together_are_the_padded_image(width, height, crop):
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 255, (height, width, 3), np.uint8)
    candidates = RELEASED if crop else [(S, S)]
    tiles, (cols, rows) = tile_image(Image.fromarray(pixels), candidates, S, GRAY)
    assert tiles.shape == (1 + cols * rows, S, S, 3)
    assert tiles.dtype == np.uint8
    assert 1 <= cols * rows <= 9
    if not crop or (cols, rows) == (1, 1):
        assert (cols, rows) == (1, 1)
        np.testing.assert_array_equal(tiles[0], tiles[1])


def test_local_tiles_go_row_by_row():
    image = Image.new("RGB", (3 * S, 2 * S))
    for index in range(6):
        image.paste((40 * index, 0, 0), (S * (index % 3), S * (index // 3), S * (index % 3 + 1), S * (index // 3 + 1)))
    tiles, grid = tile_image(image, RELEASED, S, GRAY)
    assert grid == (3, 2)
    assert [int(tile[S // 2, S // 2, 0]) for tile in tiles[1:]] == [40 * index for index in range(6)]
    assert tuple(tiles[0][0, 0]) == GRAY


def test_an_image_too_thin_to_survive_resizing_still_gives_tiles():
    for size in ((1, 5000), (5000, 1)):
        tiles, grid = tile_image(Image.new("RGB", size), RELEASED, S, GRAY)
        assert (tiles.shape, grid) == ((2, S, S, 3), (1, 1))


def image_bytes(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_bytes(image: Image.Image, **options) -> bytes:
    return image_bytes(image, "PNG", **options)


def test_path_bytes_and_image_load_the_same(tmp_path):
    image = Image.new("RGB", (5, 4), (1, 2, 3))
    path = tmp_path / "image.png"
    path.write_bytes(png_bytes(image))
    for source in (path, str(path), path.read_bytes(), image):
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image))


def test_every_mode_becomes_rgb_as_pil_converts_it():
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "F"):
        image = Image.new(mode, (3, 2))
        np.testing.assert_array_equal(np.asarray(load_image(image)), np.asarray(image.convert("RGB")))
    rgba = Image.new("RGBA", (1, 1), (10, 20, 30, 0))
    assert load_image(rgba).getpixel((0, 0)) == (10, 20, 30)  # alpha is dropped, not blended


def test_exif_orientation_is_applied_only_when_asked():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    source = png_bytes(Image.new("RGB", (4, 2)), exif=exif)
    assert load_image(source).size == (4, 2)
    assert load_image(source, as_seen=True).size == (2, 4)


@settings(deadline=None, max_examples=20)
@given(
    channels=st.sampled_from([None, 1, 3, 4]), size=st.tuples(st.integers(1, 9), st.integers(1, 9)), flip=st.booleans()
)
def test_an_array_is_read_as_the_image_of_its_pixels(channels, size, flip):
    shape = size if channels is None else (*size, channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    pixels = pixels[:, ::-1] if flip else pixels  # a view that is not contiguous
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if channels == 1 else pixels))
    for as_seen in (False, True):
        one, traits = read_image(pixels, as_seen)
        other, same_traits = read_image(png_bytes(image), as_seen)
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
        assert traits == same_traits


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2, 3), np.float32), r"array of float32 \[2, 2, 3\]: .*uint8.*255 \* x"),
        (np.zeros((2, 2, 3), np.int64), "array of int64.*Scale its values"),
        (np.zeros((2, 2), bool), "array of bool"),
        (np.zeros((3, 8, 9), np.uint8), r"expected \[height, width\].*x\.transpose\(1, 2, 0\)"),
        (np.zeros((5, 8, 9, 3), np.uint8), "one by one"),
        (np.zeros(5, np.uint8), r"expected \[height"),
        (np.zeros((0, 8, 3), np.uint8), "no pixels"),
    ],
)
def test_an_array_that_is_no_image_says_what_to_do(array, message):
    with pytest.raises(ImageError, match=message):
        load_image(array)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(data=st.data())
def test_broken_exif_data_never_cost_the_image(data):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    block = bytearray(exif.tobytes())
    for place in data.draw(st.lists(st.integers(6, len(block) - 1), max_size=8)):  # after PIL's own "Exif" mark
        block[place] = data.draw(st.integers(0, 255))
    source = image_bytes(Image.new("RGB", (4, 2), "red"), "JPEG", exif=bytes(block))
    assert load_image(source, as_seen=True).size in ((4, 2), (2, 4))
    np.testing.assert_array_equal(np.asarray(load_image(source)), np.full((2, 4, 3), (254, 0, 0)))


def test_transparency_is_laid_over_white_only_when_asked():
    colours = {0: (255, 255, 255), 255: (10, 20, 30), 102: (157, 161, 165)}  # of (10, 20, 30) under this alpha
    for alpha, over_white in colours.items():
        source = image_bytes(Image.new("RGBA", (2, 2), (10, 20, 30, alpha)), "PNG")
        assert load_image(source).getpixel((0, 0)) == (10, 20, 30)
        assert load_image(source, as_seen=True).getpixel((0, 0)) == over_white


def test_every_way_to_be_transparent_is_laid_over_white():
    palette = Image.new("P", (1, 1))
    palette.putpalette([10, 20, 30])
    gray16 = Image.fromarray(np.array([[300]], np.uint16))
    images = {
        "palette, PNG": image_bytes(palette, "PNG", transparency=0),
        "palette, GIF": image_bytes(palette, "GIF", transparency=0),
        "gray and alpha": image_bytes(Image.new("LA", (1, 1), (10, 0)), "PNG"),
        "gray, one clear value": image_bytes(Image.new("L", (1, 1), 10), "PNG", transparency=10),
        "RGB, one clear colour": image_bytes(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
        "WebP": image_bytes(Image.new("RGBA", (1, 1), (10, 20, 30, 0)), "WEBP", lossless=True, exact=True),
        "premultiplied": Image.new("RGBa", (1, 1)),
    }
    for kind, source in images.items():
        assert load_image(source).getpixel((0, 0)) != (255, 255, 255), kind
        assert load_image(source, as_seen=True).getpixel((0, 0)) == (255, 255, 255), kind
        assert read_image(source)[1] == ("transparent",), kind
    opaque = image_bytes(gray16, "PNG")
    assert load_image(opaque, as_seen=True).getpixel((0, 0)) == (1, 1, 1)


def test_animation_gives_its_first_frame():
    frames = [Image.new("P", (2, 2), index) for index in (1, 2)]
    for frame in frames:
        frame.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert load_image(buffer.getvalue()).getpixel((0, 0)) == (255, 0, 0)


def bomb_png(width: int, height: int) -> bytes:
    """A PNG header that claims this size, with no pixels behind it."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body)) for tag, body in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def broken_files() -> dict[str, tuple[bytes, str]]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    jpeg = io.BytesIO()
    noise.save(jpeg, "JPEG")
    return {
        "text.png": (b"this is no image", "not an image"),
        "empty.png": (b"", "not an image"),
        "cut.png": (png_bytes(noise)[:3000], "damaged"),
        "cut.jpg": (jpeg.getvalue()[:1500], "damaged"),
        "big.png": (bomb_png(10_000, 10_000), "10000×10000"),  # PIL only warns
        "bomb.png": (bomb_png(60_000, 60_000), "too large"),  # PIL refuses
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", broken_files())
def test_broken_file_is_an_error_that_names_it(tmp_path, name):
    content, problem = broken_files()[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ImageError, match=problem) as error:
        load_image(path)
    assert str(path) in str(error.value)
    with pytest.raises(ImageError, match=problem):
        load_image(content)


def test_missing_file_directory_and_strange_objects_are_errors(tmp_path):
    with pytest.raises(ImageError, match=r"nowhere\.png: no such file"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="directory"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="0×3"):
        load_image(Image.new("RGB", (0, 3)))
    with pytest.raises(ImageError, match="int"):
        load_image(3)


def test_pixel_limit_can_be_changed():
    image = Image.new("RGB", (20, 10))
    assert load_image(image, max_pixels=200).size == (20, 10)
    with pytest.raises(ImageError, match="199"):
        load_image(image, max_pixels=199)


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_formats_that_pictures_are_shared_in_are_read(file_format):
    if file_format == "AVIF" and not features.check("avif"):
        pytest.skip("this PIL was built without AVIF")
    source = image_bytes(Image.new("RGB", (6, 4), (200, 0, 0)), file_format)
    assert np.abs(np.asarray(load_image(source), np.int32) - (200, 0, 0)).max() <= 6  # lossy ones are not exact
    assert image_size(source) == (6, 4)


def test_the_first_picture_of_a_camera_file_of_several_is_read():
    source = image_bytes(Image.new("RGB", (6, 4)), "MPO", save_all=True, append_images=[Image.new("RGB", (3, 2))])
    assert load_image(source).size == (6, 4)


def refused_files() -> dict[str, bytes]:
    image = Image.new("RGB", (8, 8), "red")
    return {
        **{name: image_bytes(image, name) for name in ("EPS", "ICO", "JPEG2000", "PCX", "SGI", "TGA", "PDF", "ICNS")},
        "a PostScript program": b"%!PS-Adobe-3.0\n%%BoundingBox: 0 0 8 8\n(%pipe%touch /tmp/x) (w) file\nshowpage\n",
        "EPS with a preview": bytes.fromhex("c5d0d3c6") + struct.pack("<7I", 32, 90, 0, 0, 0, 0, 0) + b"%!PS-Adobe",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
        "an ImageMagick script": b"push graphic-context\nviewbox 0 0 8 8\nfill 'url(https://x/)'\npop graphic-context",
    }


@pytest.mark.parametrize("kind", refused_files())
@pytest.mark.parametrize("suffix", ["png", "eps"])
def test_other_formats_are_refused_whatever_they_are_called(tmp_path, monkeypatch, kind, suffix):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    path = tmp_path / f"picture.{suffix}"
    path.write_bytes(refused_files()[kind])
    for read in (load_image, image_size):
        with pytest.raises(ImageError, match=r"picture\..*not an image in a format that is read \(.*PNG.*\)"):
            read(path)
        with pytest.raises(ImageError, match="not an image in a format that is read"):
            read(path.read_bytes())


def test_the_size_is_read_without_the_pixels():
    assert image_size(bomb_png(9_000, 9_000)) == (9_000, 9_000)
    with pytest.raises(ImageError, match="too large"):
        image_size(bomb_png(60_000, 60_000))
    with pytest.raises(ImageError, match="not an image"):
        image_size(b"")
