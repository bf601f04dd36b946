"""Images from files and memory, and their cutting into tiles (dynamic tiling, arXiv 2412.10302)."""

import contextlib
import functools
import io
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps

from dsvl2_jax.errors import ImageError

# Beside these an array u8[H, W], u8[H, W, 3] or u8[H, W, 4] of numpy, jax or another library with `__array__`.
ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

# PIL's own warning level, 89 million pixels. A few kilobytes of PNG can unpack to more and exhaust the memory.
MAX_IMAGE_PIXELS = 89_478_485

# PIL's names of the formats that are read: those that pictures are shared in. Its other readers meet too few files to
# be trusted with any, and EPS has Ghostscript run the file as a program. JPEG covers the MPO files of cameras.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

# What a viewer shows differently than the official loader reads it.
TURNED, TRANSPARENT, DEEP = TRAITS = ("turned", "transparent", "16-bit")

_NOTES = {
    TURNED: "an EXIF orientation: the official reading leaves them as stored; {remedy} turns them.",
    TRANSPARENT: "transparent pixels: the official reading shows the colours stored there; {remedy} lays them over "
    "white.",
    DEEP: "16-bit gray values: the official reading makes all over 255 white; {remedy} divides them by 256.",
}

_ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = (5, 6, 7, 8)  # width and height change places


def read_image(
    source: ImageSource, as_seen: bool = False, *, max_pixels: int = MAX_IMAGE_PIXELS
) -> tuple[Image.Image, tuple[str, ...]]:
    """An RGB image, and what a viewer would show differently than the official loader reads it.

    The official reading is ``Image.open(f).convert("RGB")``: alpha is dropped, EXIF orientation is ignored, 16-bit gray
    values over 255 become white. In either reading an animation gives its first frame.

    Args:
      source: a path, a file's bytes, a PIL image, or an array u8[H, W], u8[H, W, 3] or u8[H, W, 4]. Files are read in
        the `FORMATS` alone.
      as_seen: turn the image as its EXIF data say (data that cannot be read turn nothing), lay transparent pixels over
        white, and divide 16-bit gray values by 256.
      max_pixels: the most that are decoded; the header alone is read of a larger image.

    Returns:
      The image, and those of `TRAITS` that it has, in either reading. It keeps nothing of its file but the pixels, so
      that reading it again changes nothing.

    Raises ImageError, naming the file, if it is missing, a directory, not an image, truncated, without pixels,
    or has more than `max_pixels` pixels.
    """
    name = name_of(source)
    with _opened(source, name) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(
                f"{name}: the image is {width}×{height} pixels, more than the {max_pixels} that are read. Scale it "
                "down, or raise max_pixels (dsvl2_jax.inputs.images.MAX_IMAGE_PIXELS) if you trust the file."
            )
        image.load()
        orientation, alpha = _orientation(image), _alpha(image)
        deep = image.mode.startswith("I") and np.asarray(image).max() > 255
        found = {TURNED: orientation in _TURNS, TRANSPARENT: alpha is not None, DEEP: deep}
        if as_seen:
            seen = _divided(image) if deep else image
            rgb = seen.convert("RGB") if alpha is None else _over_white(seen, alpha)
            rgb = rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb
        else:
            rgb = image.convert("RGB")
        rgb.info = {}
        return rgb, tuple(trait for trait, has in found.items() if has)


def load_image(source: ImageSource, as_seen: bool = False, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """The image alone of `read_image`, whose arguments and errors these are."""
    return read_image(source, as_seen, max_pixels=max_pixels)[0]


def image_size(source: ImageSource, as_seen: bool = False) -> tuple[int, int]:
    """(width, height) of what `load_image` would give, from the file's header: no pixels are decoded.

    As seen, a PNG is decoded: its EXIF data may stand behind the pixels. Raises ImageError as `load_image` does, but
    for the number of pixels, which is the caller's to judge below PIL's own limit of twice MAX_IMAGE_PIXELS.
    """
    with _opened(source, name_of(source)) as image:
        width, height = image.size
        if as_seen and image.format != "TIFF" and _orientation(image) in _LYING:  # PIL turns a TIFF itself
            return height, width
        return width, height


def trait_notes(traits: Iterable[str], remedy: str) -> list[str]:
    """A sentence for each kind among the traits of pictures that were read officially: how many, and what to do.

    Args:
      remedy: the option that reads pictures as seen, by the name that the reader of the sentence knows it by.
    """
    counts = Counter(traits)
    return [
        f"{counts[trait]} picture{'s' if counts[trait] > 1 else ''} with {words.format(remedy=remedy)}"
        for trait, words in _NOTES.items()
        if counts[trait]
    ]


def select_best_resolution(size: tuple[int, int], candidates: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The candidate (width, height) that keeps most of an image of `size`; ties go to the least wasted area.

    Kept pixels are min(int(w·s)·int(h·s), w·h) with s = min(W/w, H/h); a further tie goes to the first candidate.
    """
    width, height = size

    def rank(candidate: tuple[int, int]) -> tuple[int, int]:
        scale = min(candidate[0] / width, candidate[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - candidate[0] * candidate[1]

    return max(candidates, key=rank)  # max returns the first of equals


def tile_image(
    image: Image.Image,
    candidates: Sequence[tuple[int, int]],
    tile_size: int,
    pad_colour: tuple[int, int, int],
) -> tuple[np.ndarray, tuple[int, int]]:
    """Cut an RGB image into its global view and its local tiles.

    Returns (tiles u8[1 + rows·cols, S, S, 3], (cols, rows)): the whole image padded to one tile first, then the
    tiles of the image padded to the best candidate, row by row. Each view is resized (bicubic) from the original and
    centred on `pad_colour`; of a single tile the local view equals the global one.
    """
    canvas = select_best_resolution(image.size, candidates)
    cols, rows = canvas[0] // tile_size, canvas[1] // tile_size
    global_view = pad_image(image, (tile_size, tile_size), pad_colour)
    local_view = pad_image(image, canvas, pad_colour) if (cols, rows) != (1, 1) else global_view
    local = local_view.reshape(rows, tile_size, cols, tile_size, 3).swapaxes(1, 2)
    return np.concatenate([global_view[None], local.reshape(-1, tile_size, tile_size, 3)]), (cols, rows)


def pad_image(image: Image.Image, size: tuple[int, int], pad_colour: tuple[int, int, int]) -> np.ndarray:
    """An RGB image resized (bicubic) to fit into (width, height) and centred on `pad_colour`: u8[height, width, 3]."""
    return np.asarray(ImageOps.pad(image, size, color=pad_colour))


def check_file(path: str | os.PathLike[str], name: str) -> None:
    """Raises ImageError, beginning with ``name``, where a path leads to no file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        if isinstance(error, FileNotFoundError):
            where = f"Check the path; a relative one starts at {Path.cwd()}."
            raise ImageError(f"{name}: no such file. {where}") from None
        raise ImageError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error}).") from None
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{name}: is a directory. Give the path of an image file.")


