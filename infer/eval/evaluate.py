"""`dsvl2 eval`: a model's answers to a file of questions, scored by the benchmarks' metrics and kept one by one."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import rich.markup
from rich.console import Console
from rich.table import Table

from dsvl2_jax import fields
from dsvl2_jax.checkpoint import locate
from dsvl2_jax.checkpoint.locate import RUN_NAME
from dsvl2_jax.checkpoint.staging import write_text
from dsvl2_jax.errors import ConversationError, DataError, DSVL2Error, UsageError
from dsvl2_jax.fields import Problem, setting
from dsvl2_jax.infer.answer import Generation
from dsvl2_jax.infer.engine import Model
from dsvl2_jax.infer.eval.report import Thumbnails, write_report
from dsvl2_jax.infer.eval.results import EvalRun, checkpoint_digest, file_digest, open_run
from dsvl2_jax.infer.eval.samples import Sample, read_samples, score
from dsvl2_jax.infer.loading import LoadOptions, load
from dsvl2_jax.inputs.image_sources import ImageStore, open_images, resolve_image
from dsvl2_jax.inputs.images import load_image, select_best_resolution
from dsvl2_jax.inputs.processor import (
    MAX_TILED_IMAGES,
    ModelInputs,
    Processor,
    extended_candidate_resolutions,
    image_tokens,
)
from dsvl2_jax.runtime import processes
from dsvl2_jax.runtime.progress import progress

SUMMARY_NAME = "summary.json"

_THREADS = 2  # that read and tile images while the device is busy
_AHEAD = 3  # batches that may be ready

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Options of `dsvl2 eval`; see ``--help``. What `identity` leaves out does not change the answers."""

    metric: str | None = None
    images: str = ""
    out: Path | None = None
    batch_size: int = setting(16, least=1)
    max_new_tokens: int = setting(128, least=1)
    dtype: str = "float32"
    mesh: str | None = None
    candidates: int | None = setting(None, least=1)
    prompt_template: str | None = None
    limit: int | None = setting(None, least=1)
    report_samples: int = setting(1000, least=0)
    as_json: bool = False

    def __post_init__(self) -> None:
        problems = fields.check(self)
        fields.refuse((Problem((f"--{p.path[0].replace('_', '-')}",), p.text) for p in problems), UsageError)

    def identity(self) -> dict[str, Any]:
        names = ("metric", "images", "max_new_tokens", "dtype", "candidates", "prompt_template")
        return {name: getattr(self, name) for name in names}


