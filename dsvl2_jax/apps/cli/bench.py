"""`dsvl2 bench`: measurements on this machine.

Tested in tests/apps/bench.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from dsvl2_jax.apps.bench.serve_options import ServeLoad
from dsvl2_jax.apps.cli.options import (
    Checkpoint,
    Dtype,
    QuantizeRules,
    QuantizeTo,
    Settings,
    Size,
    command_group,
    needs_serve_extra,
    needs_train_extra,
)

InServeLoad = Annotated[ServeLoad, tyro.conf.arg(name="")]


def convert(*, size: Size = "tiny", directory: Path | None = None, keep: Path | None = None, repeats: int = 2) -> None:
    """Measure conversion against cp, on a random checkpoint.

    Args:
        size: the released size whose shapes it gets.
        directory: where to work; tiny needs 27 GB free.
        keep: where to leave the converted checkpoint.
        repeats: how often cp and the conversion run in turn.
    """
    from dsvl2_jax.apps.bench.convert import bench_convert

    bench_convert(size=size, directory=directory, keep=keep, repeats=repeats)


def generate(
    ckpt: Checkpoint = None,
    *,
    dtype: Dtype = "float32",
    mesh: str | None = None,
    new_tokens: int = 32,
    speculate: int = 0,
) -> None:
    """Measure loading a checkpoint and answering an image question.

    Args:
        ckpt: without it, the bundled model.
        dtype: in which the model computes.
        mesh: shard over devices, e.g. data=2,tensor=2,expert=2.
        new_tokens: tokens of the answer.
        speculate: also ask for an answer that the prompt has already, with so many drafts a step and without, in turns.
    """
    from dsvl2_jax.apps.bench.generate import bench_generate

    bench_generate(ckpt, dtype=dtype, mesh=mesh, new_tokens=new_tokens, speculate=speculate)


def load(
    ckpt: Checkpoint = None,
    *,
    size: Size = "tiny",
    directory: Path | None = None,
    dtype: Dtype = "float32",
    mesh: str | None = None,
    processes: int = 2,
) -> None:
    """Measure loading onto a mesh of processes.

    Args:
        ckpt: without it, a random one in both layouts.
        size: the released size whose shapes a random checkpoint gets.
        directory: where to work; tiny needs 14 GB free.
        dtype: in which it is loaded.
        mesh: without it, split over expert, from 4 processes on over tensor too.
        processes: how many share the model on this machine, with one CPU device each.
    """
    from dsvl2_jax.apps.bench.load import bench_load

    bench_load(ckpt, size=size, count=processes, mesh=mesh, dtype=dtype, directory=directory)


def model(
    size: Positional[str],
    *,
    layers: int | None = None,
    jobs: str = "decode,prefill,encode",
    slots: str = "1,16,64",
    context: int = 1024,
    tokens: str = "1024,4096",
    tiles: str = "10",
    set: Settings = (),
    dtype: Dtype | None = None,
    quantize: QuantizeTo | None = None,
    against: Literal["torch"] | None = None,
    profile: str | None = None,
    budget: float | None = None,
    json: bool = False,
    plot: Path | None = None,
) -> int:
    """Measure the engine's programs and the training step on the device that is there, with random weights.

    Prints, for each, the time, its share of what the device can do at most and of what a dense product and a copy reach
    in the same run, and what the compiled program does: docs/benchmarks.md explains every figure.

    Args:
        size: tiny, small, base, micro, a checkpoint or a config.json; its shapes are taken, its weights are not.
        layers: the layers of its language model and of its encoder, to fit a small machine; without it, all.
        jobs: of decode, prefill, chunk (512 tokens of a prompt, in the engine's way), encode, train (the step of the
            preset SIZE-sft) and kernels.
        slots: for decode, sequences that decode together.
        context: for decode, tokens that each cache has at the end.
        tokens: for prefill and chunk, the tokens of a prompt; train takes the largest number.
        tiles: for encode, tiles at a time; train takes the largest number.
        set: for train, a setting of the preset, such as compute.remat=dots; may be given several times.
        dtype: in which the model computes; without it bfloat16, on a CPU float32.
        quantize: weights in 8 or 4 bits, as dsvl2 convert --quantize makes them.
        against: torch: the same work in PyTorch, in the same run.
        profile: one of the jobs; also print how its program splits up, named scope by named scope.
        budget: seconds after which nothing new is begun.
        json: print JSON lines.
        plot: draw the shares into this PNG file.
    """
    with needs_train_extra():
        from dsvl2_jax.apps.bench.model import bench_model
        from dsvl2_jax.apps.bench.model_options import ModelOptions

        options = ModelOptions.parse(
            layers=layers,
            jobs=jobs,
            slots=slots,
            context=context,
            tokens=tokens,
            tiles=tiles,
            overrides=set,
            dtype=dtype,
            quantize=quantize,
            against=against,
            profile=profile,
            budget=budget,
            json=json,
            plot=plot,
        )
        return bench_model(size, options)


def serve(
    ckpt: Checkpoint = None,
    *,
    size: Size | None = None,
    layers: int | None = None,
    directory: Path | None = None,
    dtype: Dtype = "float32",
    mesh: str | None = None,
    load: InServeLoad = ServeLoad(),  # noqa: B008 (frozen)
) -> None:
    """Measure a server under load.

    Args:
        ckpt: without it, the bundled model.
        size: the released size whose shapes a random checkpoint gets; without it none is made.
        layers: with a size, the layers of its language model and of its encoder, to fit a small machine.
        directory: where to work.
        dtype: in which the model computes.
        mesh: shard over devices, e.g. data=2,tensor=2,expert=2.
    """
    with needs_serve_extra():
        from dsvl2_jax.apps.bench.serve import bench_serve

        bench_serve(ckpt, size=size, layers=layers, directory=directory, dtype=dtype, mesh=mesh, options=load)


def quantize(
    ckpts: Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[CKPT ...]")]] = (),
    *,
    kinds: str = "int8,int4,float8",
    rule: QuantizeRules = (),
    data: Path | None = None,
    samples: int | None = None,
    prompts: int = 16,
    directory: Path | None = None,
    json: bool = False,
) -> None:
    """Measure what quantized weights lose and save, against the same checkpoint in float32.

    Args:
        ckpts: what convert --quantize takes; without one, the bundled model.
        kinds: which are measured.
        rule: as convert takes them.
        data: questions as dsvl2 eval takes them; without it, drawn ones.
        samples: questions to ask (of drawn ones, of each task); without it all of the data, 30 of each task of the
            bundled model, and none of another.
        prompts: questions on which distributions are compared.
        directory: where to work.
        json: print JSON.
    """
    with needs_train_extra():
        from dsvl2_jax.apps.bench.quantize import bench_quantize

        kinds = tuple(filter(None, (kind.strip() for kind in kinds.split(","))))
        bench_quantize(
            ckpts,
            kinds=kinds,
            rules=rule,
            data=data,
            samples=samples,
            prompts=prompts,
            directory=directory,
            as_json=json,
        )


def train(*, rows: int = 2, length: int = 1024, steps: int = 3, rounds: int = 3, adapter: bool = False) -> None:
    """Measure a training step of a mid-size model against PyTorch's, on this machine's CPUs.

    Args:
        rows: sequences of a step.
        length: tokens of a sequence.
        steps: steps of a side before it is the other one's turn.
        rounds: turns of each side.
        adapter: train a LoRA adapter on the frozen model, against peft's.
    """
    with needs_train_extra():
        from dsvl2_jax.apps.bench.train import bench_train

        bench_train(rows=rows, length=length, steps=steps, rounds=rounds, adapter=adapter)


def tune(*, size: Size | None = None, json: bool = False, out: Path | None = None) -> None:
    """Measure the kernels of the GPU that is here with every choice of block sizes, and keep the quickest.

    Args:
        size: the released size whose kernels are measured; without it, all.
        json: print JSON lines.
        out: where the table is written; without it, in the user's cache, where the kernels look for it.
    """
    from dsvl2_jax.apps.bench.tune import bench_tune

    bench_tune(None if size is None else (size,), as_json=json, out=out)


bench = command_group(
    "Measure this machine: conversion, loading, generation, the model's programs, quantized weights, a server under "
    "load, training, and the kernels of a GPU.",
    {
        "convert": convert,
        "generate": generate,
        "load": load,
        "model": model,
        "quantize": quantize,
        "serve": serve,
        "train": train,
        "tune": tune,
    },
)
