"""`dsvl2 generate` and `chat`: answers to the user's own prompts.

Tested in tests/apps/cli/test_main.py.
"""

from __future__ import annotations

from pathlib import Path

from tyro.conf import UseAppendAction

from dsvl2_jax.apps.cli.options import (
    Answering,
    Checkpoint,
    Images,
    InAnswering,
    InLoading,
    Loading,
    Together,
    flattened,
)
from dsvl2_jax.runtime.processes import Processes


def generate(
    ckpt: Checkpoint = None,
    *,
    prompt: str,
    image: Images = (),
    video: Images = (),
    answering: InAnswering = Answering(),  # noqa: B008 (frozen)
    stop: UseAppendAction[tuple[str, ...]] = (),
    chunk_size: int | None = None,
    json: bool = False,
    draw: Path | None = None,
    loading: InLoading = Loading(),  # noqa: B008 (frozen)
    together: Together = Processes(),  # noqa: B008 (frozen)
) -> None:
    """Answer one prompt about any number of images.

    Args:
        ckpt: converted directory, released-layout directory, training run or hub id; without it, the bundled model.
        prompt: the user's text. <image> marks where each image goes, <video> each video; without them they come first.
        image: image files, in order; may be given several times.
        video: video files, or folders of frames, in order; may be given several times. Needs the extra video.
        stop: end the answer before this string; may be given several times.
        chunk_size: prefill this many tokens at a time, to bound memory; 512 without it, and at most.
        json: print one JSON object instead of streaming text.
        draw: write the last image, or frame, with the answer's boxes drawn.
    """
    together.join(flattened(locals()))
    from dsvl2_jax.apps.generate import generate as run

    run(
        ckpt,
        prompt=prompt,
        images=[path for group in image for path in group],
        videos=[path for group in video for path in group],
        system=answering.system,
        max_new_tokens=answering.max_new_tokens,
        sampling=answering.sampling(stop),
        chunk_size=chunk_size,
        speculate=answering.speculate,
        as_json=json,
        draw=draw,
        options=loading.load_options(),
    )


def chat(
    ckpt: Checkpoint = None,
    *,
    answering: InAnswering = Answering(),  # noqa: B008 (frozen)
    loading: InLoading = Loading(),  # noqa: B008 (frozen)
) -> None:
    """Talk with the model in the terminal; /help lists what a line can do besides.

    Args:
        ckpt: converted directory, released-layout directory, training run or hub id; without it, the bundled model.
    """
    from dsvl2_jax.apps.chat import chat as run
    from dsvl2_jax.infer.loading import load

    model, sampling = load(ckpt, loading.load_options()), answering.sampling()
    run(model, answering.system, answering.max_new_tokens, sampling, speculate=answering.speculate)
