"""From a conversation and its images to the arrays that the model reads (FACTS §3; DESIGN §3).

`ProcessorConfig` is processor_config.json, `Processor` applies the chat template, the tokenizer and the tiling,
and `ModelInputs` is one sample: token ids, labels, tiles, and for every position where its embedding comes from.
"""

import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dsvl2_jax import fields
from dsvl2_jax.errors import ConfigError, ConversationError, UsageError
from dsvl2_jax.fields import Problem, setting
from dsvl2_jax.inputs.images import ImageSource, load_image, pad_image, tile_image
from dsvl2_jax.inputs.tokenizer import ASSISTANT_TOKEN, IMAGE_TOKEN, USER_TOKEN, Tokenizer
from dsvl2_jax.model.config import NEWLINE_POSITION, SEPARATOR_POSITION, TEXT_POSITION, read_json_object

# With more images than this in a conversation, none is cut into local tiles.
MAX_TILED_IMAGES = 2

_ROLES = {
    USER_TOKEN: "user",
    "user": "user",
    ASSISTANT_TOKEN: "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclasses.dataclass(frozen=True)
class ProcessorConfig:
    """processor_config.json. Keys it lacks take the official class's defaults; the first three have none.

    Raises ConfigError, naming the file and the field, for values that cannot work. Change fields with
    `dataclasses.replace`, for example `candidate_resolutions` to those of `extended_candidate_resolutions`.
    """

    candidate_resolutions: tuple[tuple[int, int], ...] = setting(  # (width, height) of each canvas
        least=1,
        expected="a list of one or more [width, height] pairs of positive whole numbers",
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
        values = read_json_object(file)
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
    def pad_colour(self) -> tuple[int, ...]:
        return tuple(int(255 * mean) for mean in self.image_mean)

    def __post_init__(self) -> None:
        problems = fields.check(self)
        size = 0 if problems else self.tile_size
        if size and any(side % size for candidate in self.candidate_resolutions for side in candidate):
            expected = f"multiples of the tile size {size}, which is the first entry's width"
            found = fields.literal(self.candidate_resolutions)
            problems.append(Problem(("candidate_resolutions",), f"must be {expected}, not {found}."))
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
    image_sizes: np.ndarray  # i32[images, 2], (width, height) of the original
    prompt: str  # the text that was tokenised (turn by turn): without bos, an image as <image>


class _Piece(NamedTuple):
    """A stretch of the rendered conversation."""

    text: str
    is_token: bool = False  # exactly one special token, put there by the template
    marks_images: bool = False  # each <image> in it stands for the next image
    supervised: bool = False  # trained on even when the prompt is masked


class _Turn(NamedTuple):
    role: str
    text: str
    where: str  # "turn 2 (assistant)", for messages


@dataclasses.dataclass
class Processor:
    """Conversations and images to `ModelInputs`, as the official processor does it; see `__call__`.

    `global_view_pos` is config.json's. `strict_special_tokens` keeps the text of every turn from becoming special
    tokens (``<image>`` still marks images); `apply_exif_orientation` and `rescale_16bit` are `load_image`'s.
    """

    config: ProcessorConfig
    tokenizer: Tokenizer
    global_view_pos: str = "head"
    apply_exif_orientation: bool = False
    rescale_16bit: bool = False
    strict_special_tokens: bool = False

    @classmethod
    def from_dir(cls, path: str | Path, **options: bool) -> "Processor":
        """Read the processor of a checkpoint directory; `options` are the attributes above.

        Raises ConfigError or TokenizerError naming the file that is missing or wrong.
        """
        model_config = Path(path) / "config.json"
        position = read_json_object(model_config).get("global_view_pos", "head") if model_config.is_file() else "head"
        return cls(ProcessorConfig.from_dir(path), Tokenizer.from_dir(path), position, **options)

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
    ) -> ModelInputs:
        """Process a conversation, or a raw `prompt`, with its images.

        Args:
            conversation: turns ``{"role", "content", "images"?}``, user and assistant in turn after an optional
                system turn. Each ``<image>`` in a user turn stands for the next image.
            images: all images in order, instead of those in the turns; required with a `prompt` that has some.
            prompt: a string to tokenise as it is; with `apply_sft_format` it becomes a user turn, with
                `system_prompt` before it. (`system_prompt` is used nowhere else: give a system turn.)
            inference: leave the answer open: an assistant turn to be written, no final eos. False for training.
            mask_prompt: labels only for the assistant's text and eos (and bos); None takes the config's. A raw
                prompt masks image positions only.

        Raises ConversationError for a conversation that cannot be processed, ImageError for an image that cannot
        be read, UsageError for arguments that exclude each other.
        """
        if (conversation is None) == (prompt is None):
            found = "neither" if prompt is None else "both"
            raise UsageError(f"Give either a conversation or a prompt; found {found}.")
        if prompt is not None:
            pieces = _render_prompt(prompt, apply_sft_format, system_prompt)
            sources = _image_list(images, "images") or []
            _check_image_count(_tags(pieces), len(sources), "the prompt")
            mask_prompt = False
        else:
            if apply_sft_format:
                raise UsageError("apply_sft_format is for a prompt; a conversation always has the chat format.")
            turns = _check_turns(conversation, inference)
            pieces = _render_conversation(turns, self.tokenizer.eos_token)
            sources = _collect_images(conversation, turns, images)
            mask_prompt = self.config.mask_prompt if mask_prompt is None else mask_prompt
        if system_prompt and not apply_sft_format:
            warnings.warn(
                "system_prompt is tokenised only with prompt= and apply_sft_format=True, as in the official "
                'implementation; it is ignored here. Begin the conversation with a {"role": "system"} turn.',
                stacklevel=2,
            )
        if not inference and prompt is not None:
            pieces.append(_Piece(self.tokenizer.eos_token, is_token=True))
        elif inference and conversation is not None:
            pieces.pop()  # the eos of the answer that is yet to be written

        tiles, grid, sizes = self._tile(sources)
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
        )

    def global_view(self, source: ImageSource) -> np.ndarray:
        """u8[S, S, 3], the whole image in one tile: the first that `__call__` makes of it, without the others.

        Raises ImageError for an image that cannot be read.
        """
        config, side = self.config, self.config.tile_size
        image = load_image(source, self.apply_exif_orientation, rescale_16bit=self.rescale_16bit)
        return pad_image(image, (side, side), config.pad_colour)

    def _tile(self, sources: Sequence[ImageSource]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tiles u8[N,S,S,3], grid i32[images,2], sizes i32[images,2])."""
        config, side = self.config, self.config.tile_size
        tiles, grid, sizes = [np.zeros((0, side, side, 3), np.uint8)], [], []
        for source in sources:
            image = load_image(source, self.apply_exif_orientation, rescale_16bit=self.rescale_16bit)
            image_tiles, image_grid = tile_image(
                image, config.candidate_resolutions, side, config.pad_colour, crop=len(sources) <= MAX_TILED_IMAGES
            )
            tiles.append(image_tiles)
            grid.append(image_grid)
            sizes.append(image.size)
        pairs = (np.array(values, np.int32).reshape(-1, 2) for values in (grid, sizes))
        return np.concatenate(tiles), *pairs

    def _tokenise(
        self, pieces: Sequence[_Piece], grid: np.ndarray, mask_prompt: bool
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
                new = tokenizer.encode(text, special=piece.is_token or not self.strict_special_tokens)
                ids += new
                labels += new if piece.supervised or not mask_prompt else [ignore] * len(new)
                index += [TEXT_POSITION] * len(new)
        return np.array(ids, np.int32), np.array(labels, np.int32), np.array(index, np.int32)

    def _image_positions(self, grid: np.ndarray) -> Iterator[np.ndarray]:
        first_tile = 0
        for cols, rows in grid.tolist():
            yield image_positions(cols, rows, self.config.tokens_per_side, first_tile, self.global_view_pos)
            first_tile += 1 + cols * rows


def image_positions(cols: int, rows: int, side: int, first_tile: int, global_view_pos: str = "head") -> np.ndarray:
    """`ModelInputs.image_index` of one image, i32[side·(side+1) + 1 + side·rows·(side·cols+1)].

    Every row of the global view, and of the local view as one picture, ends in a newline; a separator stands
    between the views, the global one first if `global_view_pos` is "head" (FACTS §2).
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


