"""Answers of a model that is loaded here; on several processes together.

Tested in tests/infer/eval/test_evaluate.py.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dsvl2_jax.checkpoint import locate
from dsvl2_jax.checkpoint.digests import files_below
from dsvl2_jax.checkpoint.locate import PARAMS_NAME, RUN_NAME, model_files
from dsvl2_jax.checkpoint.remote import is_remote
from dsvl2_jax.errors import ConversationError, DSVL2Error
from dsvl2_jax.infer.answer import Generation
from dsvl2_jax.infer.engine import Model
from dsvl2_jax.infer.eval.answers import Questions, Result, answered, unanswered
from dsvl2_jax.infer.eval.results import DIGEST
from dsvl2_jax.infer.eval.samples import Sample
from dsvl2_jax.infer.loading import LoadOptions, load
from dsvl2_jax.infer.request import Request
from dsvl2_jax.inputs.processor import Processor, image_tokens
from dsvl2_jax.inputs.visuals import Picture
from dsvl2_jax.runtime import processes

_THREADS = 2  # that read and tile images while the device is busy
_AHEAD = 3  # pieces of the questions that may be ready
_PIECE, _PIECES = 64 << 10, 1024  # bytes, number: what is read of a large file


class LoadedModel:
    """A checkpoint as the source of answers (`dsvl2_jax.infer.eval.answers.Source`).

    Among several processes it is in process 0, and the others `follow` it.
    """

    def __init__(
        self,
        ckpt: str | None,
        options: LoadOptions,
        *,
        max_new_tokens: int,
        batch_size: int,
        speculate: int,
    ):
        """Finds the checkpoint; see `dsvl2_jax.infer.eval.evaluate.EvalOptions` for the options.

        Raises CheckpointError or UsageError when there is none, or no adapter where one is wanted.
        """
        self._ckpt, self._options = ckpt, options
        self._max_new_tokens, self._batch_size, self._speculate = max_new_tokens, batch_size, speculate
        self._directory = locate.resolve(ckpt)
        self._adapter = None if options.adapter is None else locate.find_adapter(options.adapter)
        self._model: Model | None = None  # until it is loaded
        self.name = "bundled" if ckpt is None else checkpoint_name(self._directory)
        if self._adapter is not None:
            step = self._adapter.parent  # of the run, where the adapter is one's
            self.name += f"+{checkpoint_name(self._adapter if locate.run_of(step) is None else step)}"

    def identity(self) -> dict[str, Any]:
        identity = {"checkpoint": {"name": self.name, "digest": checkpoint_digest(self._directory)}}
        if self._adapter is not None:
            identity["adapter"] = {"digest": checkpoint_digest(self._adapter)}
        return identity

    def summary(self) -> dict[str, Any]:
        return {"checkpoint": self.name}

    def start(self, *, needed: bool) -> None:
        """Loads the model if it is needed, in the other processes too."""
        if processes.from_first(lambda: needed):
            self._model = load(self._ckpt, self._options)

    def answer(self, questions: Questions) -> None:
        """Asks the largest samples first, so that a lack of memory shows at once."""
        model = self._model
        sizes = {sample.line: prompt_size(sample, model.processor) for sample in questions.samples}
        ordered = sorted(questions.samples, key=lambda sample: sizes[sample.line], reverse=True)

        def prepare(sample: Sample) -> _Prepared:
            asked = questions.images(sample)
            images = [Picture(one.image, own) for one, own in zip(asked, sample.budgets, strict=True)]
            try:
                inputs = model.processor(list(sample.conversation), images, **sample.budget._asdict())
            except DSVL2Error as error:
                raise questions.unusable(sample, error) from error
            try:
                model.check_context(inputs)
            except ConversationError as error:
                return _Prepared(sample, None, str(error))
            return _Prepared(sample, Request(inputs, self._max_new_tokens))

        asked: list[Sample] = []  # the samples of the requests, by their index

        def requests() -> Iterator[Request]:
            for prepared in _prefetched(_pieces(ordered, self._batch_size), prepare):
                questions.keep([unanswered(p.sample, p.error) for p in prepared if p.request is None])
                able = [p for p in prepared if p.request is not None]
                processes.from_first(lambda able=able: [p.request for p in able])
                for p in able:
                    asked.append(p.sample)
                    yield p.request
            processes.from_first(lambda: None)  # there is no more

        for index, news in model.answers(requests(), self._batch_size, speculate=self._speculate):
            if isinstance(news, Generation):
                questions.keep([_result(asked[index], news)])
            elif isinstance(news, DSVL2Error):
                questions.keep([unanswered(asked[index], str(news), again=True)])


def follow(ckpt: str | None, options: LoadOptions, batch_size: int, speculate: int) -> None:
    """What the other processes do while the `LoadedModel` of process 0 answers: the same turns."""
    if processes.from_first(bool):
        model = load(ckpt, options)

        def requests() -> Iterator[Request]:
            while (work := processes.from_first(lambda: None)) is not None:
                yield from work

        for _ in model.answers(requests(), batch_size, speculate=speculate):
            pass


def _pieces(samples: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def checkpoint_name(directory: Path) -> str:
    """A short name of a checkpoint's directory, for people and for the results' folder."""
    directory = directory if is_remote(directory) else directory.resolve()
    if (directory.parent.parent / RUN_NAME).is_file():  # a run's checkpoints/STEP
        return f"{directory.parent.parent.name}-{directory.name}"
    if directory.parent.name == "snapshots":  # the hub's cache: models--OWNER--NAME/snapshots/COMMIT
        return directory.parent.parent.name.rpartition("--")[2]
    return directory.name


def checkpoint_digest(directory: Path) -> str:
    """16 hexadecimal digits that differ where checkpoints or adapters do: names, sizes and contents of their files.

    Of a large file, pieces spread evenly over it are read.

    Args:
      directory: as `dsvl2_jax.checkpoint.locate.resolve` or `find_adapter` returns it.
    """
    params = directory / PARAMS_NAME
    files = [params / name for name in files_below(params)] if params.is_dir() else _weight_files(directory)
    names_and_files = [(str(p.relative_to(directory)), p) for p in files]
    names_and_files += [(p.name, p) for p in model_files(directory).glob("*.json")]
    digest = hashlib.sha256()
    for name, file in sorted(names_and_files):
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as opened:
            for piece in range(min(_PIECES, -(-size // _PIECE))):
                opened.seek(piece * _PIECE if size <= _PIECES * _PIECE else piece * (size - _PIECE) // (_PIECES - 1))
                digest.update(opened.read(_PIECE))
    return digest.hexdigest()[:DIGEST]


def _weight_files(directory: Path) -> list[Path]:
    return [*directory.glob("*.safetensors"), *directory.glob("*.bin")]


def prompt_size(sample: Sample, processor: Processor) -> tuple[int, int]:
    """(tiles, tokens) of a sample's prompt, from its texts and the sizes of its images; the template not counted."""
    config = processor.config
    tiles = 0
    tokens = sum(len(processor.tokenizer.encode(turn["content"])) for turn in sample.conversation)
    budget = sample.budget.over(processor.budget)
    for size, own in zip(sample.sizes, sample.budgets, strict=True):
        cols, rows = processor.grid(size, len(sample.sizes), own, budget)
        tiles += 1 + cols * rows
        tokens += image_tokens(cols, rows, config.tokens_per_side)
    return tiles, tokens


@dataclasses.dataclass(frozen=True)
class _Prepared:
    sample: Sample
    request: Request | None  # None: the prompt cannot be answered
    error: str = ""


def _result(sample: Sample, generation: Generation) -> Result:
    details = {
        "finish_reason": generation.finish_reason,
        "prompt_tokens": generation.prompt_tokens,
        "image_tokens": generation.image_tokens,
        "answer_tokens": len(generation.token_ids),
    }
    return answered(sample, generation.text, generation.boxes, details)


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