@contextlib.contextmanager
def _opened(source: ImageSource, name: str) -> Iterator[Image.Image]:
    """An image whose header alone has been read. What goes wrong with it afterwards is an ImageError as well."""
    if isinstance(source, str | os.PathLike):
        check_file(source, name)
    elif isinstance(source, bytearray | memoryview):
        source = bytes(source)
    elif not isinstance(source, bytes | Image.Image):
        source = _from_array(source, name)
    try:
        with contextlib.ExitStack() as stack:
            image = source
            if not isinstance(source, Image.Image):
                file = io.BytesIO(source) if isinstance(source, bytes) else source
                image = stack.enter_context(Image.open(file, formats=_formats()))
            if 0 in image.size:
                raise ImageError(
                    f"{name}: the image is {image.width}×{image.height} pixels, so there is nothing to see."
                )
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: the image is too large to be safe ({error}). Scale it down first.") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: not an image in a format that is read ({', '.join(_formats())}). Convert it to PNG or JPEG."
        ) from error
    except ImageError:
        raise
    except Exception as error:  # PIL's many decoders meet a broken file with almost any exception
        raise ImageError(f"{name}: the image cannot be read, it is damaged or cut short ({error}).") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this PIL has a reader of: AVIF came late."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _from_array(source: Any, name: str) -> Image.Image:
    if not hasattr(source, "__array__"):
        raise ImageError(f"{name}: expected a path, a file's bytes, a PIL image or an array.")
    array = np.asarray(source)
    if array.dtype != np.uint8:
        remedy = "Convert it: (255 * x).round().astype(numpy.uint8) where its values are from 0 to 1."
        if array.dtype.kind not in "fV":  # V: numpy's kind of the short floats of jax
            remedy = "Scale its values to 0 … 255 and convert it."
        raise ImageError(f"{name}: an image's values are of type uint8, from 0 to 255. {remedy}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        remedy = ""
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            remedy = " Move the channels to the end: x.transpose(1, 2, 0)."
        elif array.ndim == 4:
            remedy = " Give the images of a batch one by one."
        raise ImageError(f"{name}: expected [height, width], [height, width, 3] or [height, width, 4].{remedy}")
    if 0 in array.shape:
        raise ImageError(f"{name}: has no pixels, so there is nothing to see.")
    return Image.fromarray(np.ascontiguousarray(array))


def _orientation(image: Image.Image) -> int:
    """EXIF's number; 1 for data that cannot be read, as viewers show the image all the same."""
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:
        return 1
    return value if isinstance(value, int) else 1


def _alpha(image: Image.Image) -> Image.Image | None:
    """The alpha of a decoded image, in mode L; None where it hides nothing."""
    if not image.has_transparency_data:
        return None
    if image.mode.startswith("I"):  # one gray value is clear
        clear = np.asarray(image) == image.info["transparency"]
        alpha = Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))
    else:
        alpha = (image if image.mode in ("RGBA", "LA") else image.convert("RGBA")).getchannel("A")
    return alpha if alpha.getextrema()[0] < 255 else None


def _over_white(image: Image.Image, alpha: Image.Image) -> Image.Image:
    white = Image.new("RGB", image.size, "white")
    # A premultiplied image has its own colours in RGBA alone; one of 16 bits has no such form.
    white.paste(image.convert("RGB" if image.mode.startswith(("I", "L")) else "RGBA").convert("RGB"), mask=alpha)
    return white


def _divided(image: Image.Image) -> Image.Image:
    """An image of 16-bit gray values with 8 bits."""
    return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))


def name_of(source: object) -> str:
    """What a source of an image is called in messages."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"PIL image {source.width}×{source.height}"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"image of {len(source)} bytes"
    if hasattr(source, "__array__"):
        return f"array of {getattr(source, 'dtype', 'values')} {list(np.shape(source))}"
    return f"image object {type(source).__name__}"
