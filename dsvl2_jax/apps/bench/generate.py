"""`dsvl2 bench generate`: load time and generation speed of a checkpoint on this machine.

Tested in tests/apps/cli/test_main.py.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from dsvl2_jax import configs
from dsvl2_jax.apps.bench.measure import machine, need_at_least, own_bytes
from dsvl2_jax.checkpoint.locate import resolve
from dsvl2_jax.infer.answer import Generation
from dsvl2_jax.infer.engine import Model
from dsvl2_jax.infer.loading import LoadOptions, load
from dsvl2_jax.infer.speculation import check_drafts
from dsvl2_jax.runtime.timing import Timing

RUNS = 3
DRAFT_RUNS = 9  # of each side; they are short


@dataclasses.dataclass(frozen=True)
class DraftBench:
    """Answering by the text itself, against answering without it: the same tokens, in turns."""

    drafts: int  # tokens that a step drafts at most
    tokens: int  # of the answer
    repeated: bool  # the answer is the one that the prompt has
    same_tokens: bool  # as without drafts
    drafted: int
    accepted: int
    tokens_per_second: float
    tokens_per_second_without: float


@dataclasses.dataclass(frozen=True)
class GenerateBench:
    """Medians over the runs, in seconds; memory is resident, in bytes."""

    checkpoint: str
    parameters: int
    load_seconds: float
    compile_seconds: float
    tiles: int
    encode_seconds: float
    prompt_tokens: int
    prefill_seconds: float
    decode_tokens_per_second: float | None  # None: the first token ended the answer
    peak_bytes: int
    with_drafts: DraftBench | None = None


def bench_generate(
    ckpt: str | None, *, dtype: str = "float32", mesh: str | None = None, new_tokens: int = 32, speculate: int = 0
) -> GenerateBench:
    """Loads a checkpoint, answers one image question several times greedily, and prints medians.

    The image fits one tile, so that the prompt has two (its global and its local view). The first run compiles
    and is not counted.

    With ``speculate``, a description of a bar chart is then asked for again, with the first one in the prompt: text
    that is to be repeated, by a model that can.

    Raises:
      UsageError: fewer than two new tokens, or ``speculate`` is out of range. Also what loading raises.
    """
    need_at_least("--new-tokens", new_tokens, 2)  # the first comes from prefill
    check_drafts("--speculate", speculate)
    started = time.perf_counter()
    model = load(ckpt, LoadOptions(dtype, mesh))
    load_seconds = time.perf_counter() - started
    noise = np.random.default_rng(0).integers(0, 256, (model.processor.config.tile_size,) * 2 + (3,), np.uint8)
    message = {"role": "user", "content": "<image>\nDescribe this image.", "images": [Image.fromarray(noise)]}
    inputs = model.processor([message])
    warm_up = Timing()
    model.generate(inputs, new_tokens, timing=warm_up)
    timings, speeds = [], []
    for _ in range(RUNS):
        timing = Timing()
        decoded = len(model.generate(inputs, new_tokens, timing=timing).token_ids) - 1
        timings.append(timing)
        if decoded:
            speeds.append(decoded / timing["decode"])
    result = GenerateBench(
        checkpoint=str(resolve(ckpt)),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(model.params)),
        load_seconds=load_seconds,
        compile_seconds=warm_up["compile"],
        tiles=len(inputs.tiles),
        encode_seconds=statistics.median(timing["encode"] for timing in timings),
        prompt_tokens=len(inputs.input_ids),
        prefill_seconds=statistics.median(timing["prefill"] for timing in timings),
        decode_tokens_per_second=statistics.median(speeds) if speeds else None,
        peak_bytes=own_bytes("VmHWM"),
        with_drafts=_bench_drafts(model, new_tokens, speculate) if speculate else None,
    )
    _print(result, dtype)
    return result


def _bench_drafts(model: Model, new_tokens: int, drafts: int) -> DraftBench | None:
    """None: the first token ended the answer."""
    picture = Path(configs.__file__).parent / "images" / "chart.png"
    turn = {"role": "user", "content": "<image>\nDescribe the image.", "images": [picture]}
    first = model.generate(model.processor([turn]), new_tokens)
    again = {"role": "user", "content": "Describe the image."}
    inputs = model.processor([turn, {"role": "assistant", "content": first.text}, again])
    answers: dict[int, Generation] = {}
    speeds: dict[int, list[float]] = {0: [], drafts: []}
    for run in range(1 + DRAFT_RUNS):
        for count, of_count in speeds.items():
            timing = Timing()
            answers[count] = model.generate(inputs, new_tokens, speculate=count, timing=timing)
            decoded = len(answers[count].token_ids) - 1
            if not decoded:
                return None
            if run:  # the first compiles
                of_count.append(decoded / timing["decode"])
    plain, drafted = answers[0], answers[drafts]
    return DraftBench(
        drafts=drafts,
        tokens=len(drafted.token_ids),
        repeated=plain.text == first.text,
        same_tokens=drafted.token_ids == plain.token_ids,
        drafted=drafted.drafted_tokens,
        accepted=drafted.accepted_tokens,
        tokens_per_second=statistics.median(speeds[drafts]),
        tokens_per_second_without=statistics.median(speeds[0]),
    )


def _print(result: GenerateBench, dtype: str) -> None:
    speed = result.decode_tokens_per_second
    print(machine())
    print(f"model              {result.checkpoint}")
    print(f"parameters         {result.parameters:,} in {dtype}")
    print(f"load               {result.load_seconds:.1f} s")
    print(f"compile            {result.compile_seconds:.1f} s (once, then from the persistent cache)")
    print(f"encode             {result.encode_seconds:.2f} s for {result.tiles} tiles")
    print(f"prefill            {result.prefill_seconds:.2f} s for {result.prompt_tokens} tokens")
    print(f"decode             {'no second token' if speed is None else f'{speed:.2f} tokens/s'}")
    if (again := result.with_drafts) is not None:
        gain = again.tokens_per_second / again.tokens_per_second_without
        words = (
            f"{again.tokens_per_second_without:.2f} tokens/s, with {again.drafts} drafts {again.tokens_per_second:.2f}"
        )
        print(f"asked again        {words} ({gain:.2f} x, medians of {DRAFT_RUNS} in turns)")
        kind = "the one in the prompt" if again.repeated else "another than the one in the prompt"
        same = "the same tokens" if again.same_tokens else "OTHER TOKENS"
        print(f"                   {again.tokens} tokens, {kind}; {same} with drafts as without")
        print(f"                   {again.accepted} of {again.drafted} drafted tokens were right")
    print(f"peak memory        {result.peak_bytes / 2**30:.2f} GiB resident")
    print(f"medians of {RUNS} runs after one warm-up")
