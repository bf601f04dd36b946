"""What a training configuration's values must be, beyond their types. `dsvl2_jax.train.settings.schema` asks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dsvl2_jax.errors import UsageError
from dsvl2_jax.messages import did_you_mean

if TYPE_CHECKING:
    from dsvl2_jax.train.settings.schema import DataSettings, Settings, StageSettings

Path = tuple[str | int, ...]  # keys, and the index in an array
Problem = tuple[Path, str]

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "model.size": ("any", "tiny", "small", "base"),
    "data.too_long": ("skip", "truncate"),
    "stage.objective": ("language", "contrastive", "regions"),
    "optimizer.schedule": ("cosine", "step", "constant"),
    "optimizer.state_dtype": ("float32", "bfloat16"),
    "compute.dtype": ("bfloat16", "float32"),
    "compute.remat": ("none", "dots", "full"),
}
_POSITIVE = ("positive", lambda x: x > 0)
_NOT_NEGATIVE = ("0 or more", lambda x: x >= 0)
_SHARE = ("between 0 and 1", lambda x: 0 <= x <= 1)
_MOMENT = ("at least 0 and below 1", lambda x: 0 <= x < 1)
_RANGES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "data.sequence_length": ("2 or more", lambda x: x >= 2),
    "data.tiles_per_sequence": _NOT_NEGATIVE,
    "data.max_segments": _POSITIVE,
    "data.packing_bins": _POSITIVE,
    "data.workers": _NOT_NEGATIVE,
    "data.streams": _POSITIVE,
    "data.max_broken_share": _SHARE,
    "batch.sequences": _POSITIVE,
    "batch.microbatch_size": _POSITIVE,
    "stage.balance_loss_weight": _NOT_NEGATIVE,
    "stage.bias_update_speed": _NOT_NEGATIVE,
    "contrastive.text_layers": _POSITIVE,
    "contrastive.text_length": ("2 or more", lambda x: x >= 2),
    "contrastive.phrases": _POSITIVE,
    "contrastive.different_phrases": _POSITIVE,
    "contrastive.initial_scale": _POSITIVE,
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.warmup_steps": _NOT_NEGATIVE,
    "optimizer.final_rate": _SHARE,
    "optimizer.beta1": _MOMENT,
    "optimizer.beta2": _MOMENT,
    "optimizer.epsilon": _POSITIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.clip_norm": _NOT_NEGATIVE,
    "compute.loss_chunk": _POSITIVE,
    "run.steps": _POSITIVE,
    "run.seed": ("from 0 to 4294967295", lambda x: 0 <= x < 2**32),
    "run.checkpoint_every": _POSITIVE,
    "run.keep_last": _POSITIVE,
    "run.validate_every": _POSITIVE,
    "run.validation_steps": _POSITIVE,
    "run.log_every": _POSITIVE,
}


def fields(settings: Settings, leaves: Mapping[str, Any]) -> Iterator[Problem]:
    """Names, ranges, and what must be given: one field at a time.

    Args:
      leaves: every field's value by its dotted name.
    """
    for name, allowed in _CHOICES.items():
        if leaves[name] not in allowed:
            yield _path(name), f"{leaves[name]!r} is none of {', '.join(allowed)}{did_you_mean(leaves[name], allowed)}"
    for name, (text, holds) in _RANGES.items():
        if not holds(leaves[name]):
            yield _path(name), f"must be {text}, not {leaves[name]}."
    for name, example in (("model.checkpoint", "deepseek-ai/deepseek-vl2-tiny"), ("run.directory", "runs/my-run")):
        if not leaves[name]:
            yield _path(name), f"must be given, as in {name}={example}"
    yield from _sources(settings.data)
    yield from _stage(settings.stage)


def _sources(data: DataSettings) -> Iterator[Problem]:
    if not data.train:
        yield ("data", "train"), "no data set is left to train on; name one, as in data.train.mine.path=my.jsonl"
    for part, sources in (("train", data.train), ("validation", data.validation)):
        for name, source in sources.items():
            if not source.path:
                field = f"data.{part}.{name}"
                without = f", or leave the data set out by {field}.weight=0" if part == "train" else ""
                yield ("data", part, name, "path"), f"must be given, as in {field}.path=my.jsonl{without}"
            if source.weight < 0:
                yield ("data", part, name, "weight"), f"must not be negative, not {source.weight}."


def _stage(stage: StageSettings) -> Iterator[Problem]:
    if not stage.parameters:
        yield ("stage", "parameters"), "no rule; every parameter needs one. The presets have tables to start from."
    elif not any(rule.train for rule in stage.parameters):
        yield ("stage", "parameters"), "no rule trains anything."
    for i, rule in enumerate(stage.parameters):
        where = ("stage", "parameters", i)
        if not rule.match:
            yield (*where, "match"), "must be given: a regular expression for parameter paths ('.' for all)."
        try:
            re.compile(rule.match)
        except re.error as error:
            yield (*where, "match"), f"{rule.match!r} is not a regular expression: {error}."
        if rule.lr_multiplier <= 0:
            yield (
                (*where, "lr_multiplier"),
                f"must be positive, not {rule.lr_multiplier}; to freeze parameters say train = false.",
            )


def together(settings: Settings) -> Iterator[Problem]:
    """Fields that must fit each other."""
    from dsvl2_jax.sharding import batch_parts, parse_mesh

    batch, run, shards = settings.batch, settings.run, 1
    try:
        shards = batch_parts(parse_mesh(settings.compute.mesh))
    except UsageError as error:
        yield ("compute", "mesh"), str(error).removeprefix("--mesh: ")
    if batch.microbatch_size > 0 and batch.sequences % (batch.microbatch_size * shards):
        parts = f" × {shards} data shards" if shards > 1 else ""
        unit = f"microbatch_size = {batch.microbatch_size}{parts}"
        yield ("batch", "sequences"), f"{batch.sequences} is no multiple of {unit}."
    if settings.data.streams > 0 and batch.sequences % settings.data.streams:
        yield ("data", "streams"), f"{settings.data.streams} does not divide batch.sequences = {batch.sequences}."
    warmup = settings.optimizer.warmup_steps
    if warmup >= run.steps > 0:
        yield ("optimizer", "warmup_steps"), f"must be less than run.steps = {run.steps}, not {warmup}."
    if run.profile:
        match = re.fullmatch(r"(\d+):(\d+)", run.profile)
        if not match or not 1 <= int(match[1]) <= int(match[2]) <= run.steps:
            expected = f"must be FIRST:LAST with 1 ≤ FIRST ≤ LAST ≤ run.steps = {run.steps}"
            yield ("run", "profile"), f"{expected}, as in 3:5, not {run.profile!r}."


def _path(name: str) -> Path:
    return tuple(name.split("."))
