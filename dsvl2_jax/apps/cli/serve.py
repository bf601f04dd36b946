"""`dsvl2 serve`: the model behind OpenAI's API, and a page to try it on.

Tested in tests/apps/cli/test_main.py and tests/apps/test_serve.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import UseAppendAction

from dsvl2_jax.apps.cli.options import Checkpoint, Computing, InComputing, Together, flattened, needs_serve_extra
from dsvl2_jax.runtime.processes import Processes

Names = UseAppendAction[tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Listening:
    """Where the server listens, and who may ask it."""

    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0 lets other machines in."""
    port: int = 8000
    """to listen at; 0 takes a free one."""
    api_key_file: Path | None = None
    """a file with one key a line, or a name and a key; without it, the keys in the variable DSVL2_API_KEY, if any."""
    cors_origin: Names = ()
    """pages of this origin may ask, as https://example.org; may be given several times."""
    ssl_certfile: Path | None = None
    """certificate for https, PEM."""
    ssl_keyfile: Path | None = None
    """its key, PEM; a password stands in the variable DSVL2_SSL_KEYFILE_PASSWORD."""
    ssl_ca_certs: Path | None = None
    """clients must show a certificate of one of these authorities."""
    shutdown_timeout: float = 25.0
    """seconds that running answers have after SIGTERM."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What may run, wait, and be sent."""

    slots: int = 8
    """answers that are written at the same time; the option plan says how many fit."""
    speculate: int = 0
    """draft this many tokens a step where text repeats its prompt or itself: the same answers, sooner; 0 for none."""
    prefix_bytes: str = "1GiB"
    """memory of the device for the beginnings of prompts, to be used again."""
    feature_bytes: str = "1GiB"
    """memory of the device for encoded pictures, to be used again."""
    max_queue: int = 256
    """answers that may wait for a slot."""
    max_queued_tokens: int = 1 << 20
    """tokens, of prompts and answers, that may wait."""
    max_tiles: int = 64
    """image tiles of a request."""
    max_image_tiles: int | None = None
    """local tiles that a request may ask for of one picture; without it, the checkpoint's most (9)."""
    max_wait: float = 120.0
    """seconds that an answer may wait for a slot."""
    hang_timeout: float = 300.0
    """seconds without an answer from the device after which the process ends."""
    max_body: str = "32MiB"
    """size of a request."""
    max_images: int = 16
    """pictures of a request."""
    max_image_bytes: str = "32MiB"
    """size of a picture's file."""
    max_image_pixels: int = 50_000_000
    """pixels of a picture."""
    max_request_pixels: int = 200_000_000
    """pixels of all pictures and frames of a request."""
    max_video_bytes: str = "64MiB"
    """size of a video's file."""
    max_video_seconds: float = 600.0
    """length of a video."""
    max_frames: int = 32
    """frames of all videos of a request."""
    video_timeout: float = 20.0
    """seconds that decoding a request's videos may take."""


@dataclasses.dataclass(frozen=True)
class Behaving:
    """What requests mean."""

    model_name: str = ""
    """name in /v1/models; without it, the checkpoint's."""
    model_alias: Names = ()
    """a pattern of other names for it; without any, OpenAI's own: gpt-*, chatgpt-*, o[0-9]*."""
    adapter: Annotated[Names, tyro.conf.arg(metavar="NAME=DIR")] = ()
    """also answer with this LoRA or DoRA adapter, when a request's model is NAME; may be given several times."""
    default_max_tokens: int = 512
    """the most tokens of an answer when a request names no number."""
    media_domain: Names = ()
    """fetch pictures and videos over https from this host, or from all below *.HOST; may be given several times."""
    media_path: Names = ()
    """read pictures and videos from this folder; may be given several times."""
    media_timeout: float = 10.0
    """seconds that fetching a file may take."""
    official_images: bool = False
    """read pictures as the official code does: no EXIF orientation, transparency dropped."""
    honour_detail: bool = False
    """a picture sent with "detail": "low" is seen in one tile, and one with "high" in as many as a request may ask for,
    even among many pictures; otherwise detail changes nothing."""
    strict_special_tokens: bool = False
    """treat special tokens written in messages as plain text."""


