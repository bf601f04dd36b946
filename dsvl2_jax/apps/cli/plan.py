"""`dsvl2 plan`: what fits where, and how fast it can be there."""

from __future__ import annotations

from typing import Literal

from tyro.conf import Positional

from dsvl2_jax.apps.cli.options import Settings, needs_train_extra


def plan(
    model: Positional[str] = "micro",
    *,
    topology: str | None = None,
    job: Literal["prefill", "decode", "encode", "align", "pretrain", "sft"] | None = None,
    batch: int | None = None,
    sequence: int | None = None,
    slots: int | None = None,
    micro: int | None = None,
    set: Settings = (),
    mesh: str = "auto",
    no_cache: bool = False,
    json: bool = False,
) -> int:
    """Compile a job for TPUs or GPUs, without having one, and say whether it fits and how fast it can be.

    Without a topology: a row for each of the usual ones. Needs the compiler, pip install -e '.[tpu]' or '.[cuda]'; what
    can be said without it is said. Exit status 1 when the job does not fit the topology.

    Args:
        model: tiny, small, base, micro, a checkpoint, or a config.json.
        topology: as v5e-16, v5p-8, v6e-8, tpu7x-8, h100-8 or h200-1; without it, a table of them.
        job: what to compile: inference, or the training step of a preset. Without it decode; in the table prefill too.
        batch: prompts of a prefill (8), tiles to encode (32), or sequences of a training step (the preset's).
        sequence: tokens of a prompt or training sequence, or that the cache has room for (4096).
        slots: rows that decode together (64).
        micro: sequences that a data shard trains on at a time (the preset's).
        set: a setting of the preset, such as compute.remat=dots; may be given several times.
        mesh: as data=2,tensor=2,expert=4; auto chooses one and says why.
        no_cache: compile even what was compiled before.
        json: print everything as JSON.
    """
    from dsvl2_jax.apps.plan.report import run

    with needs_train_extra():
        return run(
            model,
            topology,
            job,
            batch=batch,
            sequence=sequence,
            slots=slots,
            micro=micro,
            overrides=set,
            mesh=mesh,
            cache=not no_cache,
            as_json=json,
        )
