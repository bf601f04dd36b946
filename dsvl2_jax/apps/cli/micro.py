"""`dsvl2 demo` and `dsvl2 micro`: the bundled model on fresh pictures, and what makes it.

Tested in tests/apps/micro.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from dsvl2_jax.apps.cli.options import Checkpoint, Computing, InComputing, command_group

Names = Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME ...]")]]


def demo(
    ckpt: Checkpoint = None,
    *,
    seed: int = 0,
    out: Path = Path("out"),
    computing: InComputing = Computing(),  # noqa: B008 (frozen)
) -> None:
    """Draw fresh pictures, ask about them, and show the answers beside the truth.

    Args:
        ckpt: converted directory, released-layout directory, training run or hub id; without it, the bundled model.
        seed: of pictures and questions.
        out: folder for the pictures, and for boxes.png with the answered boxes.
    """
    from dsvl2_jax.apps.micro.demo import demo as run

    run(ckpt, seed=seed, out=out, options=computing.load_options())


def start(directory: Positional[Path]) -> None:
    """Write configuration and tokenizer, from which training begins.

    Args:
        directory: where to write them.
    """
    from dsvl2_jax.apps.micro.build import start as run

    run(directory)


def data(directory: Positional[Path], names: Names = (), *, workers: int = 2) -> None:
    """Write the training data, but for the data sets that are there already.

    Args:
        directory: where to write them, each as a JSON Lines file and a folder of pictures.
        names: single data sets, such as text or held-out-full (a wrong name lists all); without any, all of them.
        workers: processes that draw; the files do not depend on it.
    """
    from dsvl2_jax.apps.micro.build import data as run

    run(directory, names, workers=workers)


def questions(directory: Positional[Path], *, seed: int = 6, samples: int = 500) -> None:
    """Write held-out questions for `dsvl2 eval`, and print the file's name.

    Args:
        directory: where to write them.
        seed: of pictures and questions.
        samples: questions of each task.
    """
    from dsvl2_jax.apps.micro.build import evaluation

    print(evaluation(directory, seed=seed, samples=samples))


def ship(runs: Positional[Path], directory: Positional[Path]) -> None:
    """Write the trained model in the released layout: bfloat16, training log, digests.

    Args:
        runs: folder of the runs of all stages.
        directory: where to write the model; its other files, such as a README, stay.
    """
    from dsvl2_jax.apps.micro.build import ship as run

    run(runs, directory)


def examples(directory: Positional[Path]) -> None:
    """Draw the pictures of configs/images.

    Args:
        directory: where to draw them.
    """
    from dsvl2_jax.apps.micro.build import examples as run

    run(directory)


def draw(
    directory: Positional[Path],
    *,
    name: str = "samples",
    count: int = 1000,
    seed: int = 0,
    held_out: bool = False,
    mixture: str = "full",
    turns: int = 8,
    workers: int = 1,
) -> None:
    """Write any number of conversations about drawn pictures, and print the file's name.

    Args:
        directory: where to write them.
        name: of the JSON Lines file and the folder of its pictures.
        count: samples to write.
        seed: of pictures and conversations.
        held_out: draw from the stream of random numbers that no training data come from.
        mixture: full, simple, parts, numbers or digit; text, captions or regions, alone or before one of these, as in
            'text simple'; tasks; or one kind of question, such as 'boxes alone'. A wrong name lists all.
        turns: the most questions of a conversation.
        workers: processes that draw; the files do not depend on it.
    """
    from dsvl2_jax.apps.micro.synthetic import HELD_OUT, TRAINING, write

    stream = HELD_OUT if held_out else TRAINING
    print(write(directory, name, count, seed=seed, stream=stream, mixture=mixture, turns=turns, workers=workers))


micro = command_group(
    "Make the bundled micro model: what it is trained from, held-out questions, and what the repository ships.",
    {"start": start, "data": data, "questions": questions, "ship": ship, "examples": examples, "draw": draw},
)
