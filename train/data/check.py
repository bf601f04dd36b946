"""`dsvl2 data check`: reads a whole data set as training would, and says what is in it and what is wrong with it."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsvl2_jax import fields
from dsvl2_jax.checkpoint.locate import resolve
from dsvl2_jax.checkpoint.staging import replacing
from dsvl2_jax.errors import DataError, UsageError
from dsvl2_jax.inputs.grounding import draw_boxes
from dsvl2_jax.inputs.images import TRAITS, trait_notes
from dsvl2_jax.inputs.processor import Processor
from dsvl2_jax.inputs.record_boxes import AUTO, BOX_KINDS
from dsvl2_jax.inputs.records import NO_LOSS
from dsvl2_jax.inputs.tokenizer import DET_TOKEN
from dsvl2_jax.model.config import TEXT_POSITION
from dsvl2_jax.runtime.console import PrintableConsole
from dsvl2_jax.runtime.progress import progress
from dsvl2_jax.train.data.notes import BOXES, GUESSED, UNUSED, Notes, UnusedKey, split_name
from dsvl2_jax.train.data.samples import SampleSource, SkippedSample
from dsvl2_jax.train.settings.check import FUNCTION_NAME, check_function
from dsvl2_jax.train.settings.load import parse_value
from dsvl2_jax.train.settings.schema import DataSettings, SourceSettings

_AT_A_TIME = 512  # samples handed to the threads; bounds what waits
_BAR = 40  # characters
_MOST_DRAWN = 20  # samples


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was found; lengths are those of the usable samples, in the data's order."""

    files: int
    samples: int
    broken: dict[str, int]  # reason → samples
    problems: list[str]  # "file:line: what", the first ones
    tokens: np.ndarray  # i64[usable]
    supervised: np.ndarray  # i64[usable], tokens that are learnt
    tiles: np.ndarray  # i64[usable]
    sequence_length: int
    tiles_per_sequence: int
    traits: dict[str, int] = dataclasses.field(default_factory=dict)  # of `TRAITS`: pictures of the usable samples
    without_loss: int = 0  # samples that say themselves that nothing of them is learnt
    boxes: dict[str, int] = dataclasses.field(default_factory=dict)  # of `BOX_KINDS`: samples with objects
    unused: list[UnusedKey] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)  # what is to be said about the two
    with_boxes: list[int] = dataclasses.field(default_factory=list)  # samples whose text has boxes, the first ones
    image_tokens: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))  # i64[usable]

    @property
    def broken_samples(self) -> int:
        return sum(self.broken.values())

    @property
    def too_long(self) -> int:
        """Whole samples that do not fit into a row: training skips or truncates them."""
        return int(((self.tokens > self.sequence_length) | (self.tiles > self.tiles_per_sequence)).sum())

    def as_dict(self) -> dict[str, object]:
        """The counts, for JSON."""
        return {
            "files": self.files,
            "samples": self.samples,
            "broken_samples": self.broken_samples,
            "broken": self.broken,
            "problems": self.problems,
            "with_images": int((self.tiles > 0).sum()),
            "text_only": int((self.tiles == 0).sum()),
            "too_long": self.too_long,
            "without_loss": self.without_loss,
            "pictures": self.traits,
            "boxes": self.boxes,
            "unused_keys": [dataclasses.asdict(key) for key in self.unused],
            "sequence_length": self.sequence_length,
            "tiles_per_sequence": self.tiles_per_sequence,
            "tokens": _spread(self.tokens),
            "image_tokens": _spread(self.image_tokens),
            "supervised_tokens": _spread(self.supervised),
            "tiles": _spread(self.tiles),
        }


