"""An engine with `AsyncEngine`'s interface that answers one request after the other by `Model.generate`.

The HTTP side is tested against it: its answers are the model's own, and it can be told to refuse or to fail.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import dataclasses
import io
import time
from collections.abc import Callable

import jax
import numpy as np
from PIL import Image

from dsvl2_jax.infer.adapters import BASE
from dsvl2_jax.infer.answer import AnswerBuilder
from dsvl2_jax.infer.engine import Model
from dsvl2_jax.infer.request import Delta, FailedError, RefusedError, Request

GROUP = 4  # tokens of a delta


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """As the real engine's."""

    slots: int = 8
    prefix_bytes: int = 1 << 28
    feature_bytes: int = 1 << 28
    max_queue: int = 256
    max_queued_tokens: int = 1_000_000
    max_tiles: int = 1024
    max_image_tiles: int = 9
    max_wait: float = 300.0


class Answer:
    """Deltas of one request, as the engine's thread makes them."""

    def __init__(self, request: Request):
        self.request = request
        self.cached_tokens = 0
        self.timing: dict[str, float] = {}
        self.prompt_tokens = len(request.inputs.input_ids)
        self.image_tokens = int(request.inputs.image_mask.sum())
        self.cancelled = False
        self.queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()

    def cancel(self) -> None:
        self.cancelled = True

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Delta:
        item = await self.queue.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        return item


class ThreadEngine:
    """See the module. Set `refusal` or `failure` to have requests refused, or fail after `failure[0]` deltas, and
    `pause_after` to have answers stop for a while."""

    def __init__(self, model: Model, options: EngineOptions = EngineOptions()):
        self.model, self.options = model, options
        self.pool = concurrent.futures.ThreadPoolExecutor(2)
        self.health = "ok"
        self.refusal: RefusedError | None = None
        self.failure: tuple[int, Exception] | None = None
        self.gate = asyncio.Event()  # after `pause_after` deltas answers wait for it
        self.pause_after: int | None = None
        self.answers: list[Answer] = []
        self.tasks: set[asyncio.Task] = set()
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    async def start(self, say: Callable[[str], None] = lambda _: None) -> None:
        say("ready")
        self.health = "ok"

    async def stop(self, timeout: float) -> None:
        self.health = "stopping"
        running = [task for task in self.tasks if not task.done()]
        if running:
            await asyncio.wait(running, timeout=timeout)

    def statistics(self) -> dict[str, float]:
        waiting = sum(not task.done() for task in self.tasks)
        return {"num_requests_running": float(min(waiting, 1)), "num_requests_waiting": max(0, waiting - 1), "tiles": 0}

    @property
    def max_image_tiles(self) -> int:
        return self.options.max_image_tiles

    def check_tiles(self, tiles: int) -> None:
        if tiles > self.options.max_tiles:
            raise RefusedError(f"the pictures have {tiles} tiles.", 413)

    def submit(self, request: Request) -> Answer:
        if self.health != "ok":
            raise RefusedError("the server is stopping.", 503, 5.0)
        if self.refusal is not None:
            raise self.refusal
        answer = Answer(request)
        self.answers.append(answer)
        task = asyncio.ensure_future(self._answer(answer))
        self.tasks.add(task)
        return answer

    async def _answer(self, answer: Answer) -> None:
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        try:
            deltas = await loop.run_in_executor(self._thread, self._deltas, answer.request)
            answer.timing |= {"queue": 0.0, "prefill": 0.0, "decode": time.perf_counter() - started}
            for number, delta in enumerate(deltas):
                if self.failure is not None and number == self.failure[0]:
                    raise self.failure[1]
                if self.pause_after == number:
                    await self.gate.wait()
                answer.queue.put_nowait(delta)
                await asyncio.sleep(0)
            answer.queue.put_nowait(None)
        except Exception as error:
            answer.queue.put_nowait(error)

    def _deltas(self, request: Request) -> list[Delta]:
        model = self.model
        seed = request.sampling.seed + 1_000_003 * request.choice
        sampling = dataclasses.replace(request.sampling, seed=seed)
        name = None if request.adapter == BASE else model.adapters.names[request.adapter]
        whole = model.generate(request.inputs, request.max_new_tokens, sampling, logprobs=True, adapter=name)
        if not np.isfinite(whole.logprobs).all():
            raise FailedError("the model computed what is no number.", 500)
        tops = self._top_logprobs(request, whole.token_ids)
        builder, deltas = AnswerBuilder(model.processor, sampling), []
        for start in range(0, len(whole.token_ids), GROUP):
            part = slice(start, start + GROUP)
            tokens, values = whole.token_ids[part], whole.logprobs[part]
            last = start + GROUP >= len(whole.token_ids)
            text = builder.extend(np.array(tokens), np.array(values)) + (builder.finish() if last else "")
            wanted = request.top_logprobs is not None
            reason = whole.finish_reason if last else None
            deltas.append(Delta(text, tokens, values if wanted else [], tops[part] if wanted else [], reason))
        return deltas

    def _top_logprobs(self, request: Request, tokens: list[int]) -> list[list[tuple[int, float]]]:
        if not request.top_logprobs:
            return [[] for _ in tokens]
        inputs = request.inputs
        more = len(tokens) - 1
        longer = dataclasses.replace(
            inputs,
            input_ids=np.append(inputs.input_ids, tokens[:-1]).astype(np.int32),
            labels=np.append(inputs.labels, tokens[:-1]).astype(np.int32),
            image_mask=np.append(inputs.image_mask, np.zeros(more, np.bool_)),
            image_index=np.append(inputs.image_index, np.full(more, -1, np.int32)),
        )
        name = None if request.adapter == BASE else self.model.adapters.names[request.adapter]
        logits = self.model.logits(longer, adapter=name)[len(inputs.input_ids) - 1 :]
        values, ids = jax.lax.top_k(jax.nn.log_softmax(logits), request.top_logprobs)
        return [
            list(zip(row_ids, row, strict=True))
            for row_ids, row in zip(np.asarray(ids).tolist(), np.asarray(values).tolist(), strict=True)
        ]


def data_url(image: Image.Image, kind: str = "png") -> str:
    """A picture as requests carry it."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def wait_for(condition: Callable[[], bool]) -> None:
    """Returns once a condition holds that another thread brings about."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within half a minute")
