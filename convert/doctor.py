"""Is this checkpoint usable, and what is it: a look at every file and every number of either layout."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from rich import filesize
from rich.markup import escape
from rich.table import Table

from dsvl2_jax.checkpoint import rules
from dsvl2_jax.checkpoint.leaves import leaf_bytes
from dsvl2_jax.checkpoint.load import absent_leaves, open_orbax, read_leaves
from dsvl2_jax.checkpoint.locate import PARAMS_NAME, kind, model_files, resolve
from dsvl2_jax.checkpoint.quantized_tensors import stored_as
from dsvl2_jax.checkpoint.safetensors_source import Source
from dsvl2_jax.checkpoint.verify import verify as verify_files
from dsvl2_jax.convert.doctor_adapter import AdapterReport, adapter_at, examine_adapter, print_adapter
from dsvl2_jax.errors import CheckpointError, ConfigError, TokenizerError
from dsvl2_jax.inputs.processor import ProcessorConfig
from dsvl2_jax.inputs.tokenizer import Tokenizer
from dsvl2_jax.messages import listed
from dsvl2_jax.model.config import Config, keys_without_meaning
from dsvl2_jax.model.parameter_paths import LeafPath, path_name
from dsvl2_jax.model.quantization import bytes_in_bfloat16, kinds_of
from dsvl2_jax.model.released import variant
from dsvl2_jax.runtime.console import PrintableConsole
from dsvl2_jax.runtime.progress import progress

_UNUSED = "vision.attn_pool (present, unused)"
_LAYOUTS = {"orbax": "converted (Orbax)", "released": "released (safetensors)", "run": "of a training run (Orbax)"}


@dataclasses.dataclass
class Report:
    """What `examine` found. ``ok`` is False when there is any problem."""

    directory: str
    layout: str  # "orbax", "released" or "run"
    variant: str | None = None  # "tiny", "small", "base" or "other"; None without a usable config.json
    parameters: dict[str, int] = dataclasses.field(default_factory=dict)  # component → count, and TOTAL
    dtypes: dict[str, int] = dataclasses.field(default_factory=dict)  # stored dtype → bytes
    quantized: dict[str, int] = dataclasses.field(default_factory=dict)  # kind → weights that are kept so
    bfloat16_bytes: int | None = None  # memory of the parameters in bfloat16, quantized ones and the router's as stored
    special_tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)  # what was tolerated, and what means nothing
    non_finite: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)  # tensor → {"nan", "inf"}
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def doctor(ckpt: str | Path | None = None, *, verify: bool = False, as_json: bool = False) -> int:
    """Examines a checkpoint in either layout, or an adapter's directory, and prints the report.

    Args:
      ckpt: a converted directory, a directory in the released layout, a training run (its newest checkpoint) or one
        of its checkpoints, or a hub id; None: the built-in model. Or a directory of an adapter's files, or a run that
        trains one.
      verify: reads every file and compares it with its digest as well; of an adapter that is done always.
      as_json: prints one JSON object instead of tables.

    Returns:
      0 when the checkpoint is usable, else 1.

    Raises:
      CheckpointError: there is no such checkpoint.
    """
    adapter = adapter_at(ckpt)
    report = examine(ckpt, verify=verify) if adapter is None else examine_adapter(adapter)
    if as_json:
        print(json.dumps(dataclasses.asdict(report) | {"ok": report.ok}, indent=2, ensure_ascii=False))
    elif isinstance(report, AdapterReport):
        print_adapter(report)
    else:
        _print(report)
    return 0 if report.ok else 1


def examine(ckpt: str | Path | None, *, verify: bool = False) -> Report:
    """Everything about a checkpoint that can be known without running it; every tensor is read once.

    Args:
      verify: compare every file with its digest, too.

    Raises:
      CheckpointError: there is no such checkpoint. Whatever is wrong inside it becomes a problem of the report.
    """
    directory = resolve(ckpt)
    report = Report(str(directory), kind(directory))
    files = model_files(directory)
    if verify:
        try:
            report.notes += verify_files(directory)
        except CheckpointError as error:
            report.problems.append(str(error))
    try:
        config = Config.from_file(files)
        report.notes += keys_without_meaning(files)
    except ConfigError as error:
        report.problems.append(str(error))
        return report
    report.variant = variant(config)
    report.parameters = count_parameters(config)
    report.bfloat16_bytes = bytes_in_bfloat16(config, {})
    try:
        ProcessorConfig.from_dir(files)
    except ConfigError as error:
        report.problems.append(str(error))
    try:
        tokenizer = Tokenizer.from_dir(files)
        report.special_tokens = {
            tokenizer.bos_token: tokenizer.bos_id,
            tokenizer.eos_token: tokenizer.eos_id,
            **tokenizer.special_ids,
        }
        tokenizer.check_fits(config.language.vocab_size)
    except TokenizerError as error:
        report.problems.append(str(error))
    try:
        examine_tensors = _examine_released if report.layout == "released" else _examine_orbax
        examine_tensors(directory, config, report)
    except CheckpointError as error:
        report.problems.append(str(error))
    if report.non_finite:
        tensors = [
            f"{name}: {counts['nan']} NaN, {counts['inf']} infinite" for name, counts in report.non_finite.items()
        ]
        report.problems.append(
            f"{len(tensors)} tensors have numbers that are not finite, so outputs will be garbage; download or convert "
            f"again:\n{listed(tensors)}"
        )
    return report


def count_parameters(config: Config) -> dict[str, int]:
    """Component → number of parameters, and their sum as TOTAL."""
    counts = dict.fromkeys(
        (
            "image_newline+view_seperator",
            "vision (used)",
            _UNUSED,
            "projector",
            "language.embed_tokens",
            "language.attention",
            "language.dense_mlp",
            "language.norms",
            "language.routed_experts",
            "language.router",
            "language.shared_experts",
            "language.lm_head",
        ),
        0,
    )
    for leaf in rules.expand(config):
        counts[_component(leaf.path)] += math.prod(leaf.shape)
    return counts | {"TOTAL": sum(counts.values())}


def _component(path: LeafPath) -> str:
    if path[0] == "vision":
        return _UNUSED if path[1] == "attn_pool" else "vision (used)"
    if path[0] != "language":
        return "projector" if path[0] == "projector" else "image_newline+view_seperator"
    if path[1] in ("embed_tokens", "lm_head"):
        return f"language.{path[1]}"
    if "self_attn" in path:
        return "language.attention"  # its latent norms included
    if "mlp" not in path:
        return "language.norms"
    component = {"experts": "routed_experts", "router": "router", "shared_experts": "shared_experts"}
    return f"language.{component.get(path[3], 'dense_mlp')}"


def count_non_finite(values: np.ndarray) -> tuple[int, int]:
    """(NaN, infinite) elements of an array, by their bits: ml_dtypes' own test is slow.

    Args:
      values: float32, float16, bfloat16 or float8_e4m3fn (which has no infinity), or whole numbers.
    """
    if values.dtype.kind in "iu":
        return 0, 0
    if values.dtype.itemsize == 1:
        return int(np.count_nonzero((values.view(np.uint8) & 0x7F) == 0x7F)), 0
    if values.dtype.itemsize == 4:
        bits, exponent = values.view(np.uint32), 0x7F800000
    else:
        bits, exponent = values.view(np.uint16), 0x7C00 if values.dtype == np.float16 else 0x7F80
    special = bits[(bits & exponent) == exponent]
    infinite = int(np.count_nonzero((special & (exponent ^ (2 ** (8 * bits.itemsize - 1) - 1))) == 0))
    return special.size - infinite, infinite


def _examine_released(directory: Path, config: Config, report: Report) -> None:
    with Source(directory) as source:
        source.fit(config)
        report.notes += source.notes
        if rules.lacks_unused(source.tensors):
            _leave_out_unused(report)
        _add_dtypes(report, ((stored_as(tensor), tensor.size) for tensor in source.tensors.values()))
        for problem, tensors in rules.compare(source.shapes_and_dtypes, config).items():
            report.problems.append(f"{len(tensors)} {problem}:\n{listed(tensors)}")
        with progress("reading tensors", source.total_bytes) as advance:
            for name, tensor in source.tensors.items():
                if tensor.dtype in rules.FLOAT_DTYPES:
                    for block in source.blocks(name):
                        _add_non_finite(report, name, block)
                advance(tensor.size)


def _examine_orbax(directory: Path, config: Config, report: Report) -> None:
    manifest, stored = open_orbax(directory, config)
    report.notes += manifest.get("notes", [])
    if absent_leaves(directory / PARAMS_NAME, stored):
        _leave_out_unused(report)
    kinds = kinds_of(stored)
    report.quantized = dict(collections.Counter(kinds.values()))
    report.bfloat16_bytes = bytes_in_bfloat16(config, kinds)
    _add_dtypes(report, ((dtype.name, leaf_bytes(shape, dtype)) for shape, dtype in stored.values()))
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    with progress("reading parameters", sum(leaf_bytes(*entry) for entry in stored.values())) as advance:
        for path, parameter in read_leaves(directory / PARAMS_NAME, stored, dict.fromkeys(stored, host)):
            _add_non_finite(report, path_name(path), np.asarray(parameter))
            advance(parameter.nbytes)


def _leave_out_unused(report: Report) -> None:
    report.parameters["TOTAL"] -= report.parameters[_UNUSED]
    report.parameters[_UNUSED] = 0


def _add_dtypes(report: Report, sizes: Iterator[tuple[str, int]]) -> None:
    total: collections.Counter[str] = collections.Counter()
    for dtype, size in sizes:
        total[dtype] += size
    report.dtypes = dict(total)


def _add_non_finite(report: Report, name: str, values: np.ndarray) -> None:
    nan, infinite = count_non_finite(values.reshape(-1))
    if nan or infinite:
        counts = report.non_finite.setdefault(name, {"nan": 0, "inf": 0})
        counts["nan"] += nan
        counts["inf"] += infinite


def _print(report: Report) -> None:
    console = PrintableConsole(highlight=False, soft_wrap=True)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("checkpoint", escape(report.directory))
    facts.add_row("layout", _LAYOUTS[report.layout])
    if report.variant is not None:
        facts.add_row("variant", report.variant)
        facts.add_row(
            "stored as", ", ".join(f"{name} {filesize.decimal(size)}" for name, size in report.dtypes.items())
        )
        if report.quantized:
            facts.add_row("quantized", ", ".join(f"{count} weights {name}" for name, count in report.quantized.items()))
        facts.add_row("memory in bfloat16", f"{filesize.decimal(report.bfloat16_bytes)} for the parameters")
    console.print(facts)
    if report.parameters:
        table = Table("component", title="Parameters", title_justify="left")
        table.add_column("parameters", justify="right")
        for component, count in report.parameters.items():
            table.add_row(component, f"{count:,}", style="bold" if component == "TOTAL" else "")
        console.print(table)
    if report.special_tokens:
        table = Table("special token", title="Tokenizer", title_justify="left")
        table.add_column("id", justify="right")
        for token, index in report.special_tokens.items():
            table.add_row(escape(token), str(index))
        console.print(table)
    for note in report.notes:
        console.print(f"note: {escape(note)}")
    for problem in report.problems:
        console.print(f"[red]problem:[/red] {escape(problem)}")
    console.print("[green]ok: usable[/green]" if report.ok else "[red]not usable[/red]")
