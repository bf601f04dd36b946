"""Settings of a training run: the tables of a CONFIG.toml, checked, with ``key=value`` overrides.

`load` reads them, `to_toml` writes them, `differences` says which of two runs' keep one from continuing the other.
Paths in them are relative to the working directory.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from dsvl2_jax.errors import SettingsError
from dsvl2_jax.messages import did_you_mean, nearest
from dsvl2_jax.train.settings import check as settings_check
from dsvl2_jax.train.settings.check import Problem


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """``[model]``: what training starts from."""

    checkpoint: str = ""  # converted or released directory, hub id, or the directory of an earlier run; must be given
    random_init: bool = False  # take configuration, processor and tokenizer from the checkpoint, but no weights
    size: str = "any"  # tiny, small or base: a checkpoint of another size is refused; any: all are welcome


@dataclasses.dataclass(frozen=True)
class SourceSettings:
    """``[data.train.NAME]`` or ``[data.validation.NAME]``: one data set."""

    path: str = ""  # JSON Lines of conversations, or plain text; a glob pattern may name several files
    weight: float = 1.0  # share of the samples drawn from it, relative to the others (training only); 0: left out
    images: str = ""  # folder or tar shards (a glob) where image names are looked up; empty: the data file's folder


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """``[data]``: samples to packed rows."""

    train: Mapping[str, SourceSettings] = dataclasses.field(default_factory=dict)
    validation: Mapping[str, SourceSettings] = dataclasses.field(default_factory=dict)
    sequence_length: int = 4096  # tokens of a row
    tiles_per_sequence: int = 20  # room for image tiles, per row
    max_segments: int = 64  # most samples packed into a row
    packing: bool = True  # False: one sample a row
    packing_bins: int = 64  # rows that are filled at the same time; more waste less and hold more tiles in memory
    too_long: str = "skip"  # skip or truncate: samples longer than a row
    mask_prompt: bool = False  # True: loss on answers alone (stage 3); False: on all text
    shuffle: bool = True
    workers: int = 0  # processes that read and tokenise a stream; 0: the main one
    streams: int = 1  # parts that are read and packed apart, each by the processes that train on it; see docs/pods.md
    max_broken_share: float = 0.01  # of the samples read; above it the run stops


@dataclasses.dataclass(frozen=True)
class BatchSettings:
    """``[batch]``: sequences of one optimizer step; accumulation steps = sequences / (microbatch × data shards)."""

    sequences: int = 64  # rows in a step, over all devices and accumulation steps
    microbatch_size: int = 1  # rows that a data shard computes at a time


@dataclasses.dataclass(frozen=True)
class ParameterRule:
    """``[[stage.parameters]]``: what to do with parameters whose path (``language/norm/scale``) matches.

    The first rule that matches anywhere in the path (``re.search``) holds. Every parameter must be covered.
    """

    match: str = ""
    train: bool = True
    lr_multiplier: float = 1.0  # factor on the learning rate
    decay: bool = True  # weight decay


@dataclasses.dataclass(frozen=True)
class StageSettings:
    """``[stage]``: what is trained and on what, and the routers' losses."""

    parameters: tuple[ParameterRule, ...] = ()
    balance_loss_weight: float = 0.001  # α of the sequence-wise balance loss
    bias_update_speed: float = 0.0  # of the router's correction bias (noaux_tc), per step
    # language: the next token; or the encoder on images and their captions (contrastive), or on named regions (regions)
    objective: str = "language"


@dataclasses.dataclass(frozen=True)
class ContrastiveSettings:
    """``[contrastive]``: the text's side of the objectives "contrastive" and "regions", and their loss (SigLIP)."""

    text_layers: int = 2  # blocks of the caption encoder, as wide as the image encoder's
    text_length: int = 64  # tokens of a caption, its end included, or of all of an image's phrases; longer ones are cut
    attributes: str = ""  # regions: the attributes that are learnt, as in "kind, colour"; empty: all
    phrases: int = 32  # regions: most of an image
    different_phrases: int = 1024  # regions: most of a step
    fresh_encoder: bool = False  # draw the image encoder anew at the start of the run, for training from nothing
    initial_scale: float = 10.0  # t, which multiplies the cosines; its logarithm is learnt
    initial_bias: float = -10.0  # b, learnt too


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """``[optimizer]``: AdamW."""

    learning_rate: float = 1e-4
    schedule: str = "constant"  # cosine; step (÷√10 at 50 % and at 75 % of the steps); constant
    warmup_steps: int = 0  # of linear rise; the paper does not say
    final_rate: float = 0.0  # where cosine ends, as a share of learning_rate; the paper does not say
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # global gradient norm; 0: no clipping
    state_dtype: str = "float32"  # or bfloat16, of both moments


