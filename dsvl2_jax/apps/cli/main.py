"""The `dsvl2` command: one subcommand per job. Heavy imports wait until a job needs them."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, UseAppendAction

from dsvl2_jax.errors import DSVL2Error, UsageError
from dsvl2_jax.runtime import processes
from dsvl2_jax.runtime.processes import Processes

Checkpoint = Positional[str | None]
Dtype = Literal["float32", "bfloat16"]
Metric = Literal["exact", "contains", "anls", "relaxed", "vqa", "choice", "iou", "facts"]
Overrides = Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[KEY=VALUE ...]")]]
Settings = Annotated[tuple[str, ...], UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")]
Images = Annotated[tuple[tuple[Path, ...], ...], UseAppendAction]
Together = Annotated[Processes, tyro.conf.arg(name="")]


def convert(
    src: Positional[str], dst: Positional[Path], *, dtype: Dtype | None = None, max_memory: str = "1GiB"
) -> None:
    """Convert a checkpoint in the released layout to an Orbax directory that is complete by itself.

    Args:
        src: directory with config.json and safetensors, or a hub id such as deepseek-ai/deepseek-vl2-tiny.
        dst: directory to make; it must not exist.
        dtype: cast all tensors; without it each keeps its own.
        max_memory: most memory for tensors on their way, e.g. 4GiB. One tensor may always pass.
    """
    from dsvl2_jax.convert.to_orbax import convert as run
    from dsvl2_jax.convert.to_orbax import parse_bytes

    run(src, dst, dtype=dtype, max_memory=parse_bytes(max_memory))


def export(ckpt: Positional[str], dst: Positional[Path], *, dtype: Dtype | None = None) -> None:
    """Write a converted or trained checkpoint back to the released layout (safetensors with index).

    Args:
        ckpt: converted directory, training run (its newest checkpoint) or one of its checkpoints.
        dst: directory to make; it must not exist.
        dtype: cast all tensors but the router's; without it each is as stored, which is float32 for trained ones.
    """
    from dsvl2_jax.convert.to_safetensors import export as run

    run(ckpt, dst, dtype=dtype)


def doctor(ckpt: Checkpoint = None, *, json: bool = False) -> int:
    """Check a checkpoint in either layout; exit status 1 when it is unusable.

    Args:
        ckpt: checkpoint or training run; without it, the bundled one.
        json: print the report as JSON.
    """
    from dsvl2_jax.convert.doctor import doctor as run

    return run(ckpt, as_json=json)


def generate(
    ckpt: Checkpoint = None,
    *,
    prompt: str,
    image: Images = (),
    system: str = "",
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 50,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: UseAppendAction[tuple[str, ...]] = (),
    chunk_size: int | None = None,
    json: bool = False,
    draw: Path | None = None,
    dtype: Dtype = "float32",
    mesh: str | None = None,
    exif: bool = False,
    strict_special_tokens: bool = False,
    together: Together = Processes(),  # noqa: B008 (frozen)
) -> None:
    """Answer one prompt about any number of images.

    Args:
        ckpt: converted directory, released-layout directory, training run or hub id; without it, the bundled model.
        prompt: the user's text. <image> marks where each image goes; without it the images come first.
        image: image files, in order; may be given several times.
        system: a system message.
        max_new_tokens: most tokens of the answer.
        temperature: 0 is greedy.
        top_p: sample from the likeliest tokens that together reach this probability.
        top_k: sample from so many of the likeliest tokens; 0 for all.
        repetition_penalty: above 1 makes repeating less likely.
        seed: of sampling.
        stop: end the answer before this string; may be given several times.
        chunk_size: prefill so many tokens at a time, to bound memory.
        json: print one JSON object instead of streaming text.
        draw: write the last image with the answer's boxes drawn.
        dtype: in which the model computes.
        mesh: shard over devices, e.g. data=2,tensor=2,expert=2.
        exif: turn images as their EXIF orientation says (the official code does not).
        strict_special_tokens: treat special tokens written in the prompt as plain text.
    """
    together.join(locals())
    from dsvl2_jax.apps.cli.generate import SamplingParams, generate
    from dsvl2_jax.infer.loading import LoadOptions

    generate(
        ckpt,
        prompt=prompt,
        images=[path for group in image for path in group],
        system=system,
        max_new_tokens=max_new_tokens,
        sampling=SamplingParams(temperature, top_p, top_k, repetition_penalty, seed, stop),
        chunk_size=chunk_size,
        as_json=json,
        draw=draw,
        options=LoadOptions(dtype, mesh, exif, strict_special_tokens),
    )


def chat(
    ckpt: Checkpoint = None,
    *,
    system: str = "",
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 50,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    dtype: Dtype = "float32",
    mesh: str | None = None,
    exif: bool = False,
    strict_special_tokens: bool = False,
) -> None:
    """Talk with the model in the terminal; /help lists what a line can do besides.

    Args:
        ckpt: converted directory, released-layout directory, training run or hub id; without it, the bundled model.
        system: a system message.
        max_new_tokens: most tokens of an answer.
        temperature: 0 is greedy.
        top_p: sample from the likeliest tokens that together reach this probability.
        top_k: sample from so many of the likeliest tokens; 0 for all.
        repetition_penalty: above 1 makes repeating less likely.
        seed: of sampling.
        dtype: in which the model computes.
        mesh: shard over devices, e.g. data=2,tensor=2,expert=2.
        exif: turn images as their EXIF orientation says (the official code does not).
        strict_special_tokens: treat special tokens written in the prompt as plain text.
    """
    from dsvl2_jax.apps import chat
    from dsvl2_jax.apps.cli.generate import SamplingParams
    from dsvl2_jax.infer.loading import LoadOptions, load

    model = load(ckpt, LoadOptions(dtype, mesh, exif, strict_special_tokens))
    sampling = SamplingParams(temperature, top_p, top_k, repetition_penalty, seed)
    chat.chat(model, system, max_new_tokens, sampling)


def demo(
    ckpt: Checkpoint = None,
    *,
    seed: int = 0,
    out: Path = Path("out"),
    dtype: Dtype = "float32",
    mesh: str | None = None,
) -> None:
    """Draw fresh pictures, ask about them, and show the answers beside the truth.

    Args:
        ckpt: converted directory, released-layout directory, training run or hub id; without it, the bundled model.
        seed: of pictures and questions.
        out: folder for the pictures, and for boxes.png with the answered boxes.
        dtype: in which the model computes.
        mesh: shard over devices, e.g. data=2,tensor=2,expert=2.
    """
    from dsvl2_jax.apps.micro.demo import demo as run
    from dsvl2_jax.infer.loading import LoadOptions

    run(ckpt, seed=seed, out=out, options=LoadOptions(dtype, mesh))


def train(
    config: Positional[str],
    settings: Overrides = (),
    *,
    profile: str | None = None,
    tensorboard: bool = False,
    together: Together = Processes(),  # noqa: B008 (frozen)
) -> None:
    """Train as a CONFIG.toml says, or go on with the run in its directory after it was stopped or killed.

    Checkpoints, log and settings are in run.directory, which `generate`, `export` and `doctor` take as a checkpoint.
    Ctrl-C or SIGTERM finish the step and write a checkpoint; a second Ctrl-C stops at once.

    Args:
        config: a TOML file, or the name of a preset: {tiny,small,base}-{align,pretrain,sft}.
        settings: single settings instead of the file's, e.g. run.steps=100 optimizer.learning_rate=1e-5.
        profile: FIRST:LAST, the steps to trace into the run's directory (sets run.profile).
        tensorboard: write TensorBoard files as well (sets run.tensorboard).
    """
    together.join(locals())
    with _training_extra():
        from dsvl2_jax.train.run import train as run

        overrides = list(settings)
        if profile is not None:
            overrides.append(f"run.profile={profile}")
        if tensorboard:
            overrides.append("run.tensorboard=true")
        run(config, overrides)


def data(
    job: Positional[Literal["check"]],
    file: Positional[str],
    *,
    ckpt: str | None = None,
    images: str = "",
    sequence_length: int = 4096,
    tiles_per_sequence: int = 20,
    mask_prompt: bool = False,
    problems: int = 20,
    histogram: Path | None = None,
    json: bool = False,
) -> int:
    """Check a training data set: what is in it, and what is wrong with it; exit status 1 when a sample is broken.

    Args:
        job: what to do with it.
        file: JSON Lines, a JSON array, .txt or .tar; a glob pattern may name several.
        ckpt: checkpoint whose tokenizer and tiling count; without it, the bundled model's.
        images: folder, or tar shards (a glob ending in .tar), of the images; without it, the file's folder.
        sequence_length: tokens of a training row.
        tiles_per_sequence: image tiles of a training row.
        mask_prompt: count answers alone as learnt, as in fine-tuning.
        problems: how many broken samples to list; all are counted.
        histogram: PNG to draw token and tile counts to.
        json: print one JSON object.
    """
    with _training_extra():
        from dsvl2_jax.train.data.check import check

        return check(
            file,
            checkpoint=ckpt,
            images=images,
            sequence_length=sequence_length,
            tiles_per_sequence=tiles_per_sequence,
            mask_prompt=mask_prompt,
            most_problems=problems,
            histogram=histogram,
            as_json=json,
        )


def evaluate(
    files: Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[CKPT] DATA.jsonl")]],
    *,
    metric: Metric | None = None,
    images: str = "",
    out: Path | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    dtype: Dtype = "float32",
    mesh: str | None = None,
    candidates: int | None = None,
    prompt_template: str | None = None,
    limit: int | None = None,
    report_samples: int = 1000,
    json: bool = False,
    together: Together = Processes(),  # noqa: B008 (frozen)
) -> None:
    """Answer a file of questions and score the answers; docs/evaluation.md says how to run the benchmarks.

    Started again with the same checkpoint, data and options it goes on where it was stopped.

    Args:
        files: checkpoint (without it, the bundled model) and a file with one question a line.
        metric: how answers are scored, where a line does not say so itself.
        images: folder, or tar shards (a glob ending in .tar), of the images; without it, the file's folder.
        out: directory for results.jsonl, summary.json and report.html; without it, eval/CHECKPOINT/DATA.
        batch_size: questions answered together.
        max_new_tokens: most tokens of an answer.
        dtype: in which the model computes.
        mesh: shard over devices, e.g. data=2,tensor=2,expert=2.
        candidates: cut images into up to so many tiles (InfoVQA: 18) instead of as the checkpoint says (9).
        prompt_template: the prompt around {question} and {choices}; \\n is a new line.
        limit: only the first so many questions.
        report_samples: show so many samples of each task in report.html.
        json: print the summary as one JSON object.
    """
    together.join(locals())
    from dsvl2_jax.infer.eval.evaluate import EvalOptions
    from dsvl2_jax.infer.eval.evaluate import evaluate as run

    if len(files) not in (1, 2):
        raise UsageError(f"eval: found {len(files)} arguments, expected [CKPT] DATA.jsonl.")
    options = EvalOptions(
        metric=metric,
        images=images,
        out=out,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        mesh=mesh,
        candidates=candidates,
        prompt_template=prompt_template,
        limit=limit,
        report_samples=report_samples,
        as_json=json,
    )
    run(files[0] if len(files) == 2 else None, Path(files[-1]), options)


def plot(runs: Positional[tuple[Path, ...]], *, out: Path = Path("plot.png")) -> None:
    """Draw loss, expert balance and throughput of one or several training runs.

    Args:
        runs: directories of runs (run.directory).
        out: PNG to write.
    """
    with _training_extra():
        from dsvl2_jax.train.log.plot import plot as run

        run(runs, out)
        print(out)


@contextlib.contextmanager
def _training_extra() -> Iterator[None]:
    """Names the extra to install when a module of it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("grain", "matplotlib", "optax", "tensorboardX"):
            raise
        raise UsageError(f"training needs {error.name}, which is not installed: pip install -e '.[train]'") from error


