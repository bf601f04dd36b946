"""Pictures whose content is known: coloured shapes, printed numbers and words, bar charts. Drawn with Pillow.

`scene`, `writing` and `chart` draw at random from a generator; `Picture.draw` gives the pixels, and the picture's
fields say exactly what can be seen. `dsvl2_jax.apps.micro.synthetic` asks about them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dsvl2_jax.errors import UsageError

Colour = tuple[int, int, int]
Boundaries = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels

TILE = 126  # pixels; the sizes of pictures are chosen for tiles of this side
COLOURS: dict[str, Colour] = {
    "red": (214, 48, 49),
    "orange": (242, 140, 30),
    "yellow": (250, 216, 50),
    "green": (38, 150, 70),
    "blue": (40, 96, 214),
    "purple": (140, 66, 176),
    "white": (250, 250, 246),
    "black": (22, 22, 26),
}
LEAST_CONTRAST = 110.0  # Euclidean, in RGB: of what is drawn to every colour behind it


def _regular(points: int, inner: float, turn: float = -90.0) -> tuple[tuple[float, float], ...]:
    """The corners of a star (inner < 1) with a number of points, stretched to the unit square."""
    angles = np.radians(turn + 180.0 / points * np.arange(2 * points))
    radii = np.where(np.arange(2 * points) % 2, inner, 1.0)
    corners = np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)
    low, high = corners.min(0), corners.max(0)
    return tuple(map(tuple, ((corners - low) / (high - low)).tolist()))


_THIRD = 0.34
# Corners of a polygon that fills the unit square; none: the ellipse in it.
KINDS: dict[str, tuple[tuple[float, float], ...]] = {
    "circle": (),
    "square": ((0, 0), (1, 0), (1, 1), (0, 1)),
    "triangle": ((0.5, 0), (1, 1), (0, 1)),
    "star": _regular(5, 0.4),
    "diamond": ((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
    "cross": tuple(
        (x, y)
        for x, y in (
            (_THIRD, 0), (1 - _THIRD, 0), (1 - _THIRD, _THIRD), (1, _THIRD), (1, 1 - _THIRD), (1 - _THIRD, 1 - _THIRD),
            (1 - _THIRD, 1), (_THIRD, 1), (_THIRD, 1 - _THIRD), (0, 1 - _THIRD), (0, _THIRD), (_THIRD, _THIRD),
        )
    ),
}  # fmt: skip
PLACES = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)
_PLACE_MARGIN = 0.04  # of a side: no shape's middle is nearer to a border between two places
_WORDS = (
    "apple bird boat book box bread cake cat clock cloud coat cold corn cup dog door duck egg farm fire fish flag "
    "fork frog game gold green hand hat home horse ice jam key king kite lake lamp leaf lemon lion milk moon mouse "
    "music nest night north ocean open orange paper park pear pen piano pink queen rain river road rock rose salt "
    "sand ship shoe silk snow soap song south spoon star stone sugar sun table tea tiger train tree water west wind "
    "wolf wood wool yellow zebra"
)
WORDS = tuple(_WORDS.split())
# Of the fonts that matplotlib brings; all have letters and digits.
_FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif",
    "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmb10",
    "cmss10", "cmtt10",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    """A coloured shape that fills its box."""

    kind: str
    colour: str
    rgb: Colour
    box: Boundaries
    place: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclasses.dataclass(frozen=True)
class Writing:
    """A printed number or word; the box has the height of its ink and the font's width, a little more."""

    text: str
    colour: str
    rgb: Colour
    font: str
    height: int  # of the font, in pixels
    box: Boundaries

    def letter_boxes(self) -> list[Boundaries]:
        """The box of each letter or digit: as high as the whole, as wide as the font makes it."""
        ends = [_font(self.font, self.height).getlength(self.text[:i]) for i in range(len(self.text) + 1)]
        x1, y1, x2, y2 = self.box
        scale = (x2 - x1) / ends[-1]
        return [(round(x1 + scale * a), y1, round(x1 + scale * b), y2) for a, b in itertools.pairwise(ends)]