@dataclasses.dataclass(frozen=True)
class ComputeSettings:
    """``[compute]``: how a step runs."""

    dtype: str = "bfloat16"  # or float32; trained parameters are float32 always
    mesh: str = ""  # data=…,tensor=…,expert=…; empty: all devices along data
    scan_layers: bool = True  # stacked layers under lax.scan; False: a loop, slower to compile
    remat: str = "full"  # none; dots (keep matmul outputs); full (keep layer inputs)
    loss_chunk: int = 1024  # tokens whose logits are held at a time


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """``[run]``: the loop."""

    directory: str = ""  # of the run: checkpoints, log, resolved configuration; must be given
    steps: int = 1000
    seed: int = 0
    checkpoint_every: int = 500
    keep_last: int = 3  # checkpoints kept besides the best one by validation loss
    validate_every: int = 500
    validation_steps: int = 16  # batches of a validation, at most
    log_every: int = 1
    tensorboard: bool = False
    profile: str = ""  # FIRST:LAST, the steps to trace into the run's directory


@dataclasses.dataclass(frozen=True)
class Settings:
    """A whole CONFIG.toml."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    batch: BatchSettings = BatchSettings()
    stage: StageSettings = StageSettings()
    contrastive: ContrastiveSettings = ContrastiveSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    compute: ComputeSettings = ComputeSettings()
    run: RunSettings = RunSettings()


COMMAND_LINE = "command line"
# What a resumed run may change: none of it reaches the parameters.
_MAY_CHANGE = (
    "compute.mesh",
    "batch.microbatch_size",
    "data.validation",
    "data.max_broken_share",
    "data.workers",
    "run.directory",
    "run.checkpoint_every",
    "run.keep_last",
    "run.validate_every",
    "run.validation_steps",
    "run.log_every",
    "run.tensorboard",
    "run.profile",
)
_KINDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
_BAD: Any = object()  # what has no value, since it was wrong


def presets() -> dict[str, Path]:
    """The presets by name: ``tiny-align`` … ``base-sft``."""
    from dsvl2_jax import configs

    folder = Path(configs.__file__).parent
    return {file.stem: file for part in ("train", "micro/train") for file in sorted((folder / part).glob("*.toml"))}


def find(name: str | Path) -> Path:
    """The file of a configuration, given by its path or as the bare name of a preset.

    Raises:
      SettingsError: there is neither such a file nor such a preset.
    """
    path, known = Path(name), presets()
    if path.is_file():
        return path
    if str(name) in known:
        return known[str(name)]
    hint = did_you_mean(path.stem, known)
    raise SettingsError(f"{name}: no such file, and no such preset{hint} The presets are {', '.join(known)}.")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Reads and checks a configuration.

    Args:
      path: TOML file, or the bare name of a preset.
      overrides: ``table.key=value``, later ones win. A value is written as in TOML; a string may go without quotes.

    Raises:
      SettingsError: the file cannot be read; a key is unknown, missing, of the wrong type or out of range. All
        problems are in one message, each with where it came from.
    """
    file = find(path)
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{file}: not readable as TOML: {error}") from None
    problems: list[Problem] = []
    given: set[settings_check.Path] = set()
    stray: list[str] = []
    for override in overrides:
        name, separator, text = override.partition("=")
        keys = tuple(part.strip() for part in name.split("."))
        if not separator or not all(keys):
            stray.append(f"{override!r} is not of the form table.key=value, such as run.steps=100.")
            continue
        given.add(keys)
        if not _set(raw, keys, _parse(text.strip(), _type_at(keys))):
            problems.append((keys, "is inside something that is not a table."))
    settings = _without_weightless(_build(Settings, raw, (), problems))
    wrong = {where for where, _ in problems}
    further = list(settings_check.fields(settings, dict(_leaves(settings))))
    problems += [(where, text) for where, text in further if not _touches(where, wrong)]
    if not problems:
        problems += settings_check.together(settings)
    if problems or stray:

        def place(where: settings_check.Path) -> str:
            return COMMAND_LINE if any(where[: len(keys)] == keys for keys in given) else str(file)

        lines = [f"{COMMAND_LINE}: {text}" for text in stray]
        lines += [f"{place(where)}: {_name(where)}: {text}" for where, text in problems]
        raise SettingsError("\n  ".join(["the settings cannot be used:", *lines]))
    return settings


def to_toml(settings: Settings) -> str:
    """The settings as TOML text, every key written out; `load` of it gives them back."""
    return "\n".join(_tables(settings, ""))


def differences(start: Settings, now: Settings) -> list[str]:
    """What keeps a run that began with ``start`` from going on with ``now`` exactly as it would have.

    Cadence of checkpoints, validation and logs, validation data, workers and the directory may change; ``run.steps``
    only where no schedule depends on it (constant). So may the mesh and how its devices split a step, which reach the
    losses by rounding alone. Everything else reaches them.

    Returns:
      One line for each such field; empty when the run may go on.
    """
    before, after = dict(_leaves(start)), dict(_leaves(now))
    free = list(_MAY_CHANGE)
    if start.optimizer.schedule == now.optimizer.schedule == "constant":
        free.append("run.steps")

    def fixed(name: str) -> bool:
        return not any(name == key or name.startswith(f"{key}.") for key in free)

    def line(name: str) -> str:
        if name == "stage.parameters":
            return f"{name}: not the rules of the start of the run"
        was, is_now = (_literal(leaves[name]) if name in leaves else "absent" for leaves in (before, after))
        return f"{name}: {was} at the start of the run, now {is_now}"

    return [
        line(name) for name in dict.fromkeys([*before, *after]) if fixed(name) and before.get(name) != after.get(name)
    ]


