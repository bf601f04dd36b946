"""How many decode slots a server has room for, from arithmetic alone: `dsvl2 serve --plan`.

Tested in tests/apps/plan/test_slots.py.
"""

from __future__ import annotations

import dataclasses

import jax
from rich.table import Table

from dsvl2_jax.apps.plan.job import Job
from dsvl2_jax.apps.plan.mesh_choice import MAX_MEMORY_FRACTION, resident_bytes
from dsvl2_jax.checkpoint.adapters import read_adapter
from dsvl2_jax.checkpoint.locate import open_model, quantization_in, resolve
from dsvl2_jax.infer.loading import LoadOptions
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.quantization import Quantization
from dsvl2_jax.runtime.console import PrintableConsole
from dsvl2_jax.runtime.hardware import device_memory
from dsvl2_jax.sharding import MESH_AXES, parse_mesh


def print_slots(ckpt: str | None, loading: LoadOptions, wanted: int, stores: int) -> int:
    """Says how many slots fit into the memory of this machine's devices.

    Args:
      wanted: slots that are asked for.
      stores: bytes that the engine's stores may take.

    Returns:
      The exit status: 1 when those that were asked for do not.
    """
    directory = resolve(ckpt)
    config, _ = open_model(directory)
    sizes = dict.fromkeys(MESH_AXES, 1) | ({} if loading.mesh is None else parse_mesh(loading.mesh))
    itemsize = 4 if loading.dtype == "float32" else 2
    read = [read_adapter(adapter, config)[0] for adapter in (loading.adapter or {}).values()]
    adapters = itemsize * sum(array.size for array in jax.tree.leaves(read))
    report = slots_that_fit(
        config,
        sizes,
        itemsize=itemsize,
        cache_dtype=loading.cache_dtype or loading.dtype,
        memory=device_memory(jax.local_devices()[0]),
        stores=stores + adapters,
        quantization=quantization_in(directory),
        context=loading.context,
    )
    table = Table(show_header=False, box=None)
    for words, value in (
        ("memory of a device", f"{report.memory / 1e9:.2f} GB"),
        ("of which parameters, caches and stores may take", f"{report.room / 1e9:.2f} GB"),
        ("parameters", f"{report.parameters / 1e9:.3f} GB"),
        *([("adapters", f"{adapters / 1e9:.3f} GB")] if read else []),
        ("stores of prefixes and pictures", f"{stores / 1e9:.3f} GB"),
        (f"cache of a slot, {report.context} positions", f"{report.slot / 1e6:.1f} MB"),
        ("slots that fit", str(report.slots)),
        ("slots that are asked for", str(wanted)),
    ):
        table.add_row(words, value)
    PrintableConsole().print(table)
    return 0 if report.slots >= wanted else 1


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
    config: Config,
    sizes: dict[str, int],
    *,
    itemsize: int,
    memory: float,
    stores: float,
    quantization: Quantization | None = None,
    cache_dtype: str = "bfloat16",
    context: int | None = None,
) -> SlotsReport:
    """How many slots of the whole context fit beside parameters and stores, with room for programs to work.

    Args:
      sizes: of the mesh's axes.
      itemsize: bytes of a parameter that is not quantized.
      cache_dtype: of the caches.
      memory: bytes of a device.
      stores: bytes that the engine's stores may take.
      quantization: of the weights.
      context: positions of a slot; None: as many as the model has.
    """
    context = context or config.language.max_position_embeddings

    def resident(slots: int) -> float:
        job = Job("decode", slots, context, quantization=quantization, cache_dtype=cache_dtype)
        return resident_bytes(config, job, sizes, itemsize)

    # Rows are split over the mesh; a number of them that all its parts share makes a slot's part of each.
    many = 64 * sizes["data"] * sizes["tensor"] * sizes["expert"]
    slot = (resident(many) - resident(0)) / many
    parameters = resident(0)
    room = MAX_MEMORY_FRACTION * memory
    slots = max(0, int((room - parameters - stores) / slot))
    return SlotsReport(memory, room, parameters, stores, slot, context, slots)
