"""`dsvl2 eval`: answers to a file of questions, scored by the benchmarks' metrics and kept one by one.

A model that is loaded here answers, or a server. Nothing here imports jax, which a server's client does not need.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import rich.markup
from rich.table import Table

from dsvl2_jax import fields
from dsvl2_jax.checkpoint.staging import write_text
from dsvl2_jax.errors import UsageError
from dsvl2_jax.fields import Problem, setting
from dsvl2_jax.infer.eval.answers import Questions, Result, Source, is_final
from dsvl2_jax.infer.eval.chat_request import ServerOptions
from dsvl2_jax.infer.eval.client import Server
from dsvl2_jax.infer.eval.report import Thumbnails, write_report
from dsvl2_jax.infer.eval.results import file_digest, open_run
from dsvl2_jax.infer.eval.samples import Sample, read_samples
from dsvl2_jax.inputs.image_sources import ImageStore, open_images
from dsvl2_jax.inputs.images import trait_notes
from dsvl2_jax.inputs.tile_budget import MAX_TILES
from dsvl2_jax.runtime import processes
from dsvl2_jax.runtime.console import PrintableConsole
from dsvl2_jax.runtime.progress import progress

SUMMARY_NAME = "summary.json"


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Options of `dsvl2 eval`; see ``--help``. What `identity` leaves out does not change the answers."""

    metric: str | None = None
    images: str = ""
    follow_links: bool = False
    out: Path | None = None
    batch_size: int = setting(16, least=1)
    max_new_tokens: int = setting(128, least=1)
    dtype: str = "float32"
    cache_dtype: str | None = None
    mesh: str | None = None
    verify: bool = False
    adapter: str | None = None
    context: int | None = setting(None, least=1)
    rope_scaling: str | None = None
    max_tiles: int | None = setting(None, least=1, most=MAX_TILES)
    min_tiles: int | None = setting(None, least=1, most=MAX_TILES)
    speculate: int = setting(0, least=0)
    as_seen: bool = False
    prompt_template: str | None = None
    limit: int | None = setting(None, least=1)
    report_samples: int = setting(1000, least=0)
    as_json: bool = False
    server: ServerOptions | None = None  # it answers, and nothing that is about a loaded model is used

    def __post_init__(self) -> None:
        problems = fields.check(self)
        fields.refuse((Problem((f"--{p.path[0].replace('_', '-')}",), p.text) for p in problems), UsageError)

    def identity(self) -> dict[str, Any]:
        names = ("metric", "images", "max_new_tokens", "prompt_template")
        optional = "as_seen", "min_tiles", "cache_dtype", "adapter", "context", "rope_scaling"
        names += tuple(name for name in optional if getattr(self, name))
        named = {name: getattr(self, name) for name in names}
        # The option was called candidates, and its runs go on.
        return named | ({"dtype": self.dtype, "candidates": self.max_tiles} if self.server is None else {})


def evaluate(ckpt: str | None, data: Path, options: EvalOptions) -> dict[str, Any]:
    """Answers every sample of a file, or those still missing in ``options.out``, and writes results and report.

    Prints a table (or with ``as_json`` the summary) on standard output and progress on standard error.

    Among several processes all call it; process 0 reads the data and writes, the others compute with it.

    Args:
      ckpt: what `dsvl2_jax.load` takes; not used when ``options.server`` answers.
      data: a file of questions, one JSON object a line.

    Returns:
      The summary (process 0 alone has one): ``tasks`` with metric, samples, score from 0 to 1 (and mean_iou) each, and
      how fast it went.

    Raises:
      DSVL2Error: a sample, an image, the checkpoint, the server or an option cannot be used; or the directory has other
        results.
    """
    if options.server is not None:
        store, samples = _read(data, options)
        return _run(Server(options.server, options.max_new_tokens), data, store, samples, options)
    from dsvl2_jax.infer.eval.loaded import LoadedModel, follow  # imports jax
    from dsvl2_jax.infer.loading import LoadOptions

    names = ("verify", "adapter", "cache_dtype", "max_tiles", "min_tiles", "context", "rope_scaling")
    loading = LoadOptions(options.dtype, options.mesh, **{name: getattr(options, name) for name in names})
    if not processes.is_first():
        follow(ckpt, loading, options.batch_size, options.speculate)
        return {}
    store, samples = _read(data, options)
    model = LoadedModel(
        ckpt,
        loading,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        speculate=options.speculate,
    )
    return _run(model, data, store, samples, options)