def extended_candidate_resolutions(max_tiles: int, tile_size: int) -> tuple[tuple[int, int], ...]:
    """All (width, height) canvases of 1 to `max_tiles` tiles, in the released order: by area, then by width.

    9 tiles of 384 give the released 23; 18 are what InfoVQA was evaluated with:
    ``replace(config, candidate_resolutions=extended_candidate_resolutions(18, config.tile_size))``.
    """
    grids = [(cols, rows) for cols in range(1, max_tiles + 1) for rows in range(1, max_tiles // cols + 1)]
    grids.sort(key=lambda grid: (grid[0] * grid[1], grid[0]))
    return tuple((cols * tile_size, rows * tile_size) for cols, rows in grids)


def prepend_image_tags(prompt: str, n_images: int) -> str:
    """`prompt`, with one ``<image>`` line per image in front if it has no ``<image>`` of its own."""
    return prompt if IMAGE_TOKEN in prompt else f"{IMAGE_TOKEN}\n" * n_images + prompt


def _render_user(text: str) -> list[_Piece]:
    """A user turn and the opening of its answer."""
    return [
        _Piece(USER_TOKEN, is_token=True),
        _Piece(f": {text.strip()}\n\n", marks_images=True),
        _Piece(ASSISTANT_TOKEN, is_token=True),
        _Piece(":"),
    ]


def _render_conversation(turns: Sequence[_Turn], eos_token: str) -> list[_Piece]:
    pieces: list[_Piece] = []
    for turn in turns:
        if turn.role == "user":
            pieces += _render_user(turn.text)
        elif turn.role == "system":
            pieces.append(_Piece(turn.text.strip()))
        else:
            pieces.append(_Piece(turn.text.strip(), supervised=True))
            pieces.append(_Piece(eos_token, is_token=True, supervised=True))
    return pieces


def _render_prompt(prompt: str, apply_sft_format: bool, system_prompt: str) -> list[_Piece]:
    _check_text(prompt, "the prompt")
    if not apply_sft_format:
        return [_Piece(prompt, marks_images=True)]
    _check_text(system_prompt, "system_prompt")
    system = f"{system_prompt}\n\n".lstrip() if system_prompt else ""
    return [_Piece(system, marks_images=True), *_render_user(prompt)]


def _check_turns(conversation: Sequence[Mapping[str, Any]], inference: bool) -> list[_Turn]:
    """The turns with plain role names, an empty assistant turn added for inference if the last is the user's."""
    if not isinstance(conversation, Sequence) or isinstance(conversation, str | bytes) or not conversation:
        found = "an empty one" if isinstance(conversation, list | tuple) else type(conversation).__name__
        raise ConversationError(f'A conversation is a list of one or more {{"role", "content"}} turns; found {found}.')
    turns = [_check_turn(item, number) for number, item in enumerate(conversation, 1)]
    dialogue = turns[1:] if turns[0].role == "system" else turns
    for number, turn in enumerate(dialogue):
        expected = "assistant" if number % 2 else "user"
        if turn.role == "system":
            raise ConversationError(f"{turn.where}: a system turn can only be the first. Move it there.")
        if turn.role != expected:
            raise ConversationError(
                f"{turn.where}: expected a turn of the {expected} here. User and assistant alternate, the user "
                "first: join consecutive turns of one speaker, or add the missing one."
            )
    if not dialogue:
        raise ConversationError(f"{turns[0].where}: the conversation has nothing after it. Add a user turn.")
    last = turns[-1]
    if not inference:
        if last.role != "assistant" or not last.text.strip():
            raise ConversationError(
                f"{last.where} is the last: a training conversation ends in an assistant turn with text. Add the "
                "answer, or pass inference=True to have it written."
            )
    elif last.role == "user":
        turns.append(_Turn("assistant", "", "the answer"))
    elif last.text.strip():
        raise ConversationError(
            f"{last.where} is the last and has text: for inference a conversation ends in a user turn or an empty "
            "assistant turn. Remove the answer, or pass inference=False to train on it."
        )
    return turns


def _check_turn(item: Any, number: int) -> _Turn:
    if not isinstance(item, Mapping) or "role" not in item or "content" not in item:
        found = sorted(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
        raise ConversationError(f'turn {number}: expected an object with "role" and "content"; found {found}.')
    role = item["role"]
    if not isinstance(role, str) or role not in _ROLES:
        raise ConversationError(f"turn {number}: unknown role {role!r}. The roles are {', '.join(map(repr, _ROLES))}.")
    turn = _Turn(_ROLES[role], item["content"], f"turn {number} ({_ROLES[role]})")
    _check_text(turn.text, f"{turn.where}: content")
    if turn.role == "assistant" and IMAGE_TOKEN in turn.text:
        raise ConversationError(
            f"{turn.where}: has {turn.text.count(IMAGE_TOKEN)} {IMAGE_TOKEN}; images can only be in user turns. "
            "Move the tag and its image to the user turn before it."
        )
    return turn


def _check_text(text: Any, what: str) -> None:
    if not isinstance(text, str):
        raise ConversationError(f"{what} is of type {type(text).__name__}, expected a string.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(f"{what} is not valid Unicode at character {error.start}: {error.reason}.") from error


def _image_list(images: Any, what: str) -> list[ImageSource] | None:
    if images is None:
        return None
    if isinstance(images, str | bytes | Image.Image) or not isinstance(images, Sequence):
        raise ConversationError(f"{what} is of type {type(images).__name__}, expected a list of paths or PIL images.")
    return list(images)


def _collect_images(
    conversation: Sequence[Mapping[str, Any]], turns: Sequence[_Turn], images: Sequence[ImageSource] | None
) -> list[ImageSource]:
    """All images of the conversation in order, their number equal to that of the user turns' tags."""
    per_turn = [
        _image_list(item.get("images"), f"{turn.where}: images") or []
        for item, turn in zip(conversation, turns, strict=False)  # turns may have one more, the answer
    ]
    listed = _image_list(images, "images")
    if listed is not None and any(per_turn):
        raise UsageError('Images are given twice: in the turns\' "images" and as images=. Use one of the two.')
    sources = [image for turn_images in per_turn for image in turn_images] if listed is None else listed
    tags = [turn.text.count(IMAGE_TOKEN) if turn.role == "user" else 0 for turn in turns]
    shares = zip(turns, tags, per_turn, strict=False)
    uneven = [f"{turn.where} has {n} and {len(own)}" for turn, n, own in shares if listed is None and n != len(own)]
    _check_image_count(sum(tags), len(sources), "the conversation", "; ".join(uneven))
    return sources


def _tags(pieces: Sequence[_Piece]) -> int:
    return sum(piece.text.count(IMAGE_TOKEN) for piece in pieces if piece.marks_images)


def _check_image_count(n_tags: int, n_images: int, what: str, detail: str = "") -> None:
    if n_tags != n_images:
        raise ConversationError(
            f"{what} has {n_tags} {IMAGE_TOKEN} tag(s) but {n_images} image(s){detail and f' ({detail})'}. "
            f"Put one {IMAGE_TOKEN} in the user's text where each image belongs."
        )