def bench(
    job: Positional[Literal["convert", "generate", "load", "train"]],
    ckpt: Checkpoint = None,
    *,
    size: Literal["tiny", "small", "base"] = "tiny",
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
) -> None:
    """Measure conversion (against cp), generation, loading onto a mesh of processes, or training (against PyTorch).

    Args:
        job: what to measure.
        ckpt: for generate; without it, the bundled model. For load; without it, a random one in both layouts.
        size: for convert and load, the released size whose shapes the random checkpoint gets.
        directory: for convert and load, where to work; tiny needs 27 GB free to convert, 14 GB to load.
        keep: for convert, where to leave the converted checkpoint.
        repeats: for convert, how often cp and the conversion run in turn.
        dtype: for generate and load.
        mesh: for generate and load; without it load splits over expert, from 4 processes on over tensor too.
        new_tokens: for generate.
        processes: for load, how many share the model on this machine, with one CPU device each.
        rows: for train, sequences of a step.
        length: for train, tokens of a sequence.
        steps: for train, steps of a side before it is the other one's turn.
        rounds: for train, turns of each side.
    """
    if job == "convert":
        from dsvl2_jax.apps.bench.convert import bench_convert

        bench_convert(size=size, directory=directory, keep=keep, repeats=repeats)
    elif job == "train":
        with _training_extra():
            from dsvl2_jax.apps.bench.train import bench_train

            bench_train(rows=rows, length=length, steps=steps, rounds=rounds)
    elif job == "load":
        from dsvl2_jax.apps.bench.load import bench_load

        bench_load(ckpt, size=size, count=processes, mesh=mesh, dtype=dtype, directory=directory)
    else:
        from dsvl2_jax.apps.bench.generate import bench_generate

        bench_generate(ckpt, dtype=dtype, mesh=mesh, new_tokens=new_tokens)


