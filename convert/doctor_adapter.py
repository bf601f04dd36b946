"""What an adapter's directory holds, as far as it can be told without the model that it is for.

Tested in tests/convert/test_doctor_adapter.py.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from pathlib import Path

import numpy as np
from rich import filesize
from rich.markup import escape
from rich.table import Table

from dsvl2_jax.checkpoint import peft_config, rules
from dsvl2_jax.checkpoint.adapter_tensors import read_tensor
from dsvl2_jax.checkpoint.adapters import is_adapter, open_tensors, read_manifest
from dsvl2_jax.checkpoint.locate import find_adapter
from dsvl2_jax.errors import CheckpointError
from dsvl2_jax.runtime.console import PrintableConsole

_LORA = re.compile(r"(?P<module>.+?)\.(lora_\w+|weight|bias)(\..*)?")


@dataclasses.dataclass
class AdapterReport:
    """What `examine_adapter` found. ``ok`` is False when there is any problem."""

    directory: str
    layout: str = "adapter"
    kind: str | None = None  # "lora" or "dora"; None without a usable adapter_config.json
    rank: int | None = None
    alpha: float | None = None
    rslora: bool | None = None
    dropout: float | None = None
    base: str | None = None  # the checkpoint that it was trained on, as its user called it
    base_digest: str | None = None
    modules: dict[str, int] = dataclasses.field(default_factory=dict)  # the end of a name → modules that have it
    parameters: int = 0
    dtypes: dict[str, int] = dataclasses.field(default_factory=dict)  # stored dtype → bytes
    notes: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def adapter_at(ckpt: str | Path | None) -> Path | None:
    """The directory of the adapter, where a path names one, a run that trains one or a checkpoint of it; else None."""
    if ckpt is None or not Path(ckpt).is_dir():
        return None
    directory = find_adapter(ckpt)
    return directory if is_adapter(directory) and not (directory / "config.json").is_file() else None


def examine_adapter(directory: Path) -> AdapterReport:
    """Everything about an adapter that can be known without its base; every tensor is read."""
    report = AdapterReport(str(directory))
    try:
        manifest = read_manifest(directory)
        report.base_digest = manifest.get("base_digest")
        if not manifest:
            report.notes.append("written elsewhere: there are no digests of its files, nor one of its base")
    except CheckpointError as error:
        report.problems.append(str(error))
    try:
        config = peft_config.read(directory / peft_config.CONFIG_NAME)
        report.kind = "dora" if config.dora else "lora"
        report.rank, report.alpha, report.dropout = config.rank, config.alpha, config.dropout
        report.rslora, report.base = config.rslora, config.base or None
        report.notes += config.notes
        for name, values in (("ranks", config.rank_pattern), ("factors", config.alpha_pattern)):
            if values:
                report.notes.append(f"{len(values)} patterns give modules {name} of their own")
    except CheckpointError as error:
        report.problems.append(str(error))
    try:
        _examine_tensors(directory, report)
    except CheckpointError as error:
        report.problems.append(str(error))
    return report


def _examine_tensors(directory: Path, report: AdapterReport) -> None:
    modules: set[str] = set()
    dtypes: collections.Counter[str] = collections.Counter()
    tensors = open_tensors(directory)
    if not tensors:
        report.problems.append(f"{directory}: it has no tensors (its targets may have matched nothing)")
    for name, tensor in tensors.items():
        dtypes[rules.FLOAT_DTYPES.get(tensor.dtype, tensor.dtype)] += tensor.size
        report.parameters += math.prod(tensor.shape)
        if match := _LORA.fullmatch(name):
            modules.add(match["module"])
        if tensor.dtype not in rules.FLOAT_DTYPES:
            report.problems.append(f"{name}: {tensor.dtype}, expected floating point (F32, F16, BF16)")
        elif not np.isfinite(read_tensor(tensor)).all():
            report.problems.append(f"{name}: has numbers that are none (inf or nan)")
    report.dtypes = dict(dtypes)
    # Numbers of layers and experts are no part of what a module is called.
    ends = collections.Counter(".".join(re.sub(r"\.\d+(?=\.|$)", "", name).split(".")[-2:]) for name in modules)
    report.modules = dict(sorted(ends.items()))


def print_adapter(report: AdapterReport) -> None:
    console = PrintableConsole(highlight=False, soft_wrap=True)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("adapter", escape(report.directory))
    if report.kind is not None:
        scaling = "α/√r (rank-stabilized)" if report.rslora else "α/r"
        facts.add_row("kind", {"lora": "LoRA", "dora": "DoRA"}[report.kind])
        facts.add_row("rank r, α", f"{report.rank}, {report.alpha:g}; scaled by {scaling}")
        facts.add_row("trained on", escape(f"{report.base or 'not known'}, digest {report.base_digest or 'not known'}"))
    sizes = ", ".join(f"{name} {filesize.decimal(size)}" for name, size in report.dtypes.items())
    facts.add_row("stored as", sizes or "nothing")
    console.print(facts)
    if report.modules:
        table = Table("modules", title=f"{report.parameters:,} parameters", title_justify="left")
        table.add_column("number", justify="right")
        for name, count in report.modules.items():
            table.add_row(escape(name), f"{count:,}")
        console.print(table)
    for note in report.notes:
        console.print(f"note: {escape(note)}")
    for problem in report.problems:
        console.print(f"[red]problem:[/red] {escape(problem)}")
    console.print("[green]ok: usable with its checkpoint[/green]" if report.ok else "[red]not usable[/red]")
