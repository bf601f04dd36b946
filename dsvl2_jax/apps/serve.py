"""What `dsvl2 serve` does: loads the model, builds the application around the engine, and runs it until it is stopped.

Tested in tests/apps/test_serve.py.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from dsvl2_jax.apps.plan.job import ITEMSIZE, Job
from dsvl2_jax.apps.plan.mesh_choice import MAX_MEMORY_FRACTION, resident_bytes
from dsvl2_jax.checkpoint.locate import open_model, resolve
from dsvl2_jax.errors import TokenizerError
from dsvl2_jax.infer.constraints import GrammarCompiler
from dsvl2_jax.infer.engine import Model
from dsvl2_jax.infer.eval.evaluate import checkpoint_name
from dsvl2_jax.infer.loading import LoadOptions, load
from dsvl2_jax.infer.serve.app import create_app
from dsvl2_jax.infer.serve.async_engine import AsyncEngine, EngineOptions
from dsvl2_jax.infer.serve.media import Media, MediaOptions
from dsvl2_jax.infer.serve.run import ListenOptions, Server
from dsvl2_jax.infer.serve.state import ServeOptions
from dsvl2_jax.model.config import Config
from dsvl2_jax.sharding import MESH_AXES, parse_mesh

_BUNDLED = "micro"


def serve(
    ckpt: str | None,
    *,
    loading: LoadOptions,
    engine_options: EngineOptions,
    options: ServeOptions,
    media: MediaOptions,
    listen: ListenOptions,
) -> None:
    """Serves until SIGTERM or Ctrl-C. Prints the address on standard output once requests are answered, nothing else.

    Args:
      options: an empty ``model_name`` becomes the checkpoint's.

    Raises:
      DSVL2Error: the checkpoint cannot be used, or the address not be listened at.
    """
    _log_to_standard_error()
    name = options.model_name or (_BUNDLED if ckpt is None else checkpoint_name(resolve(ckpt)))
    model = load(ckpt, loading)
    engine = AsyncEngine(model, engine_options)
    app = create_app(
        engine,
        dataclasses.replace(options, model_name=name),
        Media(media, engine.pool),
        _grammars(model),
    )
    server = Server(
        engine,
        app,
        listen,
        say=_say,
        on_ready=lambda address: print(address, flush=True),
    )
    server.run()


def _grammars(model: Model) -> GrammarCompiler | None:
    try:
        return GrammarCompiler(model.processor.tokenizer, model.config.language.vocab_size)
    except TokenizerError as error:
        _say(str(error))  # everything else works without it
        return None


def _say(text: str) -> None:
    print(f"dsvl2 serve: {text}", file=sys.stderr, flush=True)


def plan(ckpt: str | None, loading: LoadOptions, engine_options: EngineOptions) -> int:
    """Says how many slots fit into the memory of this machine's devices.

    Returns:
      The exit status: 1 when those that were asked for do not.
    """
    config, _ = open_model(resolve(ckpt))
    sizes = dict.fromkeys(MESH_AXES, 1) | ({} if loading.mesh is None else parse_mesh(loading.mesh))
    report = slots_that_fit(
        config,
        sizes,
        itemsize=4 if loading.dtype == "float32" else 2,
        memory=_device_memory(),
        stores=engine_options.prefix_bytes + engine_options.feature_bytes,
    )
    table = Table(show_header=False, box=None)
    for words, value in (
        ("memory of a device", f"{report.memory / 1e9:.2f} GB"),
        ("of which parameters, caches and stores may take", f"{report.room / 1e9:.2f} GB"),
        ("parameters", f"{report.parameters / 1e9:.3f} GB"),
        ("stores of prefixes and pictures", f"{report.stores / 1e9:.3f} GB"),
        (f"cache of a slot, {report.context} positions", f"{report.slot / 1e6:.1f} MB"),
        ("slots that fit", str(report.slots)),
        ("slots that are asked for", str(engine_options.slots)),
    ):
        table.add_row(words, value)
    Console().print(table)
    return 0 if report.slots >= engine_options.slots else 1


@dataclasses.dataclass(frozen=True)
class SlotsReport:
    """Bytes of one device, and the slots that they have room for."""

    memory: float
    room: float
    parameters: float
    stores: float
    slot: float
    context: int
    slots: int


def slots_that_fit(
    config: Config, sizes: dict[str, int], *, itemsize: int, memory: float, stores: float
) -> SlotsReport:
    """How many slots of the whole context fit beside parameters and stores, with room for programs to work.

    Args:
      sizes: of the mesh's axes.
      itemsize: bytes of a parameter and of a cache's entry.
      memory: bytes of a device.
      stores: bytes that the engine's stores may take.
    """
    context = config.language.max_position_embeddings

    def resident(slots: int) -> float:
        return resident_bytes(config, Job("decode", slots, context), sizes) * itemsize / ITEMSIZE

    # Rows are split over the mesh; a number of them that all its parts share makes a slot's part of each.
    many = 64 * sizes["data"] * sizes["tensor"] * sizes["expert"]
    parameters = resident(0)
    slot = (resident(many) - parameters) / many
    room = MAX_MEMORY_FRACTION * memory
    slots = max(0, int((room - parameters - stores) / slot))
    return SlotsReport(memory, room, parameters, stores, slot, context, slots)


def _device_memory() -> float:
    """Bytes of one device; a CPU has the machine's, or what its container may use of it."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(memory, float(text)) if text.isdecimal() else memory


def _log_to_standard_error() -> None:
    """A line for each request and for what goes wrong. The HTTP library tells no more than its warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("dsvl2").addHandler(handler)
    logging.getLogger("dsvl2").setLevel(logging.INFO)
    logging.getLogger("dsvl2").propagate = False
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
