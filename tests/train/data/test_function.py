"""Sources of training that are a Python function: what is read, where it is made, what is refused, how it resumes."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path

import drawn_records
import jax
import numpy as np
import pytest

from dsvl2_jax import configs
from dsvl2_jax.apps.cli.main import main
from dsvl2_jax.errors import DataError
from dsvl2_jax.inputs.processor import Processor
from dsvl2_jax.model.config import Config
from dsvl2_jax.train.data.function import open_function
from dsvl2_jax.train.data.pipeline import BatchShard, Pipeline, StepData, fingerprint, open_training, open_validation
from dsvl2_jax.train.data.samples import SkippedSample, open_sources
from dsvl2_jax.train.settings.schema import (
    ContrastiveSettings,
    DataSettings,
    RunSettings,
    Settings,
    SourceSettings,
    StageSettings,
)

MICRO = Path(configs.__file__).parent / "micro"
STEPS = 4


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_dir(MICRO, warns=False)


@pytest.fixture(scope="module")
def config() -> Config:
    return Config.from_file(MICRO)


def function(name: str, count: int = 40, **arguments: object) -> SourceSettings:
    return SourceSettings(function=f"drawn_records:{name}", count=count, arguments=arguments)


def make_settings(*sources: SourceSettings, objective: str = "language", **data) -> Settings:
    train = {f"set{n}": source for n, source in enumerate(sources)}
    defaults = {"sequence_length": 256, "tiles_per_sequence": 10, "packing_bins": 4, "max_broken_share": 0.5}
    return Settings(
        data=DataSettings(train=train, validation=train, **(defaults | data)),
        stage=StageSettings(objective=objective),
        contrastive=ContrastiveSettings(text_length=32, phrases=6),
        run=RunSettings(seed=7),
    )


def pipeline(settings: Settings, processor: Processor, config: Config, rows: int = 2) -> Pipeline:
    return open_training(settings, processor, config, BatchShard(rows=rows))


def run(settings: Settings, processor: Processor, config: Config, state: str | None = None, steps: int = STEPS):
    """The steps from a state on, and the state after each."""
    made, found, states = pipeline(settings, processor, config), [], []
    if state is not None:
        made.set_state(json.loads(state))
    for _ in range(steps):
        found.append(next(made))
        states.append(json.dumps(made.get_state()))
    made.close()
    return found, states


def assert_same(one: StepData, other: StepData) -> None:
    assert one.sources == other.sources and one.stats == other.stats
    for left, right in zip(jax.tree.leaves(one.batch), jax.tree.leaves(other.batch), strict=True):
        assert left.dtype == right.dtype and np.array_equal(left, right)


def samples(source: SourceSettings, processor: Processor, **data) -> list:
    settings = make_settings(source, **data)
    (opened,) = open_sources("data.train", settings.data.train, processor, settings.data)
    return [opened[index] for index in range(len(opened))]


def test_a_function_gives_what_the_same_records_in_a_file_give(tmp_path, processor, config):
    lines = []
    for index in range(40):
        made = drawn_records.record(index, seed=3)
        if "image" in made:
            (tmp_path / f"{index}.png").write_bytes(drawn_records.file_of(made["image"]))
            made["image"] = f"{index}.png"
        lines.append(json.dumps(made))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    from_file, _ = run(make_settings(SourceSettings(str(tmp_path / "a.jsonl"))), processor, config)
    for form in ("picture", "file", "array"):
        found, _ = run(make_settings(function("record", seed=3, form=form)), processor, config)
        for step, expected in zip(found, from_file, strict=True):
            lines = [int(name.rpartition(":")[2]) - 1 for name in expected.sources]
            assert step.sources == [f"data.train.set0[{line}]" for line in lines]
            assert_same(dataclasses.replace(step, sources=expected.sources), expected)


@pytest.mark.parametrize(
    ("objective", "name", "workers"),
    [("language", "record", 1), ("contrastive", "record", 0), ("regions", "regions", 0)],
)
def test_a_killed_run_resumes_bit_for_bit_and_workers_make_the_records(processor, config, objective, name, workers):
    settings = make_settings(function(name), function(name, 7, seed=1), objective=objective)
    expected, states = run(settings, processor, config)
    made = len(drawn_records.MADE)
    data = dataclasses.replace(settings.data, workers=workers)
    found, again = run(dataclasses.replace(settings, data=data), processor, config, states[1], STEPS - 2)
    assert (len(drawn_records.MADE) == made) is bool(workers)  # nothing in this process
    for step, other in zip(found, expected[2:], strict=True):
        assert_same(step, other)
    assert list(map(json.loads, again)) == list(map(json.loads, states[2:]))
    validated = list(open_validation(settings, processor, config, BatchShard(rows=2)))
    assert {name[: name.index("[")] for step in validated for name in step.sources} == {
        "data.validation.set0",
        "data.validation.set1",
    }


def test_a_run_knows_function_arguments_number_and_code_again(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    found = [
        fingerprint(make_settings(source))["data.train.set0"]
        for source in (
            function("record"),
            function("record", seed=1),
            function("record", 41),
            function("drawer"),
            function("record"),
        )
    ]
    assert found[0] == found[-1] and len(set(found)) == 4
    digests = set()
    for number, body in enumerate(('"a"', '"a"  # the same', '"b"')):
        (tmp_path / f"code{number}.py").write_text(
            f'def record(index):\n    text = {body}\n    return {{"text": text}}\n'
        )
        digests.add(open_function("set", f"code{number}:record", {}, 5)._digest_of(4))
    assert len(digests) == 2
    with pytest.raises(DataError, match=r"set0: drawn_records:unsteady gives another record each time"):
        fingerprint(make_settings(function("unsteady")))
    assert fingerprint(make_settings(function("sometimes")))  # broken records are no reason to refuse the start


def test_what_a_function_raises_is_a_broken_sample_with_its_number(processor, config, caplog):
    settings = make_settings(function("sometimes"), packing=False, shuffle=False, max_broken_share=0.1)
    with caplog.at_level(logging.WARNING):
        found, _ = run(settings, processor, config)
    expected = "data.train.set0[0]: left out (function failed): drawn_records:sometimes raised ValueError at drawn_rec"
    assert expected in caplog.text and ": no picture of 0" in caplog.text
    assert found[0].sources == ["data.train.set0[1]", "data.train.set0[2]"]
    assert found[-1].stats.skipped == {"function failed": 1}
    strict = dataclasses.replace(settings, data=dataclasses.replace(settings.data, max_broken_share=0.05))
    with pytest.raises(DataError, match=r"3 of the first 21 samples are broken(.|\n)*set0\[10\]: (.|\n)*set0\[20\]: "):
        run(strict, processor, config, steps=20)


@pytest.mark.parametrize(
    ("kind", "reason", "expected"),
    [
        ("none", "record", "drawn_records:odd gave nothing, expected a dict with a record"),
        ("list", "record", "gave a list, expected a dict"),
        ("form", "record", 'expected "messages", "conversations" or "text".*found speech'),
        ("turns", "record", '"messages" is int, expected a list of one or more turns'),
        ("exit", "function failed", "raised SystemExit at drawn_records.py"),
        ("name", "image reference", "image 'a.png': a function gives its images themselves and not by name"),
        ("link", "image reference", "is on the web"),
        ("number", "image reference", "a PIL image or an array; found int"),
        ("floats", "image unreadable", "values are of type uint8"),
        ("bytes", "image unreadable", "not an image in a format that is read"),
    ],
)
def test_records_that_are_none_are_named(processor, kind, reason, expected):
    (found,) = samples(function("odd", 1, kind=kind), processor)
    assert isinstance(found, SkippedSample) and (found.name, found.reason) == ("data.train.set0[0]", reason)
    assert re.search(expected, found.message), found.message


def test_functions_that_are_none_are_refused(processor, config, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_code.py").write_text("import no_such_library\n")
    (tmp_path / "exiting_code.py").write_text("raise SystemExit(2)\n")

    def refused(match: str, name: str, **arguments: object) -> None:
        source = SourceSettings(function=name, count=3, arguments=arguments)
        with pytest.raises(DataError, match=match):
            pipeline(make_settings(source), processor, config)

    refused(r"data\.train\.set0\.function: no_such.thing:f: there is no module no_such\. Install it", "no_such.thing:f")
    refused(r"there is no module drawn_records\.inner", "drawn_records.inner:f")
    refused("broken_code cannot be imported.*No module named 'no_such_library'", "broken_code:f")
    refused("exiting_code cannot be imported", "exiting_code:f")
    refused("has no recrod; did you mean record", "drawn_records:recrod")
    refused("no_function: is int, expected a function", "drawn_records:no_function")
    refused(r"does not take them: got an unexpected keyword argument 'sed'.*seed", "drawn_records:record", sed=1)
    refused("missing a required argument: 'kind'", "drawn_records:odd")
    refused("multiple values for argument 'index'", "drawn_records:record", index=1)


def test_an_object_that_can_be_called_and_functions_in_c_are_taken(processor):
    (found,) = samples(function("drawer", 1, anything=1), processor)
    assert found["name"] == "data.train.set0[0]" and not len(found["tiles"])
    assert len(open_function("set", "builtins:dict", {}, 3)) == 3  # says nothing about its arguments


def test_keys_and_boxes_of_a_function_are_told(processor, config, caplog):
    with caplog.at_level(logging.WARNING):
        list(open_validation(make_settings(function("objects", 3)), processor, config, BatchShard(rows=2)))
    assert "data.validation.set0[0]: 'mood' not used, here and in later samples of the function" in caplog.text
    assert "data.validation.set0: 'mood' is not used (samples: 3, the first is number 0)" in caplog.text


def test_check_reads_a_function(tmp_path, capsys):
    assert main(["data", "check", "drawn_records:objects", "--count", "3", "--json", "--draw", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["with_images"], found["boxes"]["pixels"]) == (3, 3, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"objects-{number}-0.png" for number in range(3)]
    sometimes = ["data", "check", "drawn_records:sometimes", "--count", "8"]
    assert main([*sometimes, "--argument", "every=4"]) == 1
    assert "sometimes[4]: drawn_records:sometimes raised ValueError" in " ".join(capsys.readouterr().out.split())
    for options, expected in (
        (["--argument", "every"], "not of the form NAME=VALUE"),
        (["--images", str(tmp_path)], "images: must be left out beside function"),
        (["--count", "0"], "count: must be positive"),
        (["--argument", "evry=3"], "unexpected keyword argument 'evry'"),
    ):
        assert main([*sometimes, *options]) in (1, 2)
        assert expected in capsys.readouterr().err
    assert main(["data", "check", "drawn_records:record"]) == 2
    assert "no such file. If it is a function, give --count" in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path), "--argument", "a=1"]) == 2
    assert "--argument is of a function" in capsys.readouterr().err
