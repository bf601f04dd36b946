"""Types and groups of options that several commands of `dsvl2` share.

Tested in tests/apps/cli/test_main.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

import tyro
from tyro.conf import Positional, UseAppendAction

from dsvl2_jax.errors import UsageError
from dsvl2_jax.runtime.processes import Processes
from dsvl2_jax.runtime.terminal import with_escaped_output

if TYPE_CHECKING:  # these import jax, for which help need not wait
    from dsvl2_jax.infer.loading import LoadOptions
    from dsvl2_jax.infer.sampling import SamplingParams

Checkpoint = Positional[str | None]
Dtype = Literal["float32", "bfloat16"]
CacheDtype = Literal["float32", "bfloat16", "int8"]
Size = Literal["tiny", "small", "base"]
FrameChoice = Literal["even", "scene"]
Images = Annotated[tuple[tuple[Path, ...], ...], UseAppendAction]
Settings = Annotated[tuple[str, ...], UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")]
Arguments = Annotated[tuple[str, ...], UseAppendAction, tyro.conf.arg(metavar="NAME=VALUE")]
QuantizeTo = Annotated[str, tyro.conf.arg(metavar="int8|int4|float8")]
QuantizeRules = Annotated[tuple[str, ...], UseAppendAction, tyro.conf.arg(metavar="REGEX=KIND")]
Together = Annotated[Processes, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True)
class Computing:
    """Options of every command that runs a model."""

    dtype: Dtype = "float32"
    """in which the model computes."""
    cache_dtype: CacheDtype | None = None
    """in which the cache keeps earlier tokens; int8 takes half of bfloat16's memory."""
    mesh: str | None = None
    """shard over devices, e.g. data=2,tensor=2,expert=2."""
    verify: bool = False
    """read every file of the checkpoint first and compare it with its digest."""
    context: int | None = None
    """the most positions of a prompt and its answer together; as many as the model was made for without it."""
    rope_scaling: str | None = None
    """scale positions so, instead of as config.json says: '{"type": "yarn", "factor": 4}'."""

    def load_options(self) -> LoadOptions:
        """What `dsvl2_jax.infer.loading.load` takes."""
        from dsvl2_jax.infer.loading import LoadOptions

        return LoadOptions(**dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Loading(Computing):
    """Options of the commands that load a model for the user's own prompts and images."""

    adapter: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """a LoRA or DoRA adapter for the checkpoint: a directory that training or peft wrote, or a hub id."""
    as_seen: bool = False
    """read images as people see them, which the official code does not: turned as EXIF says, transparency over white,
    16-bit gray divided."""
    strict_special_tokens: bool = False
    """treat special tokens written in the prompt as plain text."""
    max_tiles: int | None = None
    """cut an image into at most this many tiles (InfoVQA: 18) instead of as the checkpoint says (9)."""
    min_tiles: int | None = None
    """cut an image into at least this many tiles, however many images there are."""
    frames: int | None = None
    """show at most this many frames of a video; 8 without it."""
    frame_choice: FrameChoice | None = None
    """even: frames at equal distances, as without it; scene: one of each part between the greatest changes."""


@dataclasses.dataclass(frozen=True)
class Answering:
    """Options of the commands that answer the user's own prompts."""

    system: str = ""
    """a system message."""
    max_new_tokens: int = 512
    """the most tokens of an answer."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """sample from the most likely tokens that together reach this probability."""
    top_k: int = 50
    """sample from the k most likely tokens; 0 for all."""
    repetition_penalty: float = 1.0
    """above 1 makes repeating less likely."""
    seed: int = 0
    """of sampling."""
    speculate: int = 0
    """draft this many tokens a step where text repeats its prompt or itself: the same answer, sooner; 0 for none."""

    def sampling(self, stop: tuple[str, ...] = ()) -> SamplingParams:
        """How tokens are chosen; raises UsageError for a number out of its range."""
        from dsvl2_jax.infer.sampling import SamplingParams

        return SamplingParams(self.temperature, self.top_p, self.top_k, self.repetition_penalty, self.seed, stop)


# A parameter of this type puts a group's options among the command's own.
InComputing = Annotated[Computing, tyro.conf.arg(name="")]
InLoading = Annotated[Loading, tyro.conf.arg(name="")]
InAnswering = Annotated[Answering, tyro.conf.arg(name="")]


def flattened(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A command's arguments by name, groups of options taken apart, for `Processes.join` to compare."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        grouped = dataclasses.is_dataclass(value) and not isinstance(value, Processes)
        flat |= dataclasses.asdict(value) if grouped else {name: value}
    return flat


def command_group(description: str, commands: Mapping[str, Callable[..., int | None]]) -> Callable[..., int | None]:
    """A command whose first word names one of several others, as ``check`` in `dsvl2 data check`."""
    named = tuple(
        Annotated[Any, tyro.conf.subcommand(name=name, constructor=with_escaped_output(run))]
        for name, run in commands.items()
    )

    def chosen(status: int | None) -> int | None:
        return status  # parsing runs the command that was named

    chosen.__doc__ = description
    chosen.__annotations__["status"] = Annotated[Union[named], tyro.conf.arg(name="")]  # noqa: UP007
    return chosen


def needs_train_extra() -> contextlib.AbstractContextManager[None]:
    """Names the extra to install when a module that training needs is missing."""
    return _needs_extra("training", "train", ("grain", "matplotlib", "optax", "tensorboardX"))


def needs_serve_extra() -> contextlib.AbstractContextManager[None]:
    """Names the extra to install when a module that serving needs is missing."""
    modules = "fastapi", "httpcore2", "httpx2", "idna", "llguidance", "prometheus_client", "uvicorn"
    return _needs_extra("serving", "serve", modules)


@contextlib.contextmanager
def _needs_extra(what: str, extra: str, modules: tuple[str, ...]) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in modules:
            raise
        raise UsageError(f"{what} needs {error.name}, which is not installed: pip install -e '.[{extra}]'") from error