def _touches(where: settings_check.Path, wrong: Set[settings_check.Path]) -> bool:
    """True if one path of ``wrong`` leads to ``where`` or on from it."""
    return any(where[: len(path)] == path or path[: len(where)] == where for path in wrong)


def _set(raw: dict[str, Any], keys: settings_check.Path, value: Any) -> bool:
    for key in keys[:-1]:
        raw = raw.setdefault(key, {})
        if not isinstance(raw, dict):
            return False
    old = raw.get(keys[-1])
    raw[keys[-1]] = old | value if isinstance(old, dict) and isinstance(value, dict) else value
    return True


def _parse(text: str, kind: Any) -> Any:
    """A TOML value; the text itself where a string is expected, or where it is no TOML."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = parsed["value"] if len(parsed) == 1 else text
    return text if kind is str and not isinstance(value, str) else value


def _type_at(keys: settings_check.Path) -> Any:
    """The type of the field at ``keys``, or None."""
    kind: Any = Settings
    for key in keys:
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(key)
        elif typing.get_origin(kind) is Mapping:
            kind = typing.get_args(kind)[1]
        else:
            return None
    return kind


def _build(kind: Any, raw: Any, where: settings_check.Path, problems: list[Problem]) -> Any:
    """``raw`` as a value of type ``kind``. Problems are added; a wrong value leaves its field at the default."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(raw, dict):
            problems.append((where, f"must be a table, not {_literal(raw)}."))
            return _BAD
        hints = typing.get_type_hints(kind)
        problems += [((*where, key), _unknown(key, tuple(hints))) for key in raw if key not in hints]
        values = {key: _build(hints[key], value, (*where, key), problems) for key, value in raw.items() if key in hints}
        return kind(**{key: value for key, value in values.items() if value is not _BAD})
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Mapping:
        if not isinstance(raw, dict):
            problems.append((where, f"must hold tables, one per data set, not {_literal(raw)}."))
            return _BAD
        for name in raw:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                problems.append(((*where, name), "a data set's name is made of letters, digits, - and _."))
        values = {name: _build(args[1], value, (*where, name), problems) for name, value in raw.items()}
        return {name: value for name, value in values.items() if value is not _BAD}
    if origin is tuple:
        if not isinstance(raw, list):
            problems.append((where, f"must be an array of tables, not {_literal(raw)}."))
            return _BAD
        values = [_build(args[0], value, (*where, i), problems) for i, value in enumerate(raw)]
        return tuple(value for value in values if value is not _BAD)
    number = kind is float and isinstance(raw, int) and not isinstance(raw, bool)
    if not number and type(raw) is not kind:
        problems.append((where, f"must be {_KINDS[kind]}, not {_literal(raw)}."))
        return _BAD
    if kind is float and not math.isfinite(raw):
        problems.append((where, f"must be finite, not {raw}."))
        return _BAD
    return float(raw) if kind is float else raw


def _unknown(key: str, siblings: Sequence[str]) -> str:
    if near := nearest(key, siblings):
        return f"unknown key; did you mean {near}?"
    everywhere = {name.rpartition(".")[2]: name for name in _field_names(Settings)}
    if near := nearest(key, everywhere):
        return f"unknown key here; did you mean {everywhere[near]}?"
    return f"unknown key; the keys here are {', '.join(siblings)}."


def _field_names(kind: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from _field_names(hint, f"{prefix}{name}.")
        else:
            yield prefix + name


def _without_weightless(settings: Settings) -> Settings:
    train = {name: source for name, source in settings.data.train.items() if source.weight != 0}
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, train=train))


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field; the array of rules is one value."""
    items = vars(value) if dataclasses.is_dataclass(value) else value
    for name, inner in items.items():
        if dataclasses.is_dataclass(inner) or isinstance(inner, Mapping):
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, inner


def _tables(value: Any, name: str) -> Iterator[str]:
    items = vars(value) if dataclasses.is_dataclass(value) else value
    inner = {
        key: x
        for key, x in items.items()
        if dataclasses.is_dataclass(x) or isinstance(x, Mapping) or (isinstance(x, tuple) and x)
    }
    plain = {key: x for key, x in items.items() if key not in inner}
    if name and plain:
        yield f"[{name}]"
        yield from (f"{key} = {_literal(x)}" for key, x in plain.items())
        yield ""
    for key, x in inner.items():
        path = f"{name}.{key}" if name else key
        if isinstance(x, tuple):
            for rule in x:
                yield f"[[{path}]]"
                yield from (f"{field} = {_literal(entry)}" for field, entry in vars(rule).items())
                yield ""
        else:
            yield from _tables(x, path)


def _literal(value: Any) -> str:
    """A value as TOML would write it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {_literal(x)}' for key, x in value.items())}}}"
    return repr(value) if isinstance(value, int | float) else str(value)


def _name(where: settings_check.Path) -> str:
    """stage.parameters[0].lr_multiplier, as in messages."""
    parts = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in where)
    return "".join(parts).removeprefix(".")