@dataclasses.dataclass(frozen=True)
class Bar:
    """A bar of a chart."""

    letter: str
    colour: str
    value: int
    box: Boundaries


@dataclasses.dataclass(frozen=True)
class Chart:
    """A bar chart: values from 0 to ``TOP`` over the plot area ``area``."""

    bars: tuple[Bar, ...]
    area: Boundaries
    printed: bool  # values are written over the bars


TOP = 10  # the highest value of a chart


@dataclasses.dataclass(frozen=True)
class Background:
    """Two colours and how they share the picture: plain, vertical, horizontal, radial, stripes, checks or noise."""

    style: str
    colours: tuple[Colour, Colour]
    scale: int  # pixels of a stripe, check or grain
    seed: int

    def draw(self, size: tuple[int, int]) -> Image.Image:
        width, height = size
        first, second = self.colours
        if self.style == "plain":
            return Image.new("RGB", size, first)
        if self.style in ("vertical", "horizontal"):
            shade = Image.linear_gradient("L")
            shade = shade.rotate(90) if self.style == "horizontal" else shade
        elif self.style == "radial":
            shade = Image.radial_gradient("L")
        else:
            columns, rows = -(-width // self.scale), -(-height // self.scale)
            if self.style == "noise":
                grain = np.random.default_rng(self.seed).integers(0, 256, (rows, columns))
            else:
                grain = np.indices((rows, columns))
                grain = 255 * ((grain.sum(0) if self.style == "checks" else grain[self.seed % 2]) % 2)
            shade = Image.fromarray(grain.astype(np.uint8))
            smooth = Image.Resampling.BILINEAR if self.style == "noise" else Image.Resampling.NEAREST
            shade = shade.resize((columns * self.scale, rows * self.scale), smooth).crop((0, 0, width, height))
        shade = shade.resize(size, Image.Resampling.BILINEAR) if shade.size != size else shade
        return Image.composite(Image.new("RGB", size, second), Image.new("RGB", size, first), shade)


@dataclasses.dataclass(frozen=True)
class Picture:
    """What is drawn, and therefore all that can be asked about."""

    size: tuple[int, int]  # width, height
    background: Background
    shapes: tuple[Shape, ...] = ()
    writing: Writing | None = None
    chart: Chart | None = None

    def draw(self) -> Image.Image:
        """The picture, in RGB."""
        image = self.background.draw(self.size)
        for shape in self.shapes:
            _draw_shape(image, shape)
        if self.writing is not None:
            ink = self.writing
            left, top, _, _ = _font(ink.font, ink.height).getbbox(ink.text)
            corner = (ink.box[0] - left, ink.box[1] - top)
            ImageDraw.Draw(image).text(corner, ink.text, fill=ink.rgb, font=_font(ink.font, ink.height))
        if self.chart is not None:
            _draw_chart(image, self.chart)
        return image


def _draw_shape(image: Image.Image, shape: Shape) -> None:
    fine = 3  # drawn this many times larger, for smooth edges
    x1, y1, x2, y2 = shape.box
    width, height = fine * (x2 - x1), fine * (y2 - y1)
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    if corners := KINDS[shape.kind]:
        draw.polygon([(x * (width - 1), y * (height - 1)) for x, y in corners], fill=255)
    else:
        draw.ellipse((0, 0, width - 1, height - 1), fill=255)
    image.paste(shape.rgb, (x1, y1), mask.reduce(fine))


def _draw_chart(image: Image.Image, chart: Chart) -> None:
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = chart.area
    unit = (bottom - top) / TOP
    text = _font("DejaVuSans", max(8, round((image.height - bottom) * 0.8)))
    small = _font("DejaVuSans", max(7, min(round(1.5 * unit), round(0.6 * left))))
    for value in range(0, TOP + 1, 2):
        y = round(bottom - value * unit)
        draw.line((left, y, right, y), fill=(150, 150, 150) if value else (30, 30, 30))
        draw.text((left - 3, y), str(value), fill=(30, 30, 30), font=small, anchor="rm")
    draw.line((left, top, left, bottom), fill=(30, 30, 30))
    for bar in chart.bars:
        x1, y1, x2, y2 = bar.box
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=COLOURS[bar.colour], outline=(60, 60, 60))
        draw.text(((x1 + x2) / 2, bottom + 1), bar.letter, fill=(20, 20, 20), font=text, anchor="mt")
        if chart.printed:
            draw.text(((x1 + x2) / 2, y1 - 1), str(bar.value), fill=(20, 20, 20), font=text, anchor="mb")


