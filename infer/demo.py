"""`dsvl2 demo`: pictures drawn from a seed, questions about them, and the model's answers beside the truth."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np

from dsvl2_jax.errors import UsageError
from dsvl2_jax.grounding import Box, draw_boxes
from dsvl2_jax.infer import commands, metrics
from dsvl2_jax.infer.timing import Timing
from dsvl2_jax.processor import ModelInputs

# Of these tasks (see `dsvl2_jax.train.synthetic.TASKS`) one question each is asked.
ASKED = ("colour and shape", "counting", "position", "digits", "charts", "two images", "caption")
LOCATED = "grounding"


def demo(ckpt: str | None, *, seed: int, out: Path, options: commands.LoadOptions) -> None:
    """Draws pictures that no training has seen, asks about them, streams the answers, and draws answered boxes.

    Args:
      ckpt: None: the bundled model.
      seed: of pictures and questions.
      out: folder for the pictures; ``boxes.png`` is the one with the answered boxes.

    Raises:
      UsageError: the seed is negative, or the fonts to draw with are not installed.
    """
    from dsvl2_jax.train import synthetic

    if seed < 0:
        raise UsageError(f"--seed {seed}: expected 0 or a positive whole number.")
    out.mkdir(parents=True, exist_ok=True)
    timing = Timing()
    with timing.phase("load"):
        model = commands.load(ckpt, options)
    tokens = right = 0
    for number, task in enumerate((*ASKED, LOCATED)):
        rng = np.random.default_rng((synthetic.DEMO, seed, number))
        sample = synthetic.task_sample(rng, task)
        question = sample.questions[0]
        files = []
        for i, picture in enumerate(sample.pictures):
            files.append(out / f"{task.replace(' ', '-')}-{i}.png")
            picture.draw().save(files[-1])
        turn = {**sample.conversation()[0], "images": files}
        inputs: ModelInputs = model.processor([turn])
        print(f"\n{' '.join(map(str, files))}\n  {question.text}\n  → ", end="", flush=True)
        answer = model.generate(inputs, 128, on_text=lambda _, text: print(text, end="", flush=True), timing=timing)
        score, said = _judge(question, answer.text, answer.boxes)
        print(f"\n  {'✓' if score else '✗'} {said}")
        tokens += len(answer.token_ids) - 1  # the first comes from prefill
        right += bool(score)
        if task == LOCATED:
            true = [Box("truth", *box) for box in question.boxes]
            draw_boxes(sample.pictures[-1].draw(), [*answer.boxes, *true]).save(out / "boxes.png")
    seconds = timing.get("decode", 0.0)
    print(f"\n{right} of {len(ASKED) + 1} right; boxes are drawn into {out / 'boxes.png'}; --seed draws other pictures.")
    speed = f", {tokens / seconds:.0f} tokens/s" if seconds else ""
    print(
        f"load {timing.get('load', 0.0):.1f} s, compile {timing.get('compile', 0.0):.1f} s, encode "
        f"{timing.get('encode', 0.0):.2f} s, prefill {timing.get('prefill', 0.0):.2f} s, decode {seconds:.2f} s{speed}",
        file=sys.stderr,
    )


def _judge(question: object, text: str, boxes: list[Box]) -> tuple[float, str]:
    """(1 for a right answer, else less; what the truth is)."""
    if question.metric == "iou":
        overlap = max(
            (metrics.iou(dataclasses.astuple(box)[1:5], question.boxes[0]) for box in boxes[:1]), default=0.0
        )
        return float(overlap >= metrics.IOU_THRESHOLD), f"overlap with the true box: IoU {overlap:.2f}"
    if question.metric == "facts":
        score = metrics.facts(text, question.facts)
        return float(score == 1), f"{score:.0%} of what is to see: {question.answer}"
    return metrics.exact(text, [question.answer]), f"truth: {question.answer}"
