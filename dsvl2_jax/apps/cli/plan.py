"""`dsvl2 plan`: what fits where, and how fast it can be there.

Tested in tests/apps/plan/test_planner.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from dsvl2_jax.apps.cli.options import CacheDtype, QuantizeRules, QuantizeTo, Settings, needs_train_extra

Models = Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[MODEL ...]")]]


def plan(
    models: Models = ("micro",),
    *,
    topology: str | None = None,
    job: Literal["prefill", "chunk", "decode", "encode", "align", "pretrain", "sft", "lora"] | None = None,
    batch: int | None = None,
    sequence: int | None = None,
    slots: int | None = None,
    micro: int | None = None,
    set: Settings = (),
    quantize: QuantizeTo | None = None,
    rule: QuantizeRules = (),
    cache_dtype: CacheDtype | None = None,
    mesh: str = "auto",
    csv: Path | None = None,
    profile: bool = False,
    no_cache: bool = False,
    json: bool = False,
) -> int:
    """Compile a job for TPUs or GPUs, without having one, and say whether it fits and how fast it can be.

    Without a topology: a row for each of the usual ones. Needs the compiler, pip install -e '.[tpu]' or '.[cuda]'; what
    can be said without it is said. Exit status 1 when the job does not fit the topology.

    Args:
        models: tiny, small, base, micro, a checkpoint, or a config.json; one or several.
        topology: as v5e-16, v5p-8, v6e-8, tpu7x-8, h100-8 or h200-1; without it, a table of them.
        job: what to compile: inference, or the training step of a preset. Without it decode; in the table prefill too.
        batch: prompts of a prefill (8), tiles to encode (32), or sequences of a training step (the preset's).
        sequence: tokens of a prompt or training sequence, or positions of the cache (4096); of a chunk, those of its
            prompt, whose last 512 it is.
        slots: sequences that decode together (64).
        micro: sequences that a data shard trains on at a time (the preset's).
        set: a setting of the preset, such as compute.remat=dots; may be given several times.
        quantize: the weights of inference, or of the model beside an adapter, in 8 or 4 bits, as dsvl2 convert makes
            them.
        rule: where weights are quantized, how those of some paths are kept, as dsvl2 convert has it. May be given
            several times.
        cache_dtype: of the cache of prefill and decode; bfloat16 without it.
        mesh: as data=2,tensor=2,expert=4; auto chooses one and says why.
        csv: put the rows of the table into this file, in the place of older ones of the same model and job.
        profile: print, named scope by named scope, launches, FLOPs and bytes of the topology's program, and each one's
            share of the time at the device's peak speeds.
        no_cache: compile even what was compiled before.
        json: print everything as JSON.
    """
    from dsvl2_jax.apps.plan.command import run_plan
    from dsvl2_jax.model.quantization import quantization_of

    with needs_train_extra():
        return run_plan(
            models,
            topology,
            job,
            batch=batch,
            sequence=sequence,
            slots=slots,
            micro=micro,
            overrides=set,
            quantization=quantization_of(quantize, rule),
            cache_dtype=cache_dtype,
            mesh=mesh,
            csv=csv,
            cache=not no_cache,
            profile=profile,
            as_json=json,
        )
