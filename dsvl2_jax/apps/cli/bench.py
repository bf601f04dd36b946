"""`dsvl2 bench`: measurements on this machine.

Tested in tests/apps/bench.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from dsvl2_jax.apps.bench.serve_options import ServeLoad
from dsvl2_jax.apps.cli.options import Checkpoint, Dtype, Size, needs_serve_extra, needs_train_extra

InServeLoad = Annotated[ServeLoad, tyro.conf.arg(name="")]


def bench(
    job: Positional[Literal["convert", "generate", "load", "serve", "train", "tune"]],
    ckpt: Checkpoint = None,
    *,
    size: Size | None = None,
    layers: int | None = None,
    directory: Path | None = None,
    keep: Path | None = None,
    repeats: int = 2,
    dtype: Dtype = "float32",
    mesh: str | None = None,
    new_tokens: int = 32,
    processes: int = 2,
    rows: int = 2,
    length: int = 1024,
    steps: int = 3,
    rounds: int = 3,
    out: Path | None = None,
    load: InServeLoad = ServeLoad(),  # noqa: B008 (frozen)
) -> None:
    """Measure conversion (against cp), generation, loading onto a mesh of processes, a server under load, training
    (against PyTorch), or, to tune them, the kernels of the GPU that is here.

    Args:
        job: what to measure.
        ckpt: for generate and serve; without it, the bundled model. For load; without it, a random one in both layouts.
        size: the released size whose shapes a random checkpoint gets; for convert and load, tiny without it. For serve,
            no random checkpoint is made without it. For tune, the size whose kernels are measured; without it, all.
        layers: for serve with a size, the layers of its language model and of its encoder, to fit a small machine.
        directory: for convert, load and serve, where to work; tiny needs 27 GB free to convert, 14 GB to load.
        keep: for convert, where to leave the converted checkpoint.
        repeats: for convert, how often cp and the conversion run in turn.
        dtype: for generate, load and serve.
        mesh: for generate, load and serve; without it load splits over expert, from 4 processes on over tensor too.
        new_tokens: for generate, the tokens of the answer.
        processes: for load, how many share the model on this machine, with one CPU device each.
        rows: for train, sequences of a step.
        length: for train, tokens of a sequence.
        steps: for train, steps of a side before it is the other one's turn.
        rounds: for train, turns of each side.
        out: for tune, where the table is written; without it, in the user's cache, where the kernels look for it.
    """
    if job == "convert":
        from dsvl2_jax.apps.bench.convert import bench_convert

        bench_convert(size=size or "tiny", directory=directory, keep=keep, repeats=repeats)
    elif job == "train":
        with needs_train_extra():
            from dsvl2_jax.apps.bench.train import bench_train

            bench_train(rows=rows, length=length, steps=steps, rounds=rounds)
    elif job == "tune":
        from dsvl2_jax.apps.bench.tune import bench_tune

        bench_tune(None if size is None else (size,), as_json=load.json, out=out)
    elif job == "load":
        from dsvl2_jax.apps.bench.load import bench_load

        bench_load(ckpt, size=size or "tiny", count=processes, mesh=mesh, dtype=dtype, directory=directory)
    elif job == "serve":
        with needs_serve_extra():
            from dsvl2_jax.apps.bench.serve import bench_serve

            bench_serve(ckpt, size=size, layers=layers, directory=directory, dtype=dtype, mesh=mesh, options=load)
    else:
        from dsvl2_jax.apps.bench.generate import bench_generate

        bench_generate(ckpt, dtype=dtype, mesh=mesh, new_tokens=new_tokens)
