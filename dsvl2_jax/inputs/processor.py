"""From a conversation and its images to the arrays that the model reads.

`ProcessorConfig` is processor_config.json, `Processor` applies the chat template, the tokenizer and the tiling,
and `ModelInputs` is one sample: token ids, labels, tiles, and for every position where its embedding comes from.
"""

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dsvl2_jax import fields
from dsvl2_jax.errors import ConfigError, UsageError
from dsvl2_jax.fields import Problem, setting
from dsvl2_jax.inputs.conversation import Piece, render_conversation, render_prompt
from dsvl2_jax.inputs.frame_choice import EVEN, FRAMES, check_frames
from dsvl2_jax.inputs.image_sources import open_reference
from dsvl2_jax.inputs.images import ImageSource, pad_image, read_image, select_best_resolution, tile_image, trait_notes
from dsvl2_jax.inputs.tile_budget import MAX_CANVAS_PIXELS, NO_BUDGET, TileBudget, budgeted_candidates, tiles_of
from dsvl2_jax.inputs.tokenizer import IMAGE_TOKEN, Tokenizer
from dsvl2_jax.inputs.videos import read_frames
from dsvl2_jax.inputs.visuals import Picture, open_visual
from dsvl2_jax.json_files import read_json_object
from dsvl2_jax.model.config import NEWLINE_POSITION, SEPARATOR_POSITION, TEXT_POSITION

# With more images than this in a conversation, none is cut into local tiles, unless a budget says so.
MAX_TILED_IMAGES = 2

_REMEMBERED_LENGTH = 24  # characters of a text whose tokens are remembered

MAX_CANVASES = 1000  # that a processor_config.json may ask for; 100 tiles have fewer than 500