def _read(data: Path, options: EvalOptions) -> tuple[ImageStore, list[Sample]]:
    store = open_images(options.images, str(data), options.follow_links)
    samples = read_samples(
        data,
        store,
        metric=options.metric,
        template=options.prompt_template,
        limit=options.limit,
        as_seen=options.as_seen,
    )
    return store, samples


def _run(
    source: Source, data: Path, store: ImageStore, samples: Sequence[Sample], options: EvalOptions
) -> dict[str, Any]:
    """Has a source answer what is missing, and writes and prints what came of it; returns the summary."""
    out = Path("eval") / source.name.replace(":", "-") / data.stem if options.out is None else options.out
    identity = {
        **source.identity(),
        "data": {"name": data.name, "digest": file_digest(data)},
        "options": options.identity(),
    }
    with open_run(out, identity) as run:
        thumbnails = Thumbnails(out, samples, options.report_samples, options.as_seen)
        missing = [sample for sample in samples if not is_final(run.results.get(sample.line))]
        seconds = 0.0
        source.start(needed=bool(missing))
        if missing:
            started = time.perf_counter()
            with progress("answering", len(samples), done=len(samples) - len(missing), unit="items") as advance:

                def keep(results: Sequence[Result]) -> None:
                    run.append(results)
                    advance(len(results))

                questions = Questions(missing, data, store, thumbnails, keep, options.as_seen)
                source.answer(questions)
            seconds = time.perf_counter() - started
            for note in trait_notes(() if options.as_seen else questions.traits, "--as-seen"):
                print(f"dsvl2: warning: {note}", file=sys.stderr)
        results = [run.results[sample.line] for sample in samples]
        summary = summarise(results) | {
            "samples": len(results),
            "answered_now": len(missing),
            "samples_per_second": round(len(missing) / seconds, 2) if missing else None,
            **source.summary(),
            "data": str(data),
        }
        write_text(out / SUMMARY_NAME, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        thumbnails.complete(store)
        report = write_report(out, source.name, samples, run.results, summary, thumbnails)
    if options.as_json:
        print(json.dumps(summary, ensure_ascii=False))
    else:
        _print_table(summary, report)
    return summary


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
        if malformed := sum(result.get("malformed_boxes", 0) for result in group):
            entry["malformed_boxes"] = malformed
        tasks[task if times[task] == 1 else f"{task} ({metric})"] = entry
    return {"tasks": tasks}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return round(sum(values) / len(values), 6)


def _print_table(summary: dict[str, Any], report: Path) -> None:
    tasks = summary["tasks"]
    with_iou = any("mean_iou" in entry for entry in tasks.values())
    further = [key for key in ("unanswered", "malformed_boxes") if any(key in entry for entry in tasks.values())]
    table = Table()
    table.add_column("task")
    table.add_column("metric")
    for name in ("samples", "score", *["mean IoU"] * with_iou, *(key.replace("_", " ") for key in further)):
        table.add_column(name, justify="right")
    for task, entry in tasks.items():
        cells = [rich.markup.escape(task), entry["metric"], f"{entry['samples']:,}", f"{100 * entry['score']:.1f} %"]
        if with_iou:
            cells.append(f"{entry['mean_iou']:.3f}" if "mean_iou" in entry else "")
        cells += [str(entry.get(key, "")) for key in further]
        table.add_row(*cells)
    console = PrintableConsole()
    console.print(table)
    speed = summary["samples_per_second"]
    pace = "all answered before" if speed is None else f"{summary['answered_now']:,} now, {speed} a second"
    console.print(f"{summary['samples']:,} samples ({pace}); report: {report}", soft_wrap=True, highlight=False)
