"""`dsvl2 bench generate`: load time and generation speed of a checkpoint on this machine."""

from __future__ import annotations

import dataclasses
import statistics
import time

import jax
import numpy as np
from PIL import Image

from dsvl2_jax.apps.bench.measure import machine, need_at_least, own_bytes
from dsvl2_jax.checkpoint.locate import resolve
from dsvl2_jax.infer.loading import LoadOptions, load
from dsvl2_jax.runtime.timing import Timing

RUNS = 3


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


def bench_generate(
    ckpt: str | None, *, dtype: str = "float32", mesh: str | None = None, new_tokens: int = 32
) -> GenerateBench:
    """Loads a checkpoint, answers one image question several times greedily, and prints medians.

    The image fits one tile, so that the prompt has two (its global and its local view). The first run compiles
    and is not counted.

    Raises:
      UsageError: fewer than two new tokens. Also what loading raises.
    """
    need_at_least("--new-tokens", new_tokens, 2)  # the first comes from prefill
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
    )
    _print(result, dtype)
    return result


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
    print(f"peak memory        {result.peak_bytes / 2**30:.2f} GiB resident")
    print(f"medians of {RUNS} runs after one warm-up")
