"""Functions of records, for training's sources that are functions: imported by name, in worker processes too."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw

MADE: list[int] = []  # numbers of the pictures that this process has made
COLOURS = ("red", "green", "blue", "teal", "orange")


def picture(index: int, seed: int = 0) -> tuple[Image.Image, str, list[int]]:
    """A picture with one square, the square's colour and its box in pixels."""
    MADE.append(index)
    rng = np.random.default_rng([seed, index])
    colour, side = COLOURS[int(rng.integers(len(COLOURS)))], int(rng.integers(40, 90))
    left, top = (int(rng.integers(0, side - 20)) for _ in range(2))
    box = [left, top, left + 16, top + 16]
    image = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(image).rectangle(box, fill=colour)
    return image, colour, box


def file_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def record(index: int, *, seed: int = 0, form: str = "picture") -> dict:
    """A question about a picture, which is given in one of three forms; every fifth record is a text."""
    image, colour, _ = picture(index, seed)
    if index % 5 == 4:
        return {"text": f"Text {index}. " + "and so on " * (index % 7)}
    given = {"picture": image, "file": file_of(image), "array": np.asarray(image)}[form]
    return {"image": given, "query": "<image>\nWhich colour?", "response": f"{colour} " * (1 + index % 3)}


def regions(index: int, *, seed: int = 0) -> dict:
    """A picture with its square as a region, whose box is a tuple of numpy's numbers."""
    image, colour, box = picture(index, seed)
    return {"image": image, "regions": [{"box": tuple(np.array(box)), "colour": colour, "kind": "square"}]}


def objects(index: int) -> dict:
    image, colour, box = picture(index)
    turns = [("user", "<image>\nFind the square."), ("assistant", "<ref-object><bbox>")]
    return {
        "images": [image],
        "messages": [{"role": role, "content": text} for role, text in turns],
        "objects": {"ref": [f"{colour} square"], "bbox": [box]},
        "mood": "merry",
    }


def sometimes(index: int, every: int = 10) -> dict:
    """Fails at each number that `every` divides."""
    if index % every == 0:
        raise ValueError(f"no picture of {index}")
    return {"text": f"Text {index}."}


def odd(index: int, kind: str) -> object:
    """What no record is."""
    if kind == "exit":
        raise SystemExit(3)
    images = {
        "name": "a.png",
        "number": 3,
        "floats": np.zeros((4, 4)),
        "bytes": b"no picture",
        "link": "http://a/b.png",
    }
    if kind in images:
        return {"image": images[kind], "query": "<image>What?", "response": "That."}
    return {"none": None, "list": [1], "form": {"speech": "a"}, "turns": {"messages": 3}}[kind]


_CALLS = iter(range(10**9))


def unsteady(index: int) -> dict:
    """Another record each time."""
    return {"text": f"call {next(_CALLS)}"}


class Drawer:
    """An object that can be called."""

    def __call__(self, index: int, **more: object) -> dict:
        return {"text": f"{index} {sorted(more)}"}


drawer = Drawer()
no_function = 3
