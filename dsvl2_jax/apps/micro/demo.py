"""`dsvl2 demo`: pictures drawn from a seed, questions about them, and the model's answers beside the truth."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsvl2_jax.checkpoint.staging import replacing
from dsvl2_jax.errors import UsageError
from dsvl2_jax.infer.eval import metrics
from dsvl2_jax.infer.loading import LoadOptions, load
from dsvl2_jax.inputs.grounding import Box, draw_boxes
from dsvl2_jax.inputs.processor import ModelInputs
from dsvl2_jax.runtime.timing import Timing

if TYPE_CHECKING:  # drawing needs more than answering does
    from dsvl2_jax.apps.micro.questions import Question

# Of these tasks (see `dsvl2_jax.apps.micro.synthetic.TASKS`) one question each is asked.
ASKED = ("colour and shape", "counting", "position", "digits", "charts", "two images", "caption")
LOCATED = "grounding"


def demo(ckpt: str | None, *, seed: int, out: Path, options: LoadOptions) -> None:
    """Draws pictures that no training has seen, asks about them, streams the answers, and draws answered boxes.

    Args:
      ckpt: None: the bundled model.
      seed: of pictures and questions.
      out: folder for the pictures; ``boxes.png`` is the one with the answered boxes.

    Raises:
      UsageError: the seed is negative, ``out`` cannot be made, or the fonts to draw with are not installed.
    """
    from dsvl2_jax.apps.micro import synthetic

    if seed < 0:
        raise UsageError(f"--seed {seed}: expected 0 or a positive whole number.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be made ({error.strerror}); name a folder.") from None
    timing = Timing()
    with timing.phase("load"):
        model = load(ckpt, options)
    tokens = right = 0
    for number, task in enumerate((*ASKED, LOCATED)):
        rng = np.random.default_rng((synthetic.DEMO, seed, number))
        sample = synthetic.task_sample(rng, task)
        question = sample.questions[0]
        files = []
        for i, picture in enumerate(sample.pictures):
            files.append(out / f"{task.replace(' ', '-')}-{i}.png")
            with replacing(files[-1]) as new:
                picture.draw().save(new, "PNG")
        turn = {**sample.conversation()[0], "images": files}
        inputs: ModelInputs = model.processor([turn])
        print(f"\n{' '.join(map(str, files))}\n  {question.text}\n  → ", end="", flush=True)
        answer = model.generate(inputs, 128, on_text=lambda _, text: print(text, end="", flush=True), timing=timing)
        ok, said = _judge(question, answer.text, answer.boxes)
        print(f"\n  {'✓' if ok else '✗'} {said}")
        tokens += len(answer.token_ids) - 1  # the first comes from prefill
        right += ok
        if task == LOCATED:
            true = [Box("truth", *box) for box in question.boxes]
            with replacing(out / "boxes.png") as new:
                draw_boxes(sample.pictures[-1].draw(), [*answer.boxes, *true]).save(new, "PNG")
    seconds = timing.get("decode", 0.0)
    print(
        f"\n{right} of {len(ASKED) + 1} right; boxes are drawn into {out / 'boxes.png'}; --seed draws other pictures."
    )
    speed = f", {tokens / seconds:.0f} tokens/s" if seconds else ""
    print(
        f"load {timing.get('load', 0.0):.1f} s, compile {timing.get('compile', 0.0):.1f} s, encode "
        f"{timing.get('encode', 0.0):.2f} s, prefill {timing.get('prefill', 0.0):.2f} s, decode {seconds:.2f} s{speed}",
        file=sys.stderr,
    )


def _judge(question: Question, text: str, boxes: Sequence[Box]) -> tuple[bool, str]:
    """Whether an answer is right, and what the truth is. Boxes are right from an IoU of 0.5 on."""
    if question.metric == "iou":
        overlap = metrics.boxes_iou([(box.x1, box.y1, box.x2, box.y2) for box in boxes], question.boxes)
        return overlap >= metrics.IOU_THRESHOLD, f"overlap with the true box: IoU {overlap:.2f}"
    if question.metric == "facts":
        score = metrics.facts(text, question.facts)
        return score == 1, f"{score:.0%} of what is to see: {question.answer}"
    return metrics.exact(text, [question.answer]) == 1, f"truth: {question.answer}"