def evaluate(ckpt: str | None, data: Path, options: EvalOptions) -> dict[str, Any]:
    """Answers every sample of a file, or those still missing in ``options.out``, and writes results and report.

    Prints a table (or with ``as_json`` the summary) on standard output and progress on standard error.

    Among several processes all call it; process 0 reads the data and writes, the others compute with it.

    Returns:
      The summary (process 0 alone has one): ``tasks`` with metric, samples, score from 0 to 1 (and mean_iou) each, and
      how fast it went.

    Raises:
      DSVL2Error: a sample, an image, the checkpoint or an option cannot be used; or the directory has other results.
    """
    if not processes.is_first():
        _follow(ckpt, options)
        return {}
    store = open_images(options.images, str(data))
    samples = read_samples(data, store, metric=options.metric, template=options.prompt_template, limit=options.limit)
    directory = locate.resolve(ckpt)
    name = "bundled" if ckpt is None else checkpoint_name(directory)
    out = Path("eval") / name / data.stem if options.out is None else options.out
    identity = {
        "checkpoint": {"name": name, "digest": checkpoint_digest(directory)},
        "data": {"name": data.name, "digest": file_digest(data)},
        "options": options.identity(),
    }
    with open_run(out, identity) as run:
        thumbnails = Thumbnails(out, samples, options.report_samples)
        missing = [sample for sample in samples if sample.line not in run.results]
        seconds = 0.0
        if processes.from_first(lambda: bool(missing)):
            model = load(ckpt, LoadOptions(options.dtype, options.mesh))
            _extend_candidates(model.processor, options.candidates)
            started = time.perf_counter()
            _answer_all(model, missing, len(samples), store, data, run, thumbnails, options)
            seconds = time.perf_counter() - started
        results = [run.results[sample.line] for sample in samples]
        summary = summarise(results) | {
            "samples": len(results),
            "answered_now": len(missing),
            "samples_per_second": round(len(missing) / seconds, 2) if missing else None,
            "checkpoint": name,
            "data": str(data),
        }
        write_text(out / SUMMARY_NAME, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        thumbnails.complete(store)
        report = write_report(out, samples, run.results, summary, thumbnails)
    if options.as_json:
        print(json.dumps(summary, ensure_ascii=False))
    else:
        _print_table(summary, report)
    return summary


def _follow(ckpt: str | None, options: EvalOptions) -> None:
    """What the other processes do while process 0 evaluates: the same batches."""
    if processes.from_first(bool):
        model = load(ckpt, LoadOptions(options.dtype, options.mesh))
        while (work := processes.from_first(lambda: None)) is not None:
            model.generate(work, options.max_new_tokens, slots=options.batch_size)


def checkpoint_name(directory: Path) -> str:
    """A short name of a checkpoint's directory, for people and for the results' folder."""
    directory = directory.resolve()
    if (directory.parent.parent / RUN_NAME).is_file():  # a run's checkpoints/STEP
        return f"{directory.parent.parent.name}-{directory.name}"
    if directory.parent.name == "snapshots":  # the hub's cache: models--OWNER--NAME/snapshots/COMMIT
        return directory.parent.parent.name.rpartition("--")[2]
    return directory.name


def summarise(results: Iterable[Result]) -> dict[str, Any]:
    """``tasks``: per task and metric, in the order of their first sample, the number of samples and their mean score.

    A task that has several metrics is one entry for each. Where samples have groups (the rotations of MMBench's
    circular evaluation), a group scores what its worst sample does, and the entry has the number of groups.
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result["task"], result["metric"]), []).append(result)
    times = collections.Counter(task for task, _ in groups)
    tasks = {}
    for (task, metric), group in groups.items():
        worst: dict[Any, float] = {}
        for result in group:
            key = ("group", result["group"]) if "group" in result else ("line", result["line"])
            worst[key] = min(worst.get(key, 1.0), result["score"])
        entry: dict[str, Any] = {"metric": metric, "samples": len(group), "score": _mean(worst.values())}
        if len(worst) < len(group):
            entry["groups"] = len(worst)
        if metric == "iou":
            entry["mean_iou"] = _mean(result["iou"] for result in group)
        if unanswered := sum("error" in result for result in group):
            entry["unanswered"] = unanswered
        tasks[task if times[task] == 1 else f"{task} ({metric})"] = entry
    return {"tasks": tasks}


def prompt_size(sample: Sample, processor: Processor) -> tuple[int, int]:
    """(tiles, tokens) of a sample's prompt, from its texts and the sizes of its images; the template not counted."""
    config = processor.config
    tiles = 0
    tokens = sum(len(processor.tokenizer.encode(turn["content"])) for turn in sample.conversation)
    for size in sample.sizes:
        canvas = (config.tile_size,) * 2
        if len(sample.sizes) <= MAX_TILED_IMAGES:
            canvas = select_best_resolution(size, config.candidate_resolutions)
        cols, rows = (length // config.tile_size for length in canvas)
        tiles += 1 + cols * rows
        tokens += image_tokens(cols, rows, config.tokens_per_side)
    return tiles, tokens


@dataclasses.dataclass(frozen=True)
class _Prepared:
    sample: Sample
    inputs: ModelInputs | None  # None: the prompt cannot be answered
    error: str = ""


def _extend_candidates(processor: Processor, max_tiles: int | None) -> None:
    if max_tiles is not None:
        config = processor.config
        resolutions = extended_candidate_resolutions(max_tiles, config.tile_size)
        processor.config = dataclasses.replace(config, candidate_resolutions=resolutions)


def _answer_all(
    model: Model,
    missing: Sequence[Sample],
    total: int,
    store: ImageStore,
    data: Path,
    run: EvalRun,
    thumbnails: Thumbnails,
    options: EvalOptions,
) -> None:
    """Answers samples in batches of like size, the largest first, so that a lack of memory shows at once."""
    sizes = {sample.line: prompt_size(sample, model.processor) for sample in missing}
    ordered = sorted(missing, key=lambda sample: sizes[sample.line], reverse=True)
    batches = [ordered[i : i + options.batch_size] for i in range(0, len(ordered), options.batch_size)]

    def prepare(sample: Sample) -> _Prepared:
        try:
            images = [load_image(resolve_image(reference, store)) for reference in sample.images]
            thumbnails.make(sample, images)
            inputs = model.processor(list(sample.conversation), images)
        except (DSVL2Error, OSError) as error:
            raise DataError(f"{data}:{sample.line}: {error}") from error
        try:
            model.check_context(inputs)
        except ConversationError as error:
            return _Prepared(sample, None, str(error))
        return _Prepared(sample, inputs)

    with progress("answering", total, done=total - len(missing), unit="items") as advance:
        for prepared in _prefetched(batches, prepare):
            inputs = [p.inputs for p in prepared if p.inputs is not None]
            processes.from_first(lambda work=inputs: work)
            generations = iter(model.generate(inputs, options.max_new_tokens, slots=options.batch_size))
            run.append(result_of(p, None if p.inputs is None else next(generations)) for p in prepared)
            advance(len(prepared))
    processes.from_first(lambda: None)  # there is no more


def result_of(prepared: _Prepared, generation: Generation | None) -> Result:
    """The line of results.jsonl of one sample."""
    sample = prepared.sample
    result: Result = {
        "line": sample.line,
        "id": sample.id,
        "task": sample.task,
        "metric": sample.metric,
        "question": sample.question,
        "images": [reference if _is_name(reference) else "(inline)" for reference in sample.images],
        "references": list(sample.references),
    }
    if sample.group is not None:
        result["group"] = sample.group
    if sample.choices:
        result["choices"] = list(sample.choices)
    if generation is None:
        result |= {"answer": "", "score": 0.0, "error": prepared.error}
        return result | ({"iou": 0.0, "boxes": []} if sample.metric == "iou" else {})
    answer = generation.text.strip()
    boxes = [[box.x1, box.y1, box.x2, box.y2] for box in generation.boxes]
    scored = score(sample, answer, boxes)
    result |= {"answer": answer, "score": scored.value}
    if scored.iou is not None:
        result["iou"] = round(scored.iou, 6)
    if boxes or sample.metric == "iou":
        result["boxes"] = boxes
    return result | {
        "finish_reason": generation.finish_reason,
        "prompt_tokens": generation.prompt_tokens,
        "image_tokens": generation.image_tokens,
        "answer_tokens": len(generation.token_ids),
    }


def _prefetched(
    batches: Iterable[Sequence[Sample]], prepare: Callable[[Sample], _Prepared]
) -> Iterator[list[_Prepared]]:
    """Batches prepared by threads, a few ahead of the one that is used."""
    waiting: collections.deque[list[concurrent.futures.Future[_Prepared]]] = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(_THREADS)
    try:
        for batch in batches:
            waiting.append([pool.submit(prepare, sample) for sample in batch])
            if len(waiting) > _AHEAD:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


def _is_name(reference: Any) -> bool:
    return isinstance(reference, str) and len(reference) < 300 and not reference.startswith("data:")


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return round(sum(values) / len(values), 6)


def _print_table(summary: dict[str, Any], report: Path) -> None:
    tasks = summary["tasks"]
    with_iou = any("mean_iou" in entry for entry in tasks.values())
    unanswered = any("unanswered" in entry for entry in tasks.values())
    table = Table()
    table.add_column("task")
    table.add_column("metric")
    for name in ("samples", "score", *["mean IoU"] * with_iou, *["unanswered"] * unanswered):
        table.add_column(name, justify="right")
    for task, entry in tasks.items():
        cells = [rich.markup.escape(task), entry["metric"], f"{entry['samples']:,}", f"{100 * entry['score']:.1f} %"]
        if with_iou:
            cells.append(f"{entry['mean_iou']:.3f}" if "mean_iou" in entry else "")
        if unanswered:
            cells.append(str(entry.get("unanswered", "")))
        table.add_row(*cells)
    console = Console()
    console.print(table)
    speed = summary["samples_per_second"]
    pace = "all answered before" if speed is None else f"{summary['answered_now']:,} now, {speed} a second"
    console.print(f"{summary['samples']:,} samples ({pace}); report: {report}", soft_wrap=True, highlight=False)
