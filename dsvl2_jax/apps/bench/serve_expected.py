"""What the engine answers alone: the right answers that `dsvl2 bench serve` compares a server's with.

A process of its own, ``python -m dsvl2_jax.apps.bench.serve_expected JOB.json``, which ends before the server starts:
an accelerator need not hold two models. The requests are the same bodies that the server gets; they are read here by
other code than the server's, and answered one at a time, by a scheduler without stores.

Tested in tests/apps/bench/test_serve.py.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dsvl2_jax.errors import DSVL2Error

_SAMPLING = ("temperature", "top_p", "top_k", "seed", "repetition_penalty", "ignore_eos")


@dataclasses.dataclass(frozen=True)
class Expected:
    """An answer; ``logprobs`` is empty where they were not asked for."""

    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[float]


def expected_answers(
    ckpt: str | None, bodies: Sequence[dict[str, Any]], *, slots: int, dtype: str, mesh: str | None, work: Path
) -> list[Expected]:
    """The answers to some requests to /v1/chat/completions.

    Args:
      slots: as the server has them: the same shapes give the same bits.
      work: a folder for what the processes tell each other.

    Raises:
      DSVL2Error: the process failed; its message stands above.
    """
    job, answers = work / "job.json", work / "answers.json"
    content = {"ckpt": ckpt, "bodies": list(bodies), "slots": slots, "dtype": dtype, "mesh": mesh}
    job.write_text(json.dumps(content | {"answers": str(answers)}), encoding="utf-8")
    status = subprocess.run([sys.executable, "-m", __name__, str(job)]).returncode
    if status:
        raise DSVL2Error(f"the answers to compare with: their process ended with status {status}; the reason is above.")
    return [Expected(**answer) for answer in json.loads(answers.read_text(encoding="utf-8"))]


def answer_alone(
    ckpt: str | None, bodies: Sequence[dict[str, Any]], slots: int, dtype: str, mesh: str | None
) -> list[Expected]:
    """The same in this process."""
    from dsvl2_jax.infer.loading import LoadOptions, load
    from dsvl2_jax.infer.request import Request
    from dsvl2_jax.infer.sampling import SamplingParams
    from dsvl2_jax.infer.serve.async_engine import EngineOptions, make_scheduler

    model = load(ckpt, LoadOptions(dtype, mesh))
    scheduler = make_scheduler(model, EngineOptions(slots=slots, prefix_bytes=0, feature_bytes=0))
    eos, answers = model.processor.tokenizer.eos_id, []
    for body in bodies:
        inputs = model.processor(*conversation(body))
        sampling = SamplingParams(**{name: body[name] for name in _SAMPLING if name in body})
        ticket = scheduler.submit(Request(inputs, body["max_tokens"], sampling))
        while not ticket.done:
            scheduler.turn()
        while not scheduler.idle:
            scheduler.turn()
        if ticket.error is not None:
            raise ticket.error
        answer = ticket.answer.generation(inputs, with_logprobs=True)
        pairs = zip(answer.token_ids, answer.logprobs, strict=True) if body.get("logprobs") else ()
        logprobs = [value for token, value in pairs if token != eos]  # the server has no entry for eos
        answers.append(Expected(answer.token_ids, answer.text, answer.finish_reason, logprobs))
    return answers


def conversation(body: dict[str, Any]) -> tuple[list[dict[str, str]], list[Image.Image]]:
    """(turns, pictures) of a request's messages, whose pictures are data URLs."""
    turns, images = [], []
    for message in body["messages"]:
        content = message["content"]
        text = content if isinstance(content, str) else ""
        for part in content if isinstance(content, list) else ():
            if part["type"] == "text":
                text += part["text"]
                continue
            data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
            images.append(Image.open(io.BytesIO(data)).convert("RGB"))
            text += "<image>\n"
        turns.append({"role": message["role"], "content": text})
    return turns, images


def _main(job: Path) -> None:
    content = json.loads(job.read_text(encoding="utf-8"))
    answers = Path(content.pop("answers"))
    found = answer_alone(**content)
    answers.write_text(json.dumps([dataclasses.asdict(answer) for answer in found]), encoding="utf-8")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