def plan(
    model: Positional[str] = "micro",
    *,
    topology: str | None = None,
    job: Literal["prefill", "decode", "encode", "align", "pretrain", "sft"] | None = None,
    batch: int | None = None,
    sequence: int | None = None,
    slots: int | None = None,
    micro: int | None = None,
    set: Settings = (),
    mesh: str = "auto",
    no_cache: bool = False,
    json: bool = False,
) -> int:
    """Compile a job for TPUs or GPUs, without having one, and say whether it fits and how fast it can be.

    Without a topology: a row for each of the usual ones. Needs the compiler, pip install -e '.[tpu]' or '.[cuda]'; what
    can be said without it is said. Exit status 1 when the job does not fit the topology.

    Args:
        model: tiny, small, base, micro, a checkpoint, or a config.json.
        topology: as v5e-16, v5p-8, v6e-8, tpu7x-8, h100-8 or h200-1; without it, a table of them.
        job: what to compile: inference, or the training step of a preset. Without it decode; in the table prefill too.
        batch: prompts of a prefill (8), tiles to encode (32), or sequences of a training step (the preset's).
        sequence: tokens of a prompt or training sequence, or that the cache has room for (4096).
        slots: rows that decode together (64).
        micro: sequences that a data shard trains on at a time (the preset's).
        set: a setting of the preset, such as compute.remat=dots; may be given several times.
        mesh: as data=2,tensor=2,expert=4; auto chooses one and says why.
        no_cache: compile even what was compiled before.
        json: print everything as JSON.
    """
    from dsvl2_jax.apps.plan.report import run

    with _training_extra():
        return run(
            model,
            topology,
            job,
            batch=batch,
            sequence=sequence,
            slots=slots,
            micro=micro,
            overrides=set,
            mesh=mesh,
            cache=not no_cache,
            as_json=json,
        )


