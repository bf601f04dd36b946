"""What the settings of a run must be beyond each field's own range, which `schema` has.

Tested in tests/train/settings/test_load.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from dsvl2_jax.errors import UsageError
from dsvl2_jax.fields import Path, Problem, literal
from dsvl2_jax.train.settings.schema import DataSettings, Settings, SourceSettings

FUNCTION_NAME = re.compile(r"\w+(\.\w+)*:\w+")  # module:name


def check_sources(data: DataSettings) -> Iterator[Problem]:
    if not data.train:
        yield Problem(
            ("data", "train"), "no data set is left to train on; name one, as in data.train.mine.path=my.jsonl"
        )
    for part, sources in (("train", data.train), ("validation", data.validation)):
        for name, source in sources.items():
            path = ("data", part, name)
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                yield Problem(path, "a data set's name is made of letters, digits, - and _.")
            elif source.function:
                yield from check_function(source, path)
            elif source.count or source.arguments:
                yield Problem((*path, "function"), "must be given with count and arguments, which are a function's.")
            elif not source.path:
                field = f"data.{part}.{name}"
                without = f", or leave the data set out by {field}.weight=0" if part == "train" else ""
                yield Problem((*path, "path"), f"must be given, as in {field}.path=my.jsonl{without}")


def check_function(source: SourceSettings, path: Path) -> Iterator[Problem]:
    """What a data set that a function gives has, and what it has not."""
    if source.path:
        text = "must be left out beside path: a data set is files or what a function gives. Empty one of the two."
        yield Problem((*path, "function"), text)
        return
    if not FUNCTION_NAME.fullmatch(source.function):
        text = f"must be module:name, as in my_package.pictures:record, not {literal(source.function)}."
        yield Problem((*path, "function"), text)
    if source.count < 1:
        text = f"must be positive, not {source.count}: so many records of the function are an epoch."
        yield Problem((*path, "count"), text)
    for name in ("images", "follow_links"):
        if getattr(source, name):
            text = "must be left out beside function, which gives its images themselves and not by name."
            yield Problem((*path, name), text)


def check_rules(settings: Settings) -> Iterator[Problem]:
    stage, path = settings.stage, ("stage", "parameters")
    if settings.adapter.kind != "none":
        yield from _check_adapter(settings)
        return
    if not stage.parameters:
        yield Problem(path, "no rule; every parameter needs one. The presets have tables to start from.")
    elif not any(rule.train for rule in stage.parameters):
        yield Problem(path, "no rule trains anything.")
    for i, rule in enumerate(stage.parameters):
        if not rule.match:
            yield Problem((*path, i, "match"), "must be given: a regular expression for parameter paths ('.' for all).")
        try:
            re.compile(rule.match)
        except re.error as error:
            yield Problem((*path, i, "match"), f"{rule.match!r} is not a regular expression: {error}.")


def _check_adapter(settings: Settings) -> Iterator[Problem]:
    """What an adapter is trained with, and what it is not."""
    stage, kind = settings.stage, settings.adapter.kind
    only = f"adapter.kind = {kind} trains an adapter and leaves the model as it is"
    if stage.parameters:
        yield Problem(("stage", "parameters"), f"{only}: remove the rules, or set adapter.kind = none.")
    if stage.objective != "language":
        yield Problem(("stage", "objective"), f"{only}; the objective {stage.objective} has none.")
    if stage.bias_update_speed:
        yield Problem(("stage", "bias_update_speed"), f"{only}, the routers' biases too: set it to 0.")
    if settings.model.random_init:
        yield Problem(("model", "random_init"), f"{only}, so it needs a model that has learnt something.")
    if not settings.adapter.targets:
        yield Problem(("adapter", "targets"), "no target; leave it out for attention, dense and shared MLPs.")
    for i, target in enumerate(settings.adapter.targets):
        try:
            re.compile(target)
        except re.error as error:
            yield Problem(("adapter", "targets", i), f"{target!r} is not a regular expression: {error}.")


def check_together(settings: Settings) -> Iterator[Problem]:
    """Fields that must fit each other, each of them in its range."""
    from dsvl2_jax.sharding import (
        SEQUENCE,
        batch_parts,
        parse_mesh,
    )  # imports jax, which a command's --help does without

    batch, run, sizes = settings.batch, settings.run, {}
    try:
        sizes = parse_mesh(settings.compute.mesh)
    except UsageError as error:
        yield Problem(("compute", "mesh"), str(error).removeprefix("--mesh: "))
    shards, parts = batch_parts(sizes), sizes.get(SEQUENCE, 1)
    if settings.data.sequence_length % parts:
        text = f"{settings.data.sequence_length} tokens do not divide into the {parts} parts of compute.mesh."
        yield Problem(("data", "sequence_length"), text)
    if parts > 1 and settings.stage.objective != "language":
        text = f"{SEQUENCE}={parts} splits rows of text, which the objective {settings.stage.objective} has none of."
        yield Problem(("compute", "mesh"), text)
    if batch.sequences % (batch.microbatch_size * shards):
        parts = f" × {shards} data shards" if shards > 1 else ""
        unit = f"microbatch_size = {batch.microbatch_size}{parts}"
        yield Problem(("batch", "sequences"), f"{batch.sequences} is no multiple of {unit}.")
    streams = settings.data.streams
    if batch.sequences % streams:
        yield Problem(("data", "streams"), f"{streams} does not divide batch.sequences = {batch.sequences}.")
    yield from _check_tiles(settings.data)
    warmup = settings.optimizer.warmup_steps
    if warmup >= run.steps:
        text = f"must be less than run.steps = {run.steps}, not {warmup}."
        yield Problem(("optimizer", "warmup_steps"), text)
    if run.profile:
        match = re.fullmatch(r"(\d+):(\d+)", run.profile)
        if not match or not 1 <= int(match[1]) <= int(match[2]) <= run.steps:
            expected = f"must be FIRST:LAST with 1 ≤ FIRST ≤ LAST ≤ run.steps = {run.steps}"
            yield Problem(("run", "profile"), f"{expected}, as in 3:5, not {run.profile!r}.")


def _check_tiles(data: DataSettings) -> Iterator[Problem]:
    most, least = data.max_tiles, data.min_tiles
    if most and least > most:
        yield Problem(("data", "min_tiles"), f"must be at most data.max_tiles = {most}, not {least}.")
    if max(most, least) >= data.tiles_per_sequence > 0 and max(most, least):
        text = f"must be more than the {max(most, least)} local tiles that an image may have (and its global view one)"
        yield Problem(("data", "tiles_per_sequence"), f"{text}, not {data.tiles_per_sequence}.")
