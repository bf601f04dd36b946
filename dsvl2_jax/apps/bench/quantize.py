"""`dsvl2 bench quantize`: what quantized weights lose, and what they save.

A checkpoint is converted as `dsvl2 convert --quantize` does, loaded, and compared with itself in float32: by the
answers to questions, by the distributions after every token of some prompts, and by bytes.

Tested in tests/apps/bench/test_quantize.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from dsvl2_jax.apps.bench.measure import need_at_least
from dsvl2_jax.apps.micro.build import evaluation
from dsvl2_jax.apps.plan.least_work import decode_work
from dsvl2_jax.checkpoint.locate import resolve
from dsvl2_jax.convert.to_orbax import convert
from dsvl2_jax.infer.engine import load
from dsvl2_jax.infer.eval.evaluate import EvalOptions, evaluate
from dsvl2_jax.infer.eval.samples import Sample, read_samples
from dsvl2_jax.inputs.image_sources import ImageStore, open_images, resolve_image
from dsvl2_jax.inputs.processor import ModelInputs, Processor
from dsvl2_jax.kernels.quantized import KINDS
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import abstract_leaves
from dsvl2_jax.model.quantization import (
    Quantization,
    bytes_in_bfloat16,
    leaves_of,
    quantization_of,
    quantized_weights,
)
from dsvl2_jax.runtime.console import PrintableConsole

PLAIN = "float32"
DECODE_CONTEXT = 4096  # tokens in the cache of the one slot whose decode bytes are given
_AT_ONCE = 4  # prompts of a similar length, whose logits are computed together


@dataclasses.dataclass(frozen=True)
class Loss:
    """What the weights of one kind lose and save; ratios are to the same weights in bfloat16.

    Attributes:
      kind: of `KINDS`, or `PLAIN`.
      score: mean over the questions, from 0 to 1; None: none were asked.
      kl: mean over the positions of the prompts of KL(float32 ‖ kind), in nats. worst_kl: the largest.
      same: the share of positions whose most likely token is that of float32.
      quantized: bytes of the quantized weights. whole: of all parameters. decode: that a decode step of one slot reads.
    """

    kind: str
    score: float | None
    kl: float
    worst_kl: float
    same: float
    quantized: float
    whole: float
    decode: float


def bench_quantize(
    ckpts: Sequence[str],
    *,
    kinds: Sequence[str] = KINDS,
    rules: Sequence[str] = (),
    data: Path | None = None,
    samples: int | None = None,
    prompts: int = 16,
    directory: Path | None = None,
    as_json: bool = False,
) -> dict[str, list[Loss]]:
    """Measures and prints a table for each checkpoint.

    Args:
      ckpts: what `dsvl2 convert --quantize` takes; none: the bundled model.
      kinds: of `KINDS`.
      rules: as the option ``--rule`` gives them.
      data: questions as `dsvl2 eval` takes them; None: drawn ones, as `dsvl2 micro questions` writes.
      samples: how many questions are asked (of drawn ones, of each task); None: all of ``data``, 30 drawn ones of each
        task of the bundled model, and none of another, which has not learnt them.
      prompts: how many of the questions the distributions are compared on.
      directory: where to work.

    Returns:
      Checkpoint → a row for float32 and each kind.

    Raises:
      UsageError: an unknown kind, or a number that is too small. Also what converting and loading raise.
    """
    need_at_least("--prompts", prompts, 1)
    if samples is not None:
        need_at_least("--samples", samples, 0)
    chosen = [quantization_of(kind, rules) for kind in kinds]
    results: dict[str, list[Loss]] = {}
    with tempfile.TemporaryDirectory(prefix="dsvl2-quantize-", dir=directory) as work:
        for number, ckpt in enumerate(ckpts or [None]):
            place = Path(work, str(number))
            place.mkdir()
            asked = samples if samples is not None else None if data is not None else 30 if ckpt is None else 0
            file = data if data is not None else evaluation(place, samples=max(1, asked or 0))
            name = "bundled" if ckpt is None else str(ckpt)
            results[name] = _losses(ckpt, place, chosen, file, asked, prompts, drawn=data is None)
            if not as_json:
                _print(name, results[name])
    if as_json:
        print(json.dumps({name: [dataclasses.asdict(row) for row in rows] for name, rows in results.items()}, indent=1))
    return results


def _losses(
    ckpt: str | None,
    place: Path,
    chosen: Sequence[Quantization],
    file: Path,
    asked: int | None,
    prompts: int,
    *,
    drawn: bool,
) -> list[Loss]:
    store = open_images("", str(file))
    read = read_samples(file, store, metric=None, template=None, limit=None)
    limit = None if asked is None or drawn else asked
    plain, expected, config = None, None, None
    rows = []
    for quantization in (None, *chosen):
        directory = ckpt
        if quantization is not None:
            directory = str(place / quantization.kind)
            with contextlib.redirect_stderr(io.StringIO()):
                convert(resolve(ckpt), directory, quantization=quantization)
        model = load(directory)
        config = model.config
        inputs = _inputs(_spread(read, prompts), store, model.processor)
        logits = [_logits(model, inputs[i : i + _AT_ONCE]) for i in range(0, len(inputs), _AT_ONCE)]
        log_p = [row for batch in logits for row in batch]
        expected = log_p if expected is None else expected
        del model
        score = None if asked == 0 else _score(directory, file, limit, place)
        kl = np.concatenate([_kl(p, q) for p, q in zip(expected, log_p, strict=True)])
        same = np.concatenate([p.argmax(-1) == q.argmax(-1) for p, q in zip(expected, log_p, strict=True)])
        sizes = _sizes(config, quantization)
        plain = plain or sizes
        quantized = 1.0 if quantization is None else _quantized_ratio(config, quantization)
        ratios = (size / before for size, before in zip(sizes, plain, strict=True))
        kind = PLAIN if quantization is None else quantization.kind
        rows.append(Loss(kind, score, float(kl.mean()), float(kl.max()), float(same.mean()), quantized, *ratios))
    return rows


def _spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """So many of them, from the first to the last: the tasks of a file may stand one after the other."""
    return [samples[i * len(samples) // count] for i in range(min(count, len(samples)))]


def _inputs(samples: Sequence[Sample], store: ImageStore, processor: Processor) -> list[ModelInputs]:
    """The prompts, shortest first."""
    made = [
        processor(list(sample.conversation), [resolve_image(image, store) for image in sample.images])
        for sample in samples
    ]
    return sorted(made, key=lambda inputs: len(inputs.input_ids))


def _logits(model: Any, inputs: Sequence[ModelInputs]) -> list[np.ndarray]:
    """f32[T, V] of each prompt: the log-probabilities after every token."""
    return [np.asarray(jax.nn.log_softmax(logits)) for logits in model.logits(inputs)]


def _kl(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """f32[T], KL(expected ‖ found) of log-probabilities [T, V]."""
    return (np.exp(expected) * (expected - found)).sum(-1)


def _score(directory: str | None, file: Path, limit: int | None, place: Path) -> float:
    with tempfile.TemporaryDirectory(dir=place) as out, contextlib.redirect_stdout(io.StringIO()):
        summary = evaluate(directory, file, EvalOptions(out=Path(out) / "answers", limit=limit, report_samples=0))
    tasks = summary["tasks"].values()
    return sum(task["score"] * task["samples"] for task in tasks) / sum(task["samples"] for task in tasks)


def _sizes(config: Config, quantization: Quantization | None) -> tuple[float, float]:
    """Bytes of all parameters, and that a decode step of one slot reads, in bfloat16 where not quantized."""
    whole = bytes_in_bfloat16(config, quantized_weights(config, quantization))
    return whole, decode_work(config, 1, DECODE_CONTEXT, quantization=quantization).bytes


def _quantized_ratio(config: Config, quantization: Quantization) -> float:
    """Bytes of the weights that are quantized, values and scales, over those of the same in bfloat16."""
    kinds, leaves = quantized_weights(config, quantization), abstract_leaves(config)
    stored = leaves_of(config, kinds).values()
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in stored if dtype is not None) / sum(
        2 * math.prod(leaves[path][0]) for path in kinds
    )


def _print(name: str, rows: Sequence[Loss]) -> None:
    table = Table("weights", title=f"{name}: against its own float32", title_justify="left")
    for column in ("score", "points", "KL", "worst KL", "same token", "× bytes", "of all", "decode"):
        table.add_column(column, justify="right")
    for row in rows:
        scores = ("–", "–")
        if row.score is not None:
            scores = f"{100 * row.score:.2f} %", f"{100 * (row.score - rows[0].score):+.2f}"
        distances = f"{row.kl:.5f}", f"{row.worst_kl:.4f}", f"{100 * row.same:.1f} %"
        table.add_row(row.kind, *scores, *distances, *(f"{x:.3f}" for x in (row.quantized, row.whole, row.decode)))
    PrintableConsole().print(table)