@functools.lru_cache(512)
def _font(name: str, height: int) -> ImageFont.FreeTypeFont:
    spec = importlib.util.find_spec("matplotlib")  # found without the second that importing it takes
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            "drawing pictures needs the fonts of matplotlib, which is not installed: pip install matplotlib"
        )
    folder = Path(spec.submodule_search_locations[0], "mpl-data", "fonts", "ttf")
    return ImageFont.truetype(folder / f"{name}.ttf", height)


def picture_size(rng: np.random.Generator, most_tiles: int = 9) -> tuple[int, int]:
    """(width, height) in pixels, such that every tiling of up to ``most_tiles`` tiles occurs, small ones most often."""
    count = int(rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 9], p=[0.6, 0.19, 0.06, 0.06, 0.01, 0.04, 0.01, 0.01, 0.02]))
    count = min(count, most_tiles)
    columns = int(rng.choice([c for c in range(1, count + 1) if count % c == 0]))
    low = 0.72 if count > 1 else 0.66
    width, height = (int(side * TILE * rng.uniform(low, 1.0)) for side in (columns, count // columns))
    return width, height


def background(rng: np.random.Generator, spread: float = 40.0) -> Background:
    """A background of two near colours (``spread``: standard deviation of their difference, per channel)."""
    style = str(rng.choice(["plain", "vertical", "horizontal", "radial", "stripes", "checks", "noise"]))
    base = rng.uniform(20, 235, 3)
    base = base.mean() + (base - base.mean()) * rng.uniform(0.2, 0.8)  # paler than what is drawn on it
    other = np.clip(base + rng.normal(0, spread, 3), 5, 250)
    first, second = (tuple(int(c) for c in colour) for colour in (base, other))
    return Background(style, (first, second), int(rng.integers(6, 26)), int(rng.integers(2**31)))


def _ink(rng: np.random.Generator, behind: Background) -> tuple[str, Colour]:
    """A colour that stands out from a background: its name, and the colour itself, which varies a little."""
    far = [name for name, rgb in COLOURS.items() if min(math.dist(rgb, c) for c in behind.colours) >= LEAST_CONTRAST]
    name = str(rng.choice(far or ["white" if np.mean(behind.colours) < 128 else "black"]))
    rgb = np.clip(np.array(COLOURS[name]) + rng.integers(-12, 13, 3), 0, 255)
    return name, tuple(int(c) for c in rgb)


def place_of(box: Boundaries, size: tuple[int, int]) -> str | None:
    """The ninth of the picture in which a box has its middle; None too near to a border between two."""
    thirds = []
    for low, high, side in zip(box[:2], box[2:], size, strict=True):
        middle = (low + high) / 2 / side
        if min(abs(middle - 1 / 3), abs(middle - 2 / 3)) < _PLACE_MARGIN:
            return None
        thirds.append(int(middle * 3))
    return PLACES[thirds[1]][thirds[0]]


# By number of shapes: the least and the largest side, as shares of the picture's shorter one.
_SIDES = ((0.3, 0.6), (0.26, 0.45), (0.24, 0.38), (0.22, 0.33), (0.2, 0.3))


def scene(
    rng: np.random.Generator,
    count: int,
    *,
    size: tuple[int, int] | None = None,
    kinds: Sequence[str] = tuple(KINDS),
) -> Picture:
    """A picture of ``count`` (1 to 5) shapes that do not touch; kinds and colours may repeat."""
    while True:
        canvas = size or picture_size(rng)
        behind = background(rng)
        shapes: list[Shape] = []
        low, high = (share * min(canvas) for share in _SIDES[count - 1])
        # Now and then all but one are alike, so that counting needs every shape looked at.
        alike = _ink(rng, behind) if rng.random() < 0.25 else None
        for _ in range(60 * count):
            side = int(rng.uniform(low, high))
            x, y = (int(rng.integers(0, room - side + 1)) for room in canvas)
            box = (x, y, x + side, y + side)
            place = place_of(box, canvas)
            if place is None or any(_near(box, other.box, 3) for other in shapes):
                continue
            colour, rgb = alike if alike and rng.random() < 0.6 else _ink(rng, behind)
            shapes.append(Shape(str(rng.choice(list(kinds))), colour, rgb, box, place))
            if len(shapes) == count:
                shapes.sort(key=lambda s: (s.box[0] + s.box[2], s.box[1]))  # from left to right
                return Picture(canvas, behind, tuple(shapes))


def _near(a: Boundaries, b: Boundaries, gap: int) -> bool:
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def writing(rng: np.random.Generator, text: str, *, size: tuple[int, int] | None = None) -> Picture:
    """A picture of a printed text, sometimes with a shape beside it."""
    while True:
        canvas, behind = size or picture_size(rng), background(rng, spread=25.0)
        font, height = str(rng.choice(_FONTS)), int(min(canvas) * rng.uniform(0.24, 0.6))
        left, top, right, bottom = _font(font, height).getbbox(text)
        width, tall = int(right - left), int(bottom - top)
        if width > 0.96 * canvas[0] or tall > 0.96 * canvas[1]:
            continue
        x, y = (int(rng.integers(0, room - side + 1)) for room, side in zip(canvas, (width, tall), strict=True))
        box = (x, y, x + width, y + tall)
        colour, rgb = _ink(rng, behind)
        shapes = ()
        if rng.random() < 0.3:
            beside = [s for s in scene(rng, 1, size=canvas).shapes if not _near(s.box, box, 3)]
            shapes = tuple(
                dataclasses.replace(s, colour=name, rgb=ink) for s in beside for name, ink in [_ink(rng, behind)]
            )
        return Picture(canvas, behind, shapes, Writing(text, colour, rgb, font, height, box))


def chart(rng: np.random.Generator, bars: int) -> Picture:
    """A bar chart of 2 to 5 bars in different colours with values from 1 to 10."""
    columns, rows = [(1, 1), (2, 1), (2, 2), (1, 2), (3, 2)][int(rng.choice(5, p=[0.62, 0.18, 0.08, 0.06, 0.06]))]
    width, height = (int(side * TILE * rng.uniform(0.82, 1.0)) for side in (columns, rows))
    pale = tuple(int(c) for c in rng.integers(225, 256, 3))
    behind = Background("plain", (pale, pale), 8, 0)
    left, right = int(width * 0.15) + 4, int(width * 0.97)
    top, bottom = int(height * 0.13), int(height * 0.86)
    colours = [name for name in COLOURS if math.dist(COLOURS[name], pale) >= LEAST_CONTRAST or name == "yellow"]
    names = rng.choice([c for c in colours if c != "white"], bars, replace=False)
    pitch = (right - left) / bars
    fill = rng.uniform(0.5, 0.8)
    drawn = []
    for i in range(bars):
        value = int(rng.integers(1, TOP + 1))
        x1 = round(left + pitch * (i + (1 - fill) / 2))
        box = (x1, round(bottom - (bottom - top) / TOP * value), round(x1 + pitch * fill), bottom)
        drawn.append(Bar("ABCDE"[i], str(names[i]), value, box))
    area = (left, top, right, bottom)
    return Picture((width, height), behind, chart=Chart(tuple(drawn), area, bool(rng.random() < 0.4)))
