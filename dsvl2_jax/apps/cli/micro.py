"""`dsvl2 demo`: the bundled model on fresh pictures."""

from __future__ import annotations

from pathlib import Path

from dsvl2_jax.apps.cli.options import Checkpoint, Computing, InComputing


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
