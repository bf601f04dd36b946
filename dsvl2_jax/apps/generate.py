"""What `dsvl2 generate` does, and the loading that it shares with the other commands.

Tested in tests/apps/cli/test_main.py.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dsvl2_jax.checkpoint.staging import replacing
from dsvl2_jax.errors import DSVL2Error, UsageError
from dsvl2_jax.infer.answer import Generation
from dsvl2_jax.infer.loading import AS_SEEN, LoadOptions, load
from dsvl2_jax.infer.sampling import SamplingParams
from dsvl2_jax.inputs.conversation import prepend_image_tags
from dsvl2_jax.inputs.grounding import draw_boxes
from dsvl2_jax.inputs.images import trait_notes
from dsvl2_jax.inputs.turns import VIDEO_TAG, read_turn
from dsvl2_jax.runtime import processes
from dsvl2_jax.runtime.timing import Timing


def generate(
    ckpt: str | None,
    *,
    prompt: str,
    images: list[Path],
    videos: list[Path],
    system: str,
    max_new_tokens: int,
    sampling: SamplingParams,
    chunk_size: int | None,
    speculate: int,
    as_json: bool,
    draw: Path | None,
    options: LoadOptions,
) -> None:
    """Answers one prompt on standard output: streamed text, or the JSON object of `report`."""
    if draw is not None and not images and not videos:
        raise UsageError("--draw needs an --image or a --video to draw on.")
    if not videos and (options.frames, options.frame_choice) != (None, None):
        raise UsageError("--frames and --frame-choice are of a video: give one with --video.")
    if draw is not None and processes.is_first() and not draw.parent.is_dir():
        raise UsageError(f"--draw {draw}: the directory {draw.parent} does not exist; make it first.")
    if draw is not None and draw.suffix.lower() not in Image.registered_extensions():
        raise UsageError(f"--draw {draw}: ends in no kind of picture that can be written; name a .png or .jpg file.")
    timing = Timing()
    with timing.phase("load"):
        model = load(ckpt, options)
    asked = user_turn(prompt, images, videos)
    conversation = [asked]
    if system:
        conversation.insert(0, {"role": "system", "content": system})
    inputs = processes.from_first(lambda: model.processor(conversation))
    if processes.is_first() and not options.as_seen:
        for note in trait_notes(inputs.image_traits, AS_SEEN):
            print(f"dsvl2: warning: {note}", file=sys.stderr)

    def show(_: int, text: str) -> None:
        if processes.is_first():
            print(text, end="", flush=True)

    answer = model.generate(
        inputs,
        max_new_tokens,
        sampling,
        chunk_size=chunk_size,
        speculate=speculate,
        on_text=None if as_json else show,
        timing=timing,
    )
    if not processes.is_first():
        return
    print(json.dumps(report(answer, timing), ensure_ascii=False) if as_json else "")
    if draw is not None:
        last = model.processor.pictures(read_turn(asked, "the prompt").images[-1])[-1]
        image, _ = model.processor.read_image(last.source)
        try:
            with replacing(draw) as new:
                draw_boxes(image, answer.boxes).save(new, Image.registered_extensions()[draw.suffix.lower()])
        except (OSError, ValueError) as error:
            raise DSVL2Error(f"--draw {draw}: cannot be written ({error}).") from None
        left_out = f", {answer.malformed_boxes} malformed left out" if answer.malformed_boxes else ""
        print(f"{len(answer.boxes)} box(es) drawn into {draw}{left_out}", file=sys.stderr)


def user_turn(prompt: str, images: Sequence[Path], videos: Sequence[Path]) -> dict[str, Any]:
    """What the user says about images and videos, which come first where the text has no tags for them."""
    if not (videos and VIDEO_TAG in prompt):
        prompt = prepend_image_tags(prompt, len(images) + len(videos))
    return {"role": "user", "content": prompt, "images": images, "videos": videos}


def report(answer: Generation, timing: Timing) -> dict:
    """The object that ``--json`` prints."""
    seconds = {name: round(timing.get(name, 0.0), 4) for name in ("load", "compile", "encode", "prefill", "decode")}
    decoded, spent = len(answer.token_ids) - 1, timing.get("decode", 0.0)
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "image_tokens": answer.image_tokens,
        "tiles": answer.tiles,
        "boxes": [dataclasses.asdict(box) for box in answer.boxes],
        "malformed_boxes": answer.malformed_boxes,
        "drafted_tokens": answer.drafted_tokens,
        "accepted_tokens": answer.accepted_tokens,
        "timing": seconds | {"decode_tokens_per_second": round(decoded / spent, 2) if spent else None},
    }