InListening = Annotated[Listening, tyro.conf.arg(name="")]
InLimits = Annotated[Limits, tyro.conf.arg(name="")]
InBehaving = Annotated[Behaving, tyro.conf.arg(name="")]


def serve(
    ckpt: Checkpoint = None,
    *,
    listening: InListening = Listening(),
    limits: InLimits = Limits(),
    behaving: InBehaving = Behaving(),
    computing: InComputing = Computing(),  # noqa: B008 (frozen)
    plan: bool = False,
    together: Together = Processes(),  # noqa: B008 (frozen)
) -> int:
    """Serve the model to OpenAI's clients, and a page to browsers; docs/serving.md tells more.

    Prints the address on standard output once requests are answered. SIGTERM and Ctrl-C finish what runs, then exit.

    Args:
        ckpt: converted directory, released-layout directory, training run or hub id; without it, the bundled model.
        plan: say how many slots fit this machine's devices, and exit; status 1 when those asked for do not.
    """
    together.join(flattened(locals()))
    with needs_serve_extra():
        from dsvl2_jax.apps import serve as app
        from dsvl2_jax.apps.plan.slots import print_slots
        from dsvl2_jax.convert.sizes import parse_bytes
        from dsvl2_jax.infer.serve.async_engine import EngineOptions
        from dsvl2_jax.infer.serve.auth import read_keys
        from dsvl2_jax.infer.serve.media import MediaOptions
        from dsvl2_jax.infer.serve.models import parse_adapters
        from dsvl2_jax.infer.serve.run import ListenOptions
        from dsvl2_jax.infer.serve.state import OPENAI_NAMES, ServeOptions

    adapters = parse_adapters(behaving.adapter)
    loading = dataclasses.replace(
        computing.load_options(), strict_special_tokens=behaving.strict_special_tokens, adapter=dict(adapters)
    )
    engine_options = EngineOptions(
        slots=limits.slots,
        speculate=limits.speculate,
        prefix_bytes=parse_bytes(limits.prefix_bytes),
        feature_bytes=parse_bytes(limits.feature_bytes),
        max_queue=limits.max_queue,
        max_queued_tokens=limits.max_queued_tokens,
        max_tiles=limits.max_tiles,
        max_image_tiles=limits.max_image_tiles,
        max_wait=limits.max_wait,
        hang_timeout=limits.hang_timeout,
    )
    if plan:
        stores = engine_options.prefix_bytes + engine_options.feature_bytes
        return print_slots(ckpt, loading, engine_options.slots, stores)
    listen = {field.name: getattr(listening, field.name) for field in dataclasses.fields(ListenOptions)}
    app.serve(
        ckpt,
        loading=loading,
        engine_options=engine_options,
        options=ServeOptions(
            model_name=behaving.model_name,
            aliases=behaving.model_alias or OPENAI_NAMES,
            adapters=adapters,
            keys=read_keys(listening.api_key_file),
            honour_detail=behaving.honour_detail,
            default_max_tokens=behaving.default_max_tokens,
            max_body=parse_bytes(limits.max_body),
            cors_origins=listening.cors_origin,
        ),
        media=MediaOptions(
            domains=behaving.media_domain,
            paths=behaving.media_path,
            max_bytes=parse_bytes(limits.max_image_bytes),
            max_pixels=limits.max_image_pixels,
            max_images=limits.max_images,
            max_request_pixels=limits.max_request_pixels,
            max_video_bytes=parse_bytes(limits.max_video_bytes),
            max_video_seconds=limits.max_video_seconds,
            max_frames=limits.max_frames,
            time_limit=behaving.media_timeout,
            video_time_limit=limits.video_timeout,
            official=behaving.official_images,
        ),
        listen=ListenOptions(**listen),
    )
    return 0