def examine(
    path: str,
    *,
    processor: Processor,
    images: str = "",
    follow_links: bool = False,
    boxes: str = AUTO,
    sequence_length: int = 4096,
    tiles_per_sequence: int = 20,
    mask_prompt: bool = False,
    most_problems: int = 20,
    count: int | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Summary:
    """Reads every sample once, on all cores.

    Args:
      path, images, follow_links, boxes, arguments: as in `SourceSettings`.
      mask_prompt: count answers alone as learnt.
      most_problems: how many are kept in words; all are counted.
      count: None: ``path`` names files; else it names a function, as "module:name", with so many records.

    Raises:
      DataError: there is no file, no sample, no folder of images or no such function.
      UsageError: options that a function does not have.
    """
    settings = _settings(path, images, follow_links, boxes, count, arguments or {})
    source = _open(settings, processor, mask_prompt)
    det = processor.tokenizer.encode(DET_TOKEN)[0]
    notes, without_loss, with_boxes = Notes(), 0, []
    broken: Counter[str] = Counter()
    problems: list[str] = []
    sizes: list[tuple[int, int, int, int]] = []
    traits = Counter(dict.fromkeys(TRAITS, 0))
    for index, sample in enumerate(_measured(source, det)):
        if isinstance(sample, SkippedSample) and sample.reason == NO_LOSS:
            without_loss += 1
        elif isinstance(sample, SkippedSample):
            broken[sample.reason] += 1
            if len(problems) < most_problems:
                problems.append(f"{sample.name}: {sample.message}")
        else:
            sizes.append((sample.tokens, sample.learnt, sample.tiles, sample.image_tokens))
            traits.update(sample.traits)
            for _ in notes.take(sample.notes):
                pass  # all is said at the end
            if sample.boxes and len(with_boxes) < _MOST_DRAWN:
                with_boxes.append(index)
    tokens, supervised, tiles, image_tokens = np.array(sizes, np.int64).reshape(-1, 4).T
    return Summary(
        len(source.files),
        len(source),
        dict(broken.most_common()),
        problems,
        tokens,
        supervised,
        tiles,
        sequence_length,
        tiles_per_sequence,
        dict(traits),
        without_loss,
        {kind: notes.boxes[kind] for kind in BOX_KINDS},
        notes.unused,
        notes.totals(),
        with_boxes,
        image_tokens,
    )


def check(
    path: str,
    *,
    checkpoint: str | None = None,
    images: str = "",
    follow_links: bool = False,
    boxes: str = AUTO,
    sequence_length: int = 4096,
    tiles_per_sequence: int = 20,
    mask_prompt: bool = False,
    as_seen: bool = False,
    max_tiles: int | None = None,
    min_tiles: int | None = None,
    frames: int | None = None,
    frame_choice: str | None = None,
    count: int | None = None,
    arguments: Sequence[str] = (),
    most_problems: int = 20,
    histogram: Path | None = None,
    draw: Path | None = None,
    as_json: bool = False,
) -> int:
    """Examines a data set and prints the summary.

    Args:
      checkpoint: whose tokenizer and tiling; None: the bundled model's. The others are as in `examine`.
      as_seen, max_tiles, min_tiles, frames, frame_choice: as the settings of these names under ``data``.
      arguments: of a function, each as "name=value" with a value as `dsvl2 train` reads one.
      histogram: a PNG to write.
      draw: a folder to write the pictures of some samples to, with their boxes.
      as_json: prints one JSON object instead of tables.

    Returns:
      0, or 1 when a sample is broken.

    Raises:
      DataError: as `examine` does. CheckpointError: there is no such checkpoint. UsageError: `histogram` is no PNG.
    """
    if histogram is not None and histogram.suffix.lower() != ".png":
        raise UsageError(f"--histogram {histogram}: give a file name that ends in .png.")
    if boxes not in (AUTO, *BOX_KINDS):
        raise UsageError(f"--boxes {boxes}: is none of {', '.join((AUTO, *BOX_KINDS))}.")
    given = _arguments(arguments)
    settings = _settings(path, images, follow_links, boxes, count, given)
    processor = Processor.from_dir(resolve(checkpoint), as_seen=as_seen, warns=False)
    processor.set_visuals(max_tiles, min_tiles, frames, frame_choice)
    if draw is not None:
        _make(draw)
    summary = examine(
        path,
        processor=processor,
        images=images,
        follow_links=follow_links,
        boxes=boxes,
        sequence_length=sequence_length,
        tiles_per_sequence=tiles_per_sequence,
        mask_prompt=mask_prompt,
        most_problems=most_problems,
        count=count,
        arguments=given,
    )
    if as_json:
        print(json.dumps(summary.as_dict(), indent=2, ensure_ascii=False))
    else:
        _print(summary, bundled=checkpoint is None, as_seen=as_seen)
    if histogram is not None:
        draw_histogram(summary, histogram)
    if draw is not None:
        drawn = _draw_samples(_open(settings, processor, mask_prompt), summary.with_boxes, draw)
        print(f"pictures with boxes in {draw}: {drawn}", file=sys.stderr if as_json else sys.stdout)
    return 1 if summary.broken_samples else 0


def draw_histogram(summary: Summary, path: Path) -> None:
    """Writes the token and tile histograms to a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    tokens, tiles = figure.subplots(1, 2)
    text_only = summary.tiles == 0
    edges = np.linspace(0, max(int(summary.tokens.max(initial=1)), 1), 41)
    split = [summary.tokens[text_only], summary.tokens[~text_only]]
    tokens.hist(split, bins=edges, stacked=True, label=["text only", "with images"])
    tokens.axvline(summary.sequence_length, color="black", linestyle="--", linewidth=1, label="a row")
    tokens.set_xlim(0, edges[-1] * 1.02)
    tokens.set(xlabel="tokens of a sample", ylabel="samples")
    tokens.legend()
    counts = np.bincount(summary.tiles)
    tiles.bar(np.arange(len(counts)), counts)
    tiles.set(xlabel="image tiles of a sample", ylabel="samples")
    with replacing(path) as new:
        figure.savefig(new, dpi=120, format=path.suffix.removeprefix(".") or "png")


def _settings(
    path: str, images: str, follow_links: bool, boxes: str, count: int | None, arguments: Mapping[str, Any]
) -> SourceSettings:
    """What is checked. Raises UsageError for options that do not go together."""
    settings = SourceSettings(path=path, images=images, follow_links=follow_links, boxes=boxes)
    if count is None and arguments:
        raise UsageError("--argument is of a function. Give --count too, the number of its records to check.")
    if count is None:
        if FUNCTION_NAME.fullmatch(path) and not os.path.exists(path):
            raise UsageError(f"{path}: no such file. If it is a function, give --count, the number of records to read.")
        return settings
    settings = dataclasses.replace(settings, path="", function=path, count=count, arguments=arguments)
    fields.refuse(check_function(settings, ()), UsageError, f"{path}: cannot be checked as a function:")
    return settings


def _arguments(given: Sequence[str]) -> dict[str, Any]:
    arguments = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not separator or not name.strip():
            raise UsageError(f"--argument {text}: is not of the form NAME=VALUE, such as seed=4.")
        arguments[name.strip()] = parse_value(value.strip())
    return arguments


def _open(settings: SourceSettings, processor: Processor, mask_prompt: bool) -> SampleSource:
    label = settings.path or settings.function.partition(":")[2]
    return SampleSource(label, settings, processor, DataSettings(mask_prompt=mask_prompt))


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--draw {folder}: cannot be made ({error.strerror}). Give a folder to write to.") from None


def _draw_samples(source: SampleSource, indices: Sequence[int], folder: Path) -> int:
    """Writes the images of samples with their boxes, and returns how many.

    They are FILE-LINE-IMAGE.png, of a function NAME-NUMBER-IMAGE.png.
    """
    drawn = 0
    for index in indices:
        file, line, _ = split_name(source.name(index))
        for number, (image, boxes) in enumerate(source.with_boxes(index)):
            if not boxes:
                continue
            target = folder / f"{Path(file).name}-{line.replace('/', '-')}-{number}.png"
            try:
                draw_boxes(image, boxes).save(target)
            except OSError as error:
                raise DataError(f"{target}: cannot be written ({error.strerror or error}).") from None
            drawn += 1
    return drawn


class _Measured(NamedTuple):
    """What is counted of a usable sample."""

    tokens: int
    learnt: int  # tokens
    tiles: int
    image_tokens: int
    traits: tuple[str, ...]  # of images
    boxes: bool  # whether its text has some
    notes: dict[str, object]  # for `Notes`


def _measured(source: SampleSource, det: int) -> Iterator[_Measured | SkippedSample]:
    """The counts of each sample in order, or what is wrong with it; ``det`` is the token that begins boxes."""

    def measure(index: int) -> _Measured | SkippedSample:
        item = source[index]
        if isinstance(item, SkippedSample):
            return item
        # A segment's first token is never predicted.
        learnt = int((item["tokens"][1:, 1] >= 0).sum())
        boxes = bool((item["tokens"][:, 0] == det).any())
        told = {key: item[key] for key in ("name", UNUSED, BOXES, GUESSED)}
        image_tokens = int((item["tokens"][:, 2] != TEXT_POSITION).sum())
        return _Measured(
            len(item["tokens"]), learnt, len(item["tiles"]), image_tokens, item["image_traits"], boxes, told
        )

    with (
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads,
        progress("reading", len(source), unit="items", transient=True) as advance,
    ):
        for start in range(0, len(source), _AT_A_TIME):
            for result in threads.map(measure, range(start, min(start + _AT_A_TIME, len(source)))):
                advance(1)
                yield result


def _print(summary: Summary, bundled: bool, as_seen: bool) -> None:
    console, counts = PrintableConsole(highlight=False), summary.as_dict()
    table = Table(box=None, show_header=False)
    rows = [
        ("files", summary.files),
        ("samples", summary.samples),
        ("  with images", counts["with_images"]),
        ("  text only", counts["text_only"]),
        ("  broken", summary.broken_samples),
        *([("  without a loss, as they say", summary.without_loss)] if summary.without_loss else []),
        (f"  over {summary.sequence_length} tokens or {summary.tiles_per_sequence} tiles", summary.too_long),
        ("tokens", int(summary.tokens.sum())),
        ("  of images", int(summary.image_tokens.sum())),
        ("  learnt", int(summary.supervised.sum())),
        ("tiles", int(summary.tiles.sum())),
        *((f"  {trait} pictures", count) for trait, count in summary.traits.items() if count),
        *((f"samples with boxes in {kind}", count) for kind, count in summary.boxes.items() if count),
    ]
    for name, value in rows:
        table.add_row(name, f"{value:,}")
    console.print(table)
    if bundled:
        console.print(
            "Tokens and tiles are counted as the bundled model does; --ckpt gives those of yours.", style="dim"
        )
    pictures = Counter(summary.traits).elements()
    for note in () if as_seen else trait_notes(pictures, "data.as_seen = true (here --as-seen)"):
        console.print(escape(note), style="yellow", soft_wrap=True)
    for note in summary.notes:
        console.print(escape(note), style="yellow", soft_wrap=True)
    _print_bars(console, "tokens of a sample", summary.tokens, _doublings(summary.tokens))
    _print_bars(console, "image tiles of a sample", summary.tiles, _tile_edges(summary.tiles))
    if summary.broken:
        reasons = ", ".join(f"{escape(reason)} {count:,}" for reason, count in summary.broken.items())
        console.print(f"[bold red]broken: {summary.broken_samples:,}[/] ({reasons})", soft_wrap=True)
        for problem in summary.problems:
            console.print(f"  {escape(problem)}", soft_wrap=True)
        if summary.broken_samples > len(summary.problems):
            console.print(f"  … and {summary.broken_samples - len(summary.problems):,} more")


def _print_bars(console: Console, title: str, values: np.ndarray, edges: Sequence[int]) -> None:
    """A histogram whose bin i is edges[i] … edges[i + 1] - 1."""
    if not len(values):
        return
    counts, _ = np.histogram(values, bins=np.array(edges) - 0.5)
    table = Table(box=None, show_header=False, title=title, title_justify="left")
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        label = f"{low}" if high == low + 1 else f"{low}–{high - 1}"
        bar = "█" * -(-int(count) * _BAR // int(counts.max()))
        table.add_row(label, f"{int(count):,}", bar)
    console.print(table)


def _doublings(tokens: np.ndarray) -> list[int]:
    first = int(tokens.min(initial=1 << 30)).bit_length() - 1
    last = int(tokens.max(initial=1)).bit_length()
    return [1 << power for power in range(min(first, last - 1), last + 1)]


def _tile_edges(tiles: np.ndarray) -> list[int]:
    most = int(tiles.max(initial=0))
    fine = list(range(min(most, 10) + 2))
    return fine + list(range(fine[-1] + 5, most + 6, 5)) if most > 10 else fine


def _spread(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {"sum": 0}
    quartiles = np.percentile(values, [50, 90, 99], method="inverted_cdf").astype(int).tolist()
    return {
        "sum": int(values.sum()),
        "min": int(values.min()),
        **dict(zip(("median", "p90", "p99"), quartiles, strict=True)),
        "max": int(values.max()),
    }
