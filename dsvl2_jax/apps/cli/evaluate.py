"""`dsvl2 eval`: answers to files of questions, and their scores.

Tested in tests/infer/eval/test_evaluate.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from dsvl2_jax.apps.cli.options import Computing, InComputing, Together, flattened
from dsvl2_jax.errors import UsageError
from dsvl2_jax.runtime.processes import Processes

Metric = Literal["exact", "contains", "anls", "relaxed", "vqa", "choice", "iou", "facts"]


def evaluate(
    files: Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[CKPT] DATA.jsonl")]],
    *,
    metric: Metric | None = None,
    images: str = "",
    out: Path | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    computing: InComputing = Computing(),  # noqa: B008 (frozen)
    candidates: int | None = None,
    prompt_template: str | None = None,
    limit: int | None = None,
    report_samples: int = 1000,
    json: bool = False,
    together: Together = Processes(),  # noqa: B008 (frozen)
) -> None:
    """Answer a file of questions and score the answers; docs/evaluation.md says how to run the benchmarks.

    Started again with the same checkpoint, data and options it resumes where it was stopped.

    Args:
        files: checkpoint (without it, the bundled model) and a file with one question a line.
        metric: how answers are scored, where a line does not say so itself.
        images: folder, or tar shards (a glob ending in .tar), of the images; without it, the file's folder.
        out: directory for results.jsonl, summary.json and report.html; without it, eval/CHECKPOINT/DATA.
        batch_size: questions answered together.
        max_new_tokens: the most tokens of an answer.
        candidates: cut images into at most this many tiles (InfoVQA: 18) instead of as the checkpoint says (9).
        prompt_template: the prompt around {question} and {choices}; \\n is a new line.
        limit: answer only the first questions, this many of them.
        report_samples: show at most this many samples of each task in report.html.
        json: print the summary as one JSON object.
    """
    together.join(flattened(locals()))
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
        dtype=computing.dtype,
        mesh=computing.mesh,
        candidates=candidates,
        prompt_template=prompt_template,
        limit=limit,
        report_samples=report_samples,
        as_json=json,
    )
    run(files[0] if len(files) == 2 else None, Path(files[-1]), options)
