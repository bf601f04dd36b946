"""`dsvl2 chat`: a conversation in the terminal.

Tested in tests/apps/cli/test_main.py.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from dsvl2_jax.apps.generate import user_turn
from dsvl2_jax.errors import DSVL2Error
from dsvl2_jax.infer.engine import Model
from dsvl2_jax.infer.loading import AS_SEEN
from dsvl2_jax.infer.sampling import SamplingParams
from dsvl2_jax.inputs.images import trait_notes

HELP = """\
/image FILE …   attach images to your next message (<image> in it marks where they go)
/video FILE …   attach videos, or folders of frames (<video> marks where they go)
/reset          forget the conversation
/help           this list
/quit           leave (so does the end of input)"""


def chat(
    model: Model,
    system: str,
    max_new_tokens: int,
    sampling: SamplingParams,
    lines: TextIO = sys.stdin,
    *,
    speculate: int = 0,
) -> None:
    """Reads messages from ``lines`` and streams answers to standard output until the end of input.

    A message that cannot be answered (a broken image, a conversation over the context) is reported and
    taken back; the conversation before it stays.
    """
    opening = [{"role": "system", "content": system}] if system else []
    turns, images, videos = list(opening), [], []
    noted: set[str] = set()  # what has been said about pictures
    interactive = lines.isatty()
    if interactive:
        print(HELP)
    while True:
        if interactive:
            print("\n> ", end="", flush=True)
        line = lines.readline()
        if not line or line.strip() == "/quit":
            return
        text = line.strip()
        if text == "/help":
            print(HELP)
        elif text == "/reset":
            turns, images, videos = list(opening), [], []
            print("(the conversation starts anew)")
        elif text.split(" ")[0] == "/image":
            images += _files(text, Path.is_file)
        elif text.split(" ")[0] == "/video":
            videos += _files(text, Path.exists)
        elif text.startswith("/"):
            print(f"{text.split(' ')[0]} is no command here; /help lists them.")
        elif text:
            message = user_turn(text, images, videos)
            try:
                inputs = model.processor([*turns, message])
                if not model.processor.as_seen:
                    for note in trait_notes((t for t in inputs.image_traits if t not in noted), AS_SEEN):
                        print(f"(warning: {note})")
                    noted |= set(inputs.image_traits)
                answer = model.generate(
                    inputs,
                    max_new_tokens,
                    sampling,
                    speculate=speculate,
                    on_text=lambda _, piece: print(piece, end="", flush=True),
                )
            except DSVL2Error as error:
                print(f"not sent: {error}")
                continue
            print()
            for box in answer.boxes:
                print(f"  {box.label or 'box'}: ({box.x1}, {box.y1}) – ({box.x2}, {box.y2})")
            if answer.malformed_boxes:
                print(f"  ({answer.malformed_boxes} malformed box(es) left out)")
            turns += [message, {"role": "assistant", "content": answer.text}]
            images, videos = [], []


def _files(command: str, is_there: Callable[[Path], bool]) -> list[Path]:
    """The files of an /image or a /video line that exist; the others are reported."""
    try:
        name, *names = shlex.split(command)
    except ValueError as error:
        print(f"{command.split(' ')[0]}: {error}")
        return []
    if not names:
        print(f"{name} needs one or more files.")
    found = [Path(name).expanduser() for name in names]
    for path in found:
        print(f"attached {path}" if is_there(path) else f"{path}: no such file")
    return [path for path in found if is_there(path)]
