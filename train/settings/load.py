"""Reading, writing and comparing the settings of training runs.

`load` reads a CONFIG.toml or a preset with ``key=value`` overrides, `to_toml` writes it, `differences` says which
settings keep one run from resuming another, and `settings_help` describes all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from dsvl2_jax import fields
from dsvl2_jax.errors import SettingsError
from dsvl2_jax.fields import Problem, literal, toml_key
from dsvl2_jax.json_files import parse_toml, read_toml
from dsvl2_jax.messages import did_you_mean
from dsvl2_jax.train.settings import check
from dsvl2_jax.train.settings.schema import Settings

COMMAND_LINE = "command line"


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
    with contextlib.suppress(OSError, ValueError):  # a name that no file can have
        if path.is_file():
            return path
    if str(name) in known:
        return known[str(name)]
    hint = did_you_mean(path.stem, known)
    raise SettingsError(f"{name}: no such file, and no such preset{hint} The presets are {', '.join(known)}.")


def load(path: str | Path, overrides: Sequence[str] = (), *, accept_old_names: bool = False) -> Settings:
    """Reads and checks a configuration.

    Args:
      path: TOML file, or the bare name of a preset.
      overrides: ``table.key=value``, later ones win. A value is written as in TOML; a string may go without quotes.
      accept_old_names: read settings by the names that they had before, too, as of a run from then; otherwise an old
        name is an error that gives the new one.

    Raises:
      SettingsError: the file cannot be read; a key is unknown, missing, of the wrong type or out of range. All
        problems are in one message, each with where it came from.
    """
    file = find(path)
    raw = read_toml(file, SettingsError)
    problems: list[Problem] = []
    given: set[fields.Path] = set()
    stray: list[str] = []
    for override in overrides:
        name, separator, text = override.partition("=")
        keys = tuple(part.strip() for part in name.split("."))
        if not separator or not all(keys):
            stray.append(f"{override!r} is not of the form table.key=value, such as run.steps=100.")
            continue
        given.add(keys)
        if not _set(raw, keys, parse_value(text.strip(), fields.type_at(Settings, keys))):
            problems.append(Problem(keys, "is inside something that is not a table."))
    settings, wrong_fields = fields.build(Settings, raw, accept_old_names=accept_old_names)
    problems += wrong_fields
    settings = _without_weightless(settings)
    wrong = {problem.path for problem in problems}
    further = (*check.check_sources(settings.data), *check.check_rules(settings))
    problems += [problem for problem in further if not _touches(problem.path, wrong)]
    if not problems:
        problems += check.check_together(settings)
    if problems or stray:

        def source(path: fields.Path) -> str:
            return COMMAND_LINE if any(path[: len(keys)] == keys for keys in given) else str(file)

        lines = [f"{COMMAND_LINE}: {text}" for text in stray]
        lines += [f"{source(problem.path)}: {problem}" for problem in problems]
        raise SettingsError("\n  ".join(["the settings cannot be used:", *lines]))
    return settings


def to_toml(settings: Settings) -> str:
    """The settings as TOML text, every key written out; `load` of it gives them back."""
    return "\n".join(_tables(settings, ""))


def differences(start: Settings, now: Settings) -> list[str]:
    """What keeps a run that began with ``start`` from resuming with ``now`` exactly as it would have continued.

    What may change is said by the fields (`fields.setting`): cadence of checkpoints, validation and logs, validation
    data, workers and the directory, and ``run.steps`` where no schedule depends on it (constant). So may the mesh and
    how its devices split a step, which reach the losses by rounding alone. Everything else reaches them.

    Returns:
      One line for each such field; empty when the run may resume.
    """
    before, after = ({name: value for name, value, _ in fields.leaves(settings)} for settings in (start, now))
    free = {name for settings in (start, now) for name, _, may_change in fields.leaves(settings) if may_change}
    if start.optimizer.schedule == now.optimizer.schedule == "constant":
        free.add("run.steps")

    def line(name: str) -> str:
        if name == "stage.parameters":
            return f"{name}: not the rules of the start of the run"
        was, is_now = (literal(values[name]) if name in values else "absent" for values in (before, after))
        return f"{name}: {was} at the start of the run, now {is_now}"

    names = dict.fromkeys([*before, *after])
    return [line(name) for name in names if name not in free and before.get(name) != after.get(name)]


def settings_help() -> str:
    """Every setting with its default and meaning, table by table, as TOML has them."""
    return "\n".join(["All settings of a CONFIG.toml, with their defaults:", "", *_described(Settings, "")])


def _described(cls: Any, table: str) -> Iterator[str]:
    hints, inner = typing.get_type_hints(cls), []
    if table:
        yield f"{table}  # {cls.__doc__.splitlines()[0].replace('`', '')}"
    for field in dataclasses.fields(cls):
        hint, rule = hints[field.name], fields.rule_of(field)
        name = f"{table.strip('[]')}.{field.name}".removeprefix(".")
        if dataclasses.is_dataclass(hint):
            inner.append((hint, f"[{name}]"))
        elif typing.get_origin(hint) is tuple and dataclasses.is_dataclass(typing.get_args(hint)[0]):
            inner.append((typing.get_args(hint)[0], f"[[{name}]]"))
        elif typing.get_origin(hint) is Mapping and dataclasses.is_dataclass(typing.get_args(hint)[1]):
            inner.append((typing.get_args(hint)[1], f"[{name}.NAME]"))
        else:
            choices = f"{' | '.join(rule.choices)}; " if rule.choices else ""
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            text = f"{field.name} = {literal(default)}  # {choices}{rule.help}"
            yield textwrap.fill(text, 100, subsequent_indent="    # ", break_on_hyphens=False)
    if table:
        yield ""
    for kind, name in inner:
        yield from _described(kind, name)


def _touches(path: fields.Path, wrong: Set[fields.Path]) -> bool:
    """True if one path of ``wrong`` leads to ``path`` or on from it."""
    return any(path[: len(other)] == other or other[: len(path)] == path for other in wrong)


def _set(raw: dict[str, Any], keys: tuple[str, ...], value: Any) -> bool:
    for key in keys[:-1]:
        raw = raw.setdefault(key, {})
        if not isinstance(raw, dict):
            return False
    old = raw.get(keys[-1])
    raw[keys[-1]] = old | value if isinstance(old, dict) and isinstance(value, dict) else value
    return True


def parse_value(text: str, kind: Any = None) -> Any:
    """A TOML value of a command line; the text itself where a string is expected, or where it is no TOML."""
    try:
        parsed = parse_toml(f"value = {text}")
    except ValueError:
        return text
    value = parsed["value"] if len(parsed) == 1 else text
    return text if kind is str and not isinstance(value, str) else value


def _without_weightless(settings: Settings) -> Settings:
    train = {name: source for name, source in settings.data.train.items() if source.weight != 0}
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, train=train))


def _is_tables(value: Any) -> bool:
    """True for an array of tables."""
    return isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value))


def _tables(value: Any, name: str) -> Iterator[str]:
    items = vars(value) if dataclasses.is_dataclass(value) else value
    inner = {
        key: x for key, x in items.items() if dataclasses.is_dataclass(x) or isinstance(x, Mapping) or _is_tables(x)
    }
    plain = {key: x for key, x in items.items() if key not in inner}
    if name and plain:
        yield f"[{name}]"
        yield from (f"{toml_key(key)} = {literal(x)}" for key, x in plain.items())
        yield ""
    for key, x in inner.items():
        path = f"{name}.{toml_key(key)}" if name else key
        if isinstance(x, tuple):
            for rule in x:
                yield f"[[{path}]]"
                yield from (f"{field} = {literal(entry)}" for field, entry in vars(rule).items())
                yield ""
        else:
            yield from _tables(x, path)