COMMANDS = {
    "convert": convert,
    "export": export,
    "generate": generate,
    "chat": chat,
    "demo": demo,
    "train": train,
    "data": data,
    "plot": plot,
    "eval": evaluate,
    "plan": plan,
    "bench": bench,
    "doctor": doctor,
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for a failure, 2 for a wrong call."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    if debug:
        args.remove("--debug")
    try:
        status = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="dsvl2",
            description="DeepSeek-VL2 in JAX. `dsvl2 COMMAND --help` explains a command; --debug shows tracebacks.",
            args=args,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName),
        )
        return processes.end(status or 0)
    except SystemExit:
        if args[:1] == ["train"] and {"-h", "--help"} & set(args):  # tyro has printed the options
            from dsvl2_jax.train.settings.load import settings_help

            print(settings_help())
        raise
    except (Exception, KeyboardInterrupt) as error:
        if debug and not isinstance(error, (KeyboardInterrupt, BrokenPipeError)):
            if not processes.joined():
                raise
            traceback.print_exc()
        return processes.end(*_told(error))


def _told(error: BaseException) -> tuple[int, str | None]:
    """The exit status of an error, and what to say about it."""
    if isinstance(error, DSVL2Error):
        kind = "usage error" if isinstance(error, UsageError) else "error"
        return error.exit_status, f"dsvl2: {kind}: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "dsvl2: interrupted"
    if isinstance(error, BrokenPipeError):
        # The reader of our output has gone.
        if processes.joined():
            return 1, "dsvl2: error: standard output is closed."
        sys.stderr.close()  # python would complain once more when it flushes at exit
        return 1, None
    return 1, f"dsvl2: error: {type(error).__name__}: {str(error) or 'no message'} (--debug shows where)"


if __name__ == "__main__":
    sys.exit(main())
