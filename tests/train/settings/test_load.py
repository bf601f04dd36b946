"""Reading, checking, writing, comparing and describing a training configuration."""

import dataclasses
from pathlib import Path

import pytest

from dsvl2_jax import fields
from dsvl2_jax.errors import SettingsError
from dsvl2_jax.train.settings.load import differences, load, settings_help, to_toml
from dsvl2_jax.train.settings.schema import (
    ComputeSettings,
    DataSettings,
    ParameterRule,
    Settings,
    SourceSettings,
    StageSettings,
)

FILE = """
[model]
checkpoint = "somewhere"
[data]
packing = false
[data.train.vl]
path = "vl.jsonl"
weight = 0.7
[data.train.text]
path = "text.jsonl"
weight = 0.3
[data.validation.held]
path = "held.jsonl"
[[stage.parameters]]
match = "^vision/"
lr_multiplier = 0.1
[[stage.parameters]]
match = "."
decay = false
[optimizer]
learning_rate = 1  # a whole number where a fraction is meant
[run]
directory = "runs/x"
steps = 100
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(FILE)
    return path


def problems(file: Path, *overrides: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load(file, overrides)
    return str(caught.value)


def test_tables_become_settings(file):
    loaded = load(file)
    assert loaded.data.train == {"vl": SourceSettings("vl.jsonl", 0.7), "text": SourceSettings("text.jsonl", 0.3)}
    assert loaded.data.validation["held"].path == "held.jsonl"
    assert loaded.stage.parameters == (ParameterRule("^vision/", lr_multiplier=0.1), ParameterRule(".", decay=False))
    assert loaded.optimizer.learning_rate == 1.0 and isinstance(loaded.optimizer.learning_rate, float)
    assert loaded.data.packing is False and loaded.run.steps == 100
    assert loaded.compute == ComputeSettings()


def test_overrides_are_toml_values_or_bare_strings(file):
    loaded = load(
        file,
        [
            "run.steps=7",
            "optimizer.learning_rate=1e-4",
            "run.tensorboard=true",
            "data.train.vl.path=other file.jsonl",
            'model.checkpoint="quoted"',
            "run.directory=12",
            "run.profile=2:3",
            "data.train.more={path='more.jsonl', weight=2}",
            "data.train.text.weight=0",
            "stage.parameters=[{match='.', lr_multiplier=0.5}]",
            "compute.mesh=data=2,tensor=2",
            "run.steps=8",
        ],
    )
    assert (loaded.run.steps, loaded.optimizer.learning_rate, loaded.run.tensorboard) == (8, 1e-4, True)
    assert (loaded.model.checkpoint, loaded.run.directory, loaded.run.profile) == ("quoted", "12", "2:3")
    assert loaded.data.train == {
        "vl": SourceSettings("other file.jsonl", 0.7),
        "more": SourceSettings("more.jsonl", 2.0),
    }
    assert loaded.stage.parameters == (ParameterRule(".", lr_multiplier=0.5),)
    assert loaded.compute.mesh == "data=2,tensor=2"


def test_all_problems_come_in_one_message_with_their_origin(file):
    file.write_text(FILE + "[batch]\nsequnces = 3\nmicrobatch_size = 'two'\n[compute]\nremat = 'dot'\n")
    message = problems(file, "run.steps=ten", "lerning_rate=1", "optimizer.beta2=2", "nonsense")
    for line in (
        f"{file}: batch.sequnces: unknown key; did you mean sequences?",
        f'{file}: batch.microbatch_size: must be a whole number, not "two".',
        f"{file}: compute.remat: 'dot' is none of none, dots, full; did you mean dots?",
        'command line: run.steps: must be a whole number, not "ten".',
        "command line: lerning_rate: unknown key here; did you mean optimizer.learning_rate?",
        "command line: optimizer.beta2: must be at least 0 and below 1, not 2.0.",
        "command line: 'nonsense' is not of the form",
    ):
        assert line in message
    assert message.count("\n") == 7


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.steps=1.0", "must be a whole number, not 1.0"),
        ("run.steps=true", "must be a whole number, not true"),
        ("run.steps=0", "must be positive"),
        ("run.steps.x=1", "inside something that is not a table"),
        ("run=3", "run: must be a table, not 3"),
        ("data.train=3", "one per data set"),
        ("data.train.vl=3", "data.train.vl: must be a table"),
        ("data.train.a b.path=x", "letters, digits"),
        ("data.train.vl.pth=x", "data.train.vl.pth: unknown key; did you mean path?"),
        ("data.train.vl.path=", "data.train.vl.path: must be given, as in data.train.vl.path=my.jsonl"),
        ("data.train.vl.weight=-1", "must be 0 or more, not -1"),
        ("data.validation.new.weight=1", "data.validation.new.path: must be given, as in"),
        ("data.packing=1", "must be true or false, not 1"),
        ("data.packing_bins=0", "must be positive"),
        ("data.too_long=skp", "did you mean skip?"),
        ("optimizer.learning_rate=nan", "must be finite"),
        ("optimizer.learning_rate=0", "must be positive"),
        ("optimizer.warmup_steps=100", "must be less than run.steps = 100"),
        ("optimizer.schedule=linear", "none of cosine, step, constant"),
        ("batch.microbatch_size=3", "64 is no multiple of microbatch_size = 3"),
        ("compute.mesh=data=3", "64 is no multiple of microbatch_size = 1 × 3 data shards"),
        ("compute.mesh=date=3", "compute.mesh: unknown axis 'date'"),
        ("stage.parameters=[{match='('}]", "stage.parameters[0].match: '(' is not a regular expression"),
        ("stage.parameters=[{match='.', lr_multiplier=0}]", "stage.parameters[0].lr_multiplier: must be positive"),
        ("stage.parameters=[{match='.', train=false}]", "no rule trains anything"),
        ("stage.parameters=[]", "stage.parameters: no rule"),
        ("stage.parameters=[3]", "stage.parameters[0]: must be a table, not 3"),
        ("stage.parameters=3", "must be an array of tables"),
        ("run.profile=5", "1 ≤ FIRST ≤ LAST"),
        ("run.profile=99:101", "1 ≤ FIRST ≤ LAST"),
        ("run.directory=", "run.directory: must be given, as in run.directory=runs/my-run"),
        ("optimiser.beta1=0.5", "optimiser: unknown key; did you mean optimizer?"),
        ("xyz=1", "the keys here are model, data, batch"),
    ],
)
def test_bad_values_are_named(file, override, expected):
    message = problems(file, override)
    assert expected in message and message.count("\n") == 1


OLD_NAMES = (
    ("batch.micro_sequences", "[batch]\nmicro_sequences = 4\n", "is now called microbatch_size; rename it."),
    (
        "stage.parameters[2].rate",
        "[[stage.parameters]]\nmatch = 'never'\nrate = 0.5\n",
        "is now called lr_multiplier; rename it.",
    ),
)


@pytest.mark.parametrize(("name", "lines", "expected"), OLD_NAMES)
def test_an_old_name_is_an_error_that_gives_the_new_one(file, name, lines, expected):
    file.write_text(FILE.replace("[optimizer]", f"{lines}[optimizer]"))
    assert problems(file).splitlines()[1:] == [f"  {file}: {name}: {expected}"]
    if name.startswith("batch"):
        file.write_text(FILE)
        assert problems(file, f"{name}=4").splitlines()[1:] == [f"  command line: {name}: {expected}"]


@pytest.mark.parametrize(("name", "lines", "expected"), OLD_NAMES)
def test_an_old_name_is_read_from_what_an_earlier_version_wrote(file, name, lines, expected):
    file.write_text(FILE.replace("[optimizer]", f"{lines}[optimizer]"))
    loaded = load(file, accept_old_names=True)
    assert (loaded.batch.microbatch_size, loaded.stage.parameters[-1].lr_multiplier) in ((4, 1.0), (1, 0.5))
    assert "micro_sequences" not in to_toml(loaded) and "\nrate" not in to_toml(loaded)


def test_the_help_lists_every_setting_with_its_default_and_meaning():
    text = " ".join(settings_help().replace("\n    # ", " ").split())
    example = Settings(
        data=DataSettings(train={"NAME": SourceSettings()}, validation={"NAME": SourceSettings()}),
        stage=StageSettings((ParameterRule(),)),
    )

    def tables(value, name):
        for field in dataclasses.fields(value):
            inner, path = getattr(value, field.name), f"{name}.{field.name}".removeprefix(".")
            if dataclasses.is_dataclass(inner):
                yield from tables(inner, path)
            elif isinstance(inner, tuple) and dataclasses.is_dataclass(inner[0]):
                yield from tables(inner[0], f"[{path}]")
            elif isinstance(inner, dict) and inner:
                yield from tables(inner["NAME"], f"{path}.NAME")
            else:
                yield name, field.name, inner, fields.rule_of(field)

    listed = list(tables(example, ""))
    assert len(listed) > 55
    for table, name, default, rule in listed:
        assert rule.help, name
        choices = f"{' | '.join(rule.choices)}; " if rule.choices else ""
        line = f" {name} = {fields.literal(default)} # {choices}{rule.help}"
        start = text.index(f"[{table}] #")
        assert line in text[start:], name


def test_a_mixture_without_sources_is_refused(file):
    assert "no data set is left" in problems(file, "data.train.vl.weight=0", "data.train.text.weight=0")


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "bad.toml").write_text("[run\n")
    assert "bad.toml: not readable as TOML" in problems(tmp_path / "bad.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    assert "bytes.toml: not UTF-8 text" in problems(tmp_path / "bytes.toml")
    assert "no such file, and no such preset" in problems(tmp_path / "none.toml")


def test_written_settings_load_as_they_were(file, tmp_path):
    directory = 'runs/"quoted" \\ ünïcode \x7f'
    loaded = load(file, ["compute.mesh=data=2", "optimizer.epsilon=1e-16", "adapter.targets=['^a\\d/', 'b']"])
    loaded = dataclasses.replace(loaded, run=dataclasses.replace(loaded.run, directory=directory))
    (tmp_path / "copy.toml").write_text(to_toml(loaded))
    assert load(tmp_path / "copy.toml") == loaded


MADE = "{function='my.module:record', count=5"


def test_a_function_and_its_arguments(file, tmp_path):
    loaded = load(
        file,
        [
            "data.train.vl.path=",
            "data.train.vl.function=my.module:record",
            "data.train.vl.count=2_000_000",
            "data.train.vl.arguments.mixture=simple",
            "data.train.vl.arguments.seed=4",
            "data.train.vl.arguments.sizes={'größe 1'=[1, 2.5], inner={on=true}}",
        ],
    )
    source = loaded.data.train["vl"]
    assert (source.function, source.count, source.weight) == ("my.module:record", 2_000_000, 0.7)
    sizes = {"größe 1": [1, 2.5], "inner": {"on": True}}
    assert source.arguments == {"mixture": "simple", "seed": 4, "sizes": sizes}
    (tmp_path / "copy.toml").write_text(to_toml(loaded))
    assert load(tmp_path / "copy.toml") == loaded
    other = load(tmp_path / "copy.toml", ["data.train.vl.arguments.seed=5", "data.train.vl.arguments.turns=2"])
    assert differences(loaded, other) == [
        "data.train.vl.arguments.seed: 4 at the start of the run, now 5",
        "data.train.vl.arguments.turns: absent at the start of the run, now 2",
    ]
    for name, value in (("function", "my.module:other"), ("count", "7")):
        (line,) = differences(loaded, load(tmp_path / "copy.toml", [f"data.train.vl.{name}={value}"]))
        assert line.startswith(f"data.train.vl.{name}: ")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train.vl.function=a:b", "data.train.vl.function: must be left out beside path"),
        (f"data.train.new={MADE}, path='a.jsonl'}}", "data.train.new.function: must be left out beside path"),
        (f"data.train.new={MADE}, images='pictures'}}", "data.train.new.images: must be left out beside function"),
        (f"data.train.new={MADE}, follow_links=true}}", "data.train.new.follow_links: must be left out beside"),
        (f"data.train.new={MADE}, arguments=3}}", "data.train.new.arguments: must be a table, not 3"),
        (f"data.validation.new={MADE}, count2=3}}", "data.validation.new.count2: unknown key; did you mean count?"),
        ("data.train.new.function=a.b", 'must be module:name, as in my_package.pictures:record, not "a.b"'),
        ("data.train.new={function='a.b:c'}", "data.train.new.count: must be positive, not 0"),
        ("data.train.new={function='a.b:c', count=-1}", "data.train.new.count: must be 0 or more, not -1"),
        ("data.train.new.count=3", "data.train.new.function: must be given with count and arguments"),
        ("data.train.vl.count=3", "data.train.vl.function: must be given with count and arguments"),
        ("data.train.vl.arguments.seed=3", "data.train.vl.function: must be given with count and arguments"),
    ],
)
def test_what_is_wrong_with_a_function(file, override, expected):
    assert expected in problems(file, override)


def test_every_field_is_written(file):
    text = to_toml(load(file))
    for field in ("weight = 0.7", "match = ", "seed = 0", "[data.validation.held]", "clip_norm = 1.0", "size = "):
        assert field in text


def change(loaded: Settings, table: str, **values) -> Settings:
    return dataclasses.replace(loaded, **{table: dataclasses.replace(getattr(loaded, table), **values)})


def test_what_a_resumed_run_may_change(file):
    start = load(file)
    free = change(
        start, "run", log_every=5, keep_last=1, checkpoint_every=9, tensorboard=True, steps=200, directory="y"
    )
    free = change(free, "data", validation={}, max_broken_share=0.5)
    assert differences(start, free) == []


def test_what_it_may_not(file):
    start = load(file)
    assert differences(start, change(start, "run", seed=1)) == ["run.seed: 0 at the start of the run, now 1"]
    assert len(differences(start, change(start, "compute", loss_chunk=512, remat="none"))) == 2
    assert len(differences(start, change(start, "data", streams=2, workers=3))) == 1
    assert 'data.train.vl.path: "vl.jsonl" at the start of the run, now absent' in differences(
        start, change(start, "data", train={"text": start.data.train["text"]})
    )
    fewer = change(start, "stage", parameters=start.stage.parameters[1:])
    assert differences(start, fewer) == ["stage.parameters: not the rules of the start of the run"]
    cosine = change(start, "optimizer", schedule="cosine")
    assert differences(cosine, change(cosine, "run", steps=200)) == ["run.steps: 100 at the start of the run, now 200"]