@dataclasses.dataclass(frozen=True)
class ProcessorConfig:
    """processor_config.json. Keys it lacks take the official class's defaults; the first three have none.

    Raises ConfigError, naming the file and the field, for values that cannot work. Change fields with
    `dataclasses.replace`.
    """

    candidate_resolutions: tuple[tuple[int, int], ...] = setting(  # (width, height) of each canvas
        least=1,
        most=1 << 16,
        expected="a list of one or more [width, height] pairs of whole numbers from 1 to 65536",
        example="[[384, 384]]",
    )
    patch_size: int = setting(least=1)
    downsample_ratio: int = setting(least=1)
    image_mean: tuple[float, float, float] = setting((0.5,) * 3, least=0, most=1, expected="three numbers from 0 to 1")
    image_std: tuple[float, float, float] = setting((0.5,) * 3, above=0, expected="three numbers above 0")
    normalize: bool = setting(True, choices=(True,), expected="true, as in every released model")
    image_token: str = setting(IMAGE_TOKEN, choices=(IMAGE_TOKEN,))
    sft_format: str = setting(
        "deepseek", choices=("deepseek",), expected='"deepseek", the released models\' chat template'
    )
    mask_prompt: bool = True
    ignore_id: int = setting(-100, most=-1, expected="a negative whole number")
    source: str = dataclasses.field(default="processor_config.json", compare=False)

    @classmethod
    def from_dir(cls, path: str | Path) -> "ProcessorConfig":
        """Read processor_config.json in a checkpoint directory. Raises ConfigError naming the file and field."""
        file = Path(path) / "processor_config.json"
        values = read_json_object(file, ConfigError)
        defaults = {field.name: field.default for field in dataclasses.fields(cls) if field.name != "source"}
        missing = [name for name, value in defaults.items() if value is dataclasses.MISSING and name not in values]
        if missing:
            raise ConfigError(f"{file}: {', '.join(missing)} missing. Copy the file from the released checkpoint.")
        return cls(**{name: values[name] for name in defaults if name in values}, source=str(file))

    @property
    def tile_size(self) -> int:
        """S, the side of a tile in pixels."""
        return self.candidate_resolutions[0][0]

    @property
    def tokens_per_side(self) -> int:
        """h, the side of a tile's token grid after the adaptor's downsampling: 14 for the released models."""
        return math.ceil((self.tile_size // self.patch_size) / self.downsample_ratio)

    @property
    def largest(self) -> int:
        """The most tiles of a candidate."""
        return max(tiles_of(canvas, self.tile_size) for canvas in self.candidate_resolutions)

    def candidates(self, budget: TileBudget = NO_BUDGET) -> tuple[tuple[int, int], ...]:
        """The (width, height) canvases that a budget leaves of the candidates, and adds: see `budgeted_candidates`."""
        return budgeted_candidates(self.candidate_resolutions, self.tile_size, budget)

    @property
    def pad_colour(self) -> tuple[int, ...]:
        return tuple(int(255 * mean) for mean in self.image_mean)

    def __post_init__(self) -> None:
        if isinstance(self.candidate_resolutions, list | tuple) and len(self.candidate_resolutions) > MAX_CANVASES:
            found = f"{len(self.candidate_resolutions):,} pairs, expected at most {MAX_CANVASES:,}"
            raise ConfigError(f"{self.source} does not describe a processor: candidate_resolutions has {found}.")
        problems = fields.check(self)
        size = 0 if problems else self.tile_size
        if size and any(side % size for candidate in self.candidate_resolutions for side in candidate):
            expected = f"multiples of the tile size {size}, which is the first entry's width"
            found = fields.literal(self.candidate_resolutions)
            problems.append(Problem(("candidate_resolutions",), f"must be {expected}, not {found}."))
        pixels = max((width * height for width, height in self.candidate_resolutions), default=0) if size else 0
        if pixels > MAX_CANVAS_PIXELS:
            text = f"must have at most {MAX_CANVAS_PIXELS:,} pixels in each, not {pixels:,}."
            problems.append(Problem(("candidate_resolutions",), text))
        if size and self.patch_size > size:
            problems.append(Problem(("patch_size",), f"must be at most the tile size {size}, not {self.patch_size}."))
        fields.refuse(problems, ConfigError, f"{self.source} does not describe a processor:")


@dataclasses.dataclass(frozen=True, eq=False)
class ModelInputs:
    """One sample. T positions, N tiles of S×S pixels, h×h adaptor tokens a tile.

    `image_index` tells the merge where each position's embedding comes from: -1 the text embedding of its id,
    f ≥ 0 row f of the adaptor's output for these tiles flattened to [N·h·h, D], -2 image_newline,
    -3 view_seperator. Tiles are, image by image, the global view and then the local tiles row by row.
    """

    input_ids: np.ndarray  # i32[T]
    labels: np.ndarray  # i32[T], ignore_id where there is no loss; not shifted
    image_mask: np.ndarray  # bool[T]
    image_index: np.ndarray  # i32[T]
    tiles: np.ndarray  # u8[N, S, S, 3]
    tile_grid: np.ndarray  # i32[images, 2], (cols, rows) of local tiles
    image_sizes: np.ndarray  # i32[images, 2], (width, height) of the original, in whose pixels boxes are
    prompt: str  # the text that was tokenised (turn by turn): without bos, an image as <image>
    image_traits: tuple[str, ...] = ()  # of all images together: see `read_image`


@dataclasses.dataclass
class Processor:
    """Conversations and images to `ModelInputs`, as the official processor does it; see `__call__`.

    `global_view_pos` is config.json's. `strict_special_tokens` keeps the text of every turn from becoming special
    tokens (``<image>`` still marks images). `as_seen` is `read_image`'s. Without it `warns` says whether there is a
    warning about pictures that a viewer shows differently; callers that count `ModelInputs.image_traits` need none.
    """

    config: ProcessorConfig
    tokenizer: Tokenizer
    global_view_pos: str = "head"
    as_seen: bool = False
    strict_special_tokens: bool = False
    warns: bool = True
    budget: TileBudget = NO_BUDGET
    frames: int = FRAMES
    frame_choice: str = EVEN

    @classmethod
    def from_dir(cls, path: str | Path, **options: Any) -> "Processor":
        """Read the processor of a checkpoint directory; `options` are the attributes above.

        Raises ConfigError or TokenizerError naming the file that is missing or wrong.
        """
        model_config = Path(path) / "config.json"
        position = "head"
        if model_config.is_file():
            position = read_json_object(model_config, ConfigError).get("global_view_pos", position)
        return cls(ProcessorConfig.from_dir(path), Tokenizer.from_dir(path), position, **options)

    def set_visuals(
        self,
        max_tiles: int | None = None,
        min_tiles: int | None = None,
        frames: int | None = None,
        frame_choice: str | None = None,
    ) -> None:
        """Sets `budget`, `frames` and `frame_choice`; None: as they are without a choice.

        Raises UsageError for values that cannot be, or a budget that leaves no canvas.
        """
        budget = TileBudget(max_tiles, min_tiles).checked()
        self.config.candidates(budget)
        frames, choice = FRAMES if frames is None else frames, EVEN if frame_choice is None else frame_choice
        check_frames(frames, choice)
        self.budget, self.frames, self.frame_choice = budget, frames, choice

    def __call__(
        self,
        conversation: Sequence[Mapping[str, Any]] | None = None,
        images: Sequence[ImageSource] | None = None,
        *,
        prompt: str | None = None,
        apply_sft_format: bool = False,
        system_prompt: str = "",
        inference: bool = True,
        mask_prompt: bool | None = None,
        max_tiles: int | None = None,
        min_tiles: int | None = None,
    ) -> ModelInputs:
        """Process a conversation, or a raw `prompt`, with its images and videos.

        Args:
            conversation: turns ``{"role", "content", "images"?}``, user and assistant in turn after an optional
                system turn, in any form of `read_turn`: content is a string, in which each ``<image>`` of a user
                stands for the next image, or a list of parts. An image is a path, a file's bytes, a ``data:`` URL, a
                PIL image or an array u8[H, W, 3] (also [H, W] and [H, W, 4]). A video is ``{"video": source}``: its
                frames are so many images, with a line end between two; see `read_visual` and `read_frames`.
            images: all images in order, instead of those in the turns; required with a `prompt` that has some.
            prompt: a string to tokenise as it is; with `apply_sft_format` it becomes a user turn, with
                `system_prompt` before it. (`system_prompt` is used nowhere else: give a system turn.)
            inference: leave the answer open: an assistant turn to be written, no final eos. False for training.
            mask_prompt: labels only for the assistant's text and eos (and bos); None takes the config's. A raw
                prompt masks image positions only. Either way a turn with ``"loss": false`` has none.
            max_tiles, min_tiles: of local tiles, for the images that have no budget of their own: see `candidates`.

        Raises ConversationError for a conversation that cannot be processed, ImageError for an image that cannot
        be read, UsageError for arguments that exclude each other.
        """
        budget = TileBudget(max_tiles, min_tiles).checked().over(self.budget)
        if (conversation is None) == (prompt is None):
            found = "neither" if prompt is None else "both"
            raise UsageError(f"Give either a conversation or a prompt; found {found}.")
        eos_token = self.tokenizer.eos_token
        if conversation is None:
            pieces, sources = render_prompt(prompt, images, eos_token, inference, apply_sft_format, system_prompt)
            mask_prompt = False
        elif apply_sft_format:
            raise UsageError("apply_sft_format is for a prompt; a conversation always has the chat format.")
        else:
            pieces, sources = render_conversation(conversation, images, eos_token, inference)
            mask_prompt = self.config.mask_prompt if mask_prompt is None else mask_prompt
        if system_prompt and not apply_sft_format:
            warnings.warn(
                "system_prompt is tokenised only with prompt= and apply_sft_format=True, as in the official "
                'implementation; it is ignored here. Begin the conversation with a {"role": "system"} turn.',
                stacklevel=2,
            )

        pictures = [self.pictures(source) for source in sources]
        pieces = _with_frames(pieces, list(map(len, pictures)))
        tiles, grid, sizes, traits = self._tile(list(itertools.chain(*pictures)), budget)
        if self.warns and not self.as_seen:
            for note in trait_notes(traits, "as_seen=True"):
                warnings.warn(note, stacklevel=2)
        ids, labels, index = self._tokenise(pieces, grid, mask_prompt)
        return ModelInputs(
            input_ids=ids,
            labels=labels,
            image_mask=index != TEXT_POSITION,
            image_index=index,
            tiles=tiles,
            tile_grid=grid,
            image_sizes=sizes,
            prompt="".join(piece.text for piece in pieces),
            image_traits=traits,
        )

    def read_image(self, source: ImageSource) -> tuple[Image.Image, tuple[str, ...]]:
        """`dsvl2_jax.inputs.images.read_image`, as the processor reads images."""
        return read_image(open_reference(source), self.as_seen)

    def pictures(self, source: Any) -> list[Picture]:
        """What stands for one ``<image>``: an image, which is not read yet, or the frames of a video.

        Raises ImageError for a video that cannot be read, UsageError for options that cannot be.
        """
        visual = open_visual(source)
        if isinstance(visual, Picture):
            return [visual]
        count, choice = visual.frames or self.frames, visual.frame_choice or self.frame_choice
        frames = read_frames(visual.source, count, choice, as_seen=self.as_seen)
        return [Picture(frame, visual.budget) for frame in frames]

    def candidates(self, images: int, own: TileBudget = NO_BUDGET, budget: TileBudget = NO_BUDGET) -> Any:
        """The canvases that one of a conversation's images may have, as (width, height) pairs.

        A budget of its own always holds. Without one the conversation's does; but among more than `MAX_TILED_IMAGES`
        an image is one tile then, as in the official code, unless ``min_tiles`` is more.

        Args:
          images: how many the conversation has, a video's frames included.
          own, budget: the image's, and the conversation's.
        """
        if own == NO_BUDGET and images > MAX_TILED_IMAGES and (budget.min_tiles or 1) == 1:
            return ((self.config.tile_size,) * 2,)
        return self.config.candidates(own.over(budget))

    def grid(
        self, size: tuple[int, int], images: int, own: TileBudget = NO_BUDGET, budget: TileBudget = NO_BUDGET
    ) -> tuple[int, int]:
        """(cols, rows) of the local tiles that an image of (width, height) is cut into; arguments as `candidates`'s."""
        width, height = select_best_resolution(size, self.candidates(images, own, budget))
        return width // self.config.tile_size, height // self.config.tile_size

    def global_view(self, image: Image.Image) -> np.ndarray:
        """u8[S, S, 3], the whole of an RGB image in one tile: the first that `__call__` makes of it."""
        side = self.config.tile_size
        return pad_image(image, (side, side), self.config.pad_colour)

    def _tile(
        self, pictures: Sequence[Picture], budget: TileBudget
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
        """(tiles u8[N,S,S,3], grid i32[images,2], sizes i32[images,2], traits)."""
        side, colour = self.config.tile_size, self.config.pad_colour
        tiles, grid, sizes, traits = [np.zeros((0, side, side, 3), np.uint8)], [], [], ()
        for picture in pictures:
            image, image_traits = read_image(picture.source, self.as_seen)
            traits += image_traits
            candidates = self.candidates(len(pictures), picture.budget, budget)
            image_tiles, image_grid = tile_image(image, candidates, side, colour)
            tiles.append(image_tiles)
            grid.append(image_grid)
            sizes.append(image.size)
        pairs = (np.array(values, np.int32).reshape(-1, 2) for values in (grid, sizes))
        return np.concatenate(tiles), *pairs, traits

    def _tokenise(
        self, pieces: Sequence[Piece], grid: np.ndarray, mask_prompt: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, labels, image_index), each i32[T], bos first."""
        tokenizer, ignore = self.tokenizer, self.config.ignore_id
        ids, labels, index = [tokenizer.bos_id], [tokenizer.bos_id], [TEXT_POSITION]
        images = self._image_positions(grid)
        for piece in pieces:
            # Text is encoded piecewise, so that no merge crosses an image.
            for number, text in enumerate(piece.text.split(IMAGE_TOKEN) if piece.marks_images else [piece.text]):
                if number > 0:
                    positions = next(images)
                    ids += [tokenizer.image_id] * len(positions)
                    labels += [ignore] * len(positions)
                    index += positions.tolist()
                new = _encoded(tokenizer, text, piece.is_token or not self.strict_special_tokens)
                ids += new
                learnt = not piece.masked and (piece.supervised or not mask_prompt)
                labels += new if learnt else [ignore] * len(new)
                index += [TEXT_POSITION] * len(new)
        return np.array(ids, np.int32), np.array(labels, np.int32), np.array(index, np.int32)

    def _image_positions(self, grid: np.ndarray) -> Iterator[np.ndarray]:
        first_tile = 0
        for cols, rows in grid.tolist():
            yield image_positions(cols, rows, self.config.tokens_per_side, first_tile, self.global_view_pos)
            first_tile += 1 + cols * rows


def _encoded(tokenizer: Tokenizer, text: str, special: bool) -> Sequence[int]:
    """`Tokenizer.encode`, which is remembered of short texts: the template's, which every turn has, above all."""
    if len(text) > _REMEMBERED_LENGTH:
        return tokenizer.encode(text, special)
    return _encoded_short(tokenizer, text, special)


@functools.lru_cache(1 << 12)
def _encoded_short(tokenizer: Tokenizer, text: str, special: bool) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, special))


def _with_frames(pieces: Sequence[Piece], counts: Sequence[int]) -> list[Piece]:
    """The pieces, of each ``<image>`` as many, in lines, as it stands for pictures: the frames of a video."""
    if all(count == 1 for count in counts):
        return list(pieces)
    left, expanded = iter(counts), []
    for piece in pieces:
        if piece.marks_images:
            first, *rest = piece.text.split(IMAGE_TOKEN)
            tags = ("\n".join([IMAGE_TOKEN] * next(left)) + text for text in rest)
            piece = piece._replace(text=first + "".join(tags))
        expanded.append(piece)
    return expanded


def image_tokens(cols: int | np.ndarray, rows: int | np.ndarray, side: int) -> int | np.ndarray:
    """How many tokens an image of ``cols`` × ``rows`` local tiles takes; numbers, or arrays of them.

    Both views have ``side`` tokens along a side of a tile and a newline after every row, and a separator lies between
    the views: see `image_positions`.
    """
    global_view, local_view = side * (side + 1), side * rows * (side * cols + 1)
    return global_view + 1 + local_view


def image_positions(cols: int, rows: int, side: int, first_tile: int, global_view_pos: str = "head") -> np.ndarray:
    """`ModelInputs.image_index` of one image, i32[`image_tokens`].

    Every row of the global view, and of the local view as one picture, ends in a newline; a separator stands
    between the views, the global one first if `global_view_pos` is "head".
    """
    start = first_tile * side * side
    global_view = start + np.arange(side * side).reshape(side, side)
    local = start + side * side + np.arange(rows * cols * side * side).reshape(rows, cols, side, side)
    local_view = local.swapaxes(1, 2).reshape(rows * side, cols * side)
    views = [
        np.pad(view, ((0, 0), (0, 1)), constant_values=NEWLINE_POSITION).ravel() for view in (global_view, local_view)
    ]
    before, after = views if global_view_pos == "head" else reversed(views)
    return np.concatenate([before, [SEPARATOR_POSITION], after]).astype(np.int32)


def rebased(image_index: np.ndarray, rows: int | np.ndarray) -> np.ndarray:
    """``image_index`` with ``rows`` added where it names a row of the adaptor's output; its codes stay as they are.

    Args:
      image_index: i32[...].
      rows: one whole number for all, or one for each entry.
    """
    return np.where(image_index >= 0, image_index + rows, image_index).astype(np.int32)
