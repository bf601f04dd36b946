"""`dsvl2 bench generate`: load time and generation speed of a checkpoint on this machine."""

from __future__ import annotations

import resource
import statistics
import time

import jax
import numpy as np
from PIL import Image

from dsvl2_jax.errors import UsageError
from dsvl2_jax.infer.loading import LoadOptions, load
from dsvl2_jax.runtime.timing import Timing

RUNS = 3


def bench_generate(ckpt: str | None, *, dtype: str = "float32", mesh: str | None = None, new_tokens: int = 32) -> None:
    """Loads a checkpoint, answers one image question several times greedily, and prints medians.

    The image fits one tile, so that the prompt has two (its global and its local view). The first run compiles
    and is not counted.
    """
    if new_tokens < 2:
        raise UsageError(f"--new-tokens: found {new_tokens}, expected at least 2 to time decoding.")
    started = time.perf_counter()
    model = load(ckpt, LoadOptions(dtype, mesh))
    loading = time.perf_counter() - started
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    noise = np.random.default_rng(0).integers(0, 256, (model.processor.config.tile_size,) * 2 + (3,), np.uint8)
    message = {"role": "user", "content": "<image>\nDescribe this image.", "images": [Image.fromarray(noise)]}
    inputs = model.processor([message])
    warm_up = Timing()
    model.generate(inputs, new_tokens, timing=warm_up)
    runs = []
    for _ in range(RUNS):
        timing = Timing()
        answer = model.generate(inputs, new_tokens, timing=timing)
        runs.append((timing["encode"], timing["prefill"], timing.get("decode", 0.0), len(answer.token_ids) - 1))
    encode, prefill = (statistics.median(run[i] for run in runs) for i in (0, 1))
    speeds = [run[3] / run[2] for run in runs if run[3]]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"parameters         {parameters:,} in {dtype}")
    print(f"load               {loading:.1f} s")
    print(f"compile            {warm_up['compile']:.1f} s (once, then from the persistent cache)")
    print(f"encode             {encode:.2f} s for {len(inputs.tiles)} tiles")
    print(f"prefill            {prefill:.2f} s for {len(inputs.input_ids)} tokens")
    print(
        f"decode             {statistics.median(speeds):.2f} tokens/s" if speeds else "decode             eos at once"
    )
    print(f"peak memory        {peak:.2f} GiB resident")
    print(f"medians of {RUNS} runs after one warm-up")
