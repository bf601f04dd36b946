"""Images from files and memory, and their cutting into tiles (dynamic tiling, arXiv 2412.10302)."""

import contextlib
import functools
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps

from dsvl2_jax.errors import ImageError

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image

# PIL's own warning level, 89 million pixels. A few kilobytes of PNG can unpack to more and exhaust the memory.
MAX_IMAGE_PIXELS = 89_478_485

# PIL's names of the formats that are read: those that pictures are shared in. Its other readers meet too few files to
# be trusted with any, and EPS has Ghostscript run the file as a program. JPEG covers the MPO files of cameras.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def load_image(
    source: ImageSource,
    apply_exif_orientation: bool = False,
    *,
    over_white: bool = False,
    rescale_16bit: bool = False,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Image.Image:
    """An RGB image from a path, a file's bytes or a PIL image, by default as the official loader makes it.

    That is ``Image.open(f).convert("RGB")``: alpha is dropped, EXIF orientation is ignored, an animation gives its
    first frame. PIL turns 16-bit gray values over 255 into white; this warns.

    Args:
      source: files are read in the `FORMATS` alone.
      apply_exif_orientation: turn the image as its EXIF data say. Data that cannot be read turn nothing.
      over_white: lay a transparent image over white, as viewers do.
      rescale_16bit: divide 16-bit gray values by 256 instead.
      max_pixels: the most that are decoded; the header alone is read of a larger image.

    Raises ImageError, naming the file, if it is missing, a directory, not an image, truncated, without pixels,
    or has more than `max_pixels` pixels.
    """
    name = _name_of(source)
    with _opened(source, name) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(
                f"{name}: the image is {width}×{height} pixels, more than the {max_pixels} that are read. Scale it "
                "down, or raise max_pixels (dsvl2_jax.inputs.images.MAX_IMAGE_PIXELS) if you trust the file."
            )
        if apply_exif_orientation:
            image = _upright(image)
        if image.mode.startswith("I"):
            image = _eight_bit(image, name, rescale_16bit)
        if over_white and image.has_transparency_data:
            image = _over_white(image)
        return image.convert("RGB")


def image_size(source: ImageSource) -> tuple[int, int]:
    """(width, height) of what `load_image` would give, from the file's header alone: no pixels are decoded.

    EXIF orientation does not count. Raises ImageError as `load_image` does, but for the number of pixels, which is the
    caller's to judge below PIL's own limit of twice MAX_IMAGE_PIXELS.
    """
    with _opened(source, _name_of(source)) as image:
        return image.size


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
    crop: bool,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Cut an RGB image into its global view and its local tiles.

    Returns (tiles u8[1 + rows·cols, S, S, 3], (cols, rows)): the whole image padded to one tile first, then the
    tiles of the image padded to the best candidate, row by row. Without `crop` the only local tile equals the
    global view. Each view is resized (bicubic) from the original and centred on `pad_colour`.
    """
    canvas = select_best_resolution(image.size, candidates) if crop else (tile_size, tile_size)
    cols, rows = canvas[0] // tile_size, canvas[1] // tile_size
    global_view = pad_image(image, (tile_size, tile_size), pad_colour)
    local_view = pad_image(image, canvas, pad_colour)
    local = local_view.reshape(rows, tile_size, cols, tile_size, 3).swapaxes(1, 2)
    return np.concatenate([global_view[None], local.reshape(-1, tile_size, tile_size, 3)]), (cols, rows)


def pad_image(image: Image.Image, size: tuple[int, int], pad_colour: tuple[int, int, int]) -> np.ndarray:
    """An RGB image resized (bicubic) to fit into (width, height) and centred on `pad_colour`: u8[height, width, 3]."""
    return np.asarray(ImageOps.pad(image, size, color=pad_colour))


@contextlib.contextmanager
def _opened(source: ImageSource, name: str) -> Iterator[Image.Image]:
    """An image whose header alone has been read. What goes wrong with it afterwards is an ImageError as well."""
    if not isinstance(source, str | os.PathLike | bytes | Image.Image):
        raise ImageError(f"{name}: expected a path, a file's bytes or a PIL image.")
    if isinstance(source, str | os.PathLike):
        if Path(source).is_dir():
            raise ImageError(f"{name}: is a directory. Give the path of an image file.")
        if not Path(source).exists():
            raise ImageError(f"{name}: no such file. Check the path; a relative one starts at {Path.cwd()}.")
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


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # here a damaged image is still an error
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF data break in as many ways as images, and viewers show the image all the same
        return image


def _over_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def _eight_bit(image: Image.Image, name: str, rescale: bool) -> Image.Image:
    """A 16-bit gray image with its values divided by 256, or as it is, with a warning, when not asked."""
    values = np.asarray(image)
    if values.max() <= 255:
        return image
    if rescale:
        return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
    warnings.warn(
        f"{name}: a 16-bit image, whose values over 255 become white, as in the official implementation. "
        "Pass rescale_16bit=True, or save it with 8 bits per channel.",
        stacklevel=3,
    )
    return image


def _name_of(source: object) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or f"PIL image {source.width}×{source.height}"
    return f"image of {len(source)} bytes" if isinstance(source, bytes) else f"image object {type(source).__name__}"
