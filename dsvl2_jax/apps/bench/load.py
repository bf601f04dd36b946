"""`dsvl2 bench load`: what each of several processes reads and holds while a checkpoint is loaded onto their mesh."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dsvl2_jax.apps.bench.measure import drop_from_page_cache, machine, need_at_least, own_bytes, restart_peak
from dsvl2_jax.apps.bench.random_checkpoint import random_checkpoint
from dsvl2_jax.checkpoint.leaves import leaf_bytes
from dsvl2_jax.checkpoint.load import load_params, open_orbax
from dsvl2_jax.checkpoint.locate import PARAMS_NAME, kind, open_model, resolve
from dsvl2_jax.checkpoint.rules import FLOAT_DTYPES
from dsvl2_jax.checkpoint.safetensors_source import READ_BYTES, Source, numpy_dtype
from dsvl2_jax.convert.to_orbax import convert
from dsvl2_jax.errors import DSVL2Error
from dsvl2_jax.model.released import released_config
from dsvl2_jax.runtime import processes
from dsvl2_jax.runtime.malloc import keep_freed_memory
from dsvl2_jax.sharding import check_mesh, make_mesh, parse_mesh


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What one process measured. Sizes are in bytes; memory is resident."""

    process: int
    baseline: int  # before loading: libraries, the other processes met, a program run on all devices
    shard: int  # of all parameters, what this process's device holds
    leaf: int  # the largest parameter, whole
    part: int  # the largest part of a parameter that this process's device holds
    peak: int  # at most while loading, beyond the baseline
    read: int  # from files while loading
    seconds: float

    @property
    def ratio(self) -> float:
        """Peak over what it may be: the shard and one whole leaf."""
        return self.peak / (self.shard + self.leaf)


def bench_load(
    ckpt: str | None = None,
    *,
    size: Literal["tiny", "small", "base"] = "tiny",
    count: int = 2,
    mesh: str | None = None,
    dtype: str | None = "bfloat16",
    directory: str | Path | None = None,
) -> dict[str, list[Loaded]]:
    """Loads a checkpoint onto a mesh of ``count`` processes with one CPU device each, and prints a table.

    The files are not in the page cache at the start. Peaks are the kernel's high-water marks, so nothing is missed
    between samples; files are read, not mapped, so that resident memory is the processes' own. With one process, the
    time is compared with that of reading the same files and casting what is in them, by numpy, in one thread.

    Args:
      ckpt: a checkpoint in either layout; None makes a random one of ``size`` and loads it from both.
      count: processes, all on this machine.
      mesh: as ``tensor=2,expert=2``; None splits over ``expert``, and over ``tensor`` when four divides ``count``.
      dtype: of the loaded parameters, see `checkpoint.load_params`. Bytes read can be compared with the shard when
        it is the stored one.
      directory: where to make the random checkpoint; needs twice its size (tiny: 14 GB). Default: the system's
        temporary directory. Everything made there is removed again.

    Returns:
      "released" or "orbax" → what each process measured.

    Raises:
      CheckpointError: the checkpoint cannot be loaded, or the disk has too little space for one.
      DSVL2Error: a process failed.
      UsageError: ``count`` is not positive, or not the product of the mesh.
    """
    need_at_least("--processes", count, 1)
    tensor = 2 if count % 4 == 0 else 1
    sizes = parse_mesh(mesh or f"tensor={tensor},expert={count // tensor}")
    check_mesh(sizes, count)
    with tempfile.TemporaryDirectory(prefix="dsvl2-bench-", dir=directory) as work:
        print(machine())
        checkpoints = [resolve(ckpt)] if ckpt is not None else _random_in_both_layouts(Path(work), size)
        return {kind(checkpoint): _load(checkpoint, count, sizes, dtype) for checkpoint in checkpoints}


def _random_in_both_layouts(work: Path, size: str) -> list[Path]:
    released, converted = work / "released", work / "converted"
    random_checkpoint(released, released_config(size))
    convert(released, converted)
    return [released, converted]


def _load(directory: Path, count: int, sizes: Mapping[str, int], dtype: str | None) -> list[Loaded]:
    """What each process measured, after printing it."""
    drop_from_page_cache(directory)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # one device each
    running = []
    try:
        for i in range(count):
            job = {"directory": str(directory.absolute()), "sizes": dict(sizes), "dtype": dtype}
            job["together"] = {"processes": str(count), "coordinator": coordinator, "process": i}
            command = [sys.executable, "-m", "dsvl2_jax.apps.bench.load", json.dumps(job)]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        answers = [process.communicate()[0] for process in running]
    finally:
        for process in running:
            process.kill()
    if failed := [i for i, process in enumerate(running) if process.returncode]:
        status = running[failed[0]].returncode
        raise DSVL2Error(f"{directory}: process {failed[0]} ended with status {status}; the reason is above.")
    measured = [Loaded(**json.loads(answer)) for answer in answers]
    spelled = ", ".join(f"{name}={number}" for name, number in sizes.items())
    print(f"{kind(directory)}, {spelled}, {dtype or 'as stored'}; GB, peak beyond the baseline")
    print(f"{'process':>8}{'baseline':>10}{'shard':>8}{'leaf':>8}{'part':>8}{'peak':>8}{'ratio':>8}{'read':>8}{'s':>8}")
    for one in measured:
        figures = (one.shard, one.leaf, one.part, one.peak)
        print(
            f"{one.process:8}{one.baseline / 1e9:10.3f}"
            + "".join(f"{figure / 1e9:8.3f}" for figure in figures)
            + f"{one.ratio:8.3f}{one.read / 1e9:8.3f}{one.seconds:8.1f}",
            flush=True,
        )
    if count == 1:
        drop_from_page_cache(directory)
        job = {"directory": str(directory.absolute()), "plain": True, "dtype": dtype}
        command = [sys.executable, "-m", "dsvl2_jax.apps.bench.load", json.dumps(job)]
        plain = float(subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True).stdout)
        print(
            f"reading the files and casting: {plain:.1f} s; loading takes {measured[0].seconds / plain:.2f} × as long"
        )
    return measured


def _read_and_cast(directory: Path, dtype: str | None) -> float:
    """Seconds to read the files of the weights one after the other and to cast all that is in them, which is kept."""
    config, _ = open_model(directory)
    if kind(directory) == "released":
        with Source(directory) as source:
            files = source.files
            sizes = collections.Counter()
            for tensor in source.tensors.values():
                sizes[numpy_dtype(FLOAT_DTYPES[tensor.dtype])] += tensor.size
    else:
        files = [file for file in sorted((directory / PARAMS_NAME).rglob("*")) if file.is_file()]
        sizes = collections.Counter()
        for shape, stored in open_orbax(directory, config)[1].values():
            sizes[stored] += leaf_bytes(shape, stored)
    stored = sizes.most_common(1)[0][0]
    target = stored if dtype is None else numpy_dtype(dtype)
    started, kept, buffer = time.perf_counter(), [], np.empty(READ_BYTES, np.uint8)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(buffer) // stored.itemsize * stored.itemsize:
                kept.append(buffer[:count].view(stored).astype(target))
    return time.perf_counter() - started


def _measure(directory: Path, sizes: Mapping[str, int], dtype: str | None) -> Loaded:
    """Loads the parameters in this process, one of several that do so."""
    import jax
    import jax.numpy as jnp

    config, _ = open_model(directory)
    mesh = make_mesh(**sizes)
    everywhere = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    ones = jax.jit(lambda: jnp.ones(mesh.size), out_shardings=everywhere)()
    jax.jit(jnp.sum)(ones).block_until_ready()
    processes.gather("ready")
    restart_peak()
    baseline, before = own_bytes("VmRSS"), own_bytes("rchar")
    started = time.perf_counter()
    params = load_params(directory, config, dtype, mesh)
    seconds = time.perf_counter() - started
    peak, read = own_bytes("VmHWM") - baseline, own_bytes("rchar") - before
    leaves = jax.tree.leaves(params)
    parts = [sum(shard.data.nbytes for shard in leaf.addressable_shards) for leaf in leaves]
    largest = max(leaf.nbytes for leaf in leaves)
    return Loaded(jax.process_index(), baseline, sum(parts), largest, max(parts), peak, read, seconds)


def _work(job: dict[str, Any]) -> int:
    """The command of one process: prints what it measured as JSON."""
    if "plain" in job:
        print(_read_and_cast(Path(job["directory"]), job["dtype"]))
        return 0
    keep_freed_memory()  # as every command that loads a model
    try:
        processes.Processes(**job["together"]).join({})
        measured = _measure(Path(job["directory"]), job["sizes"], job["dtype"])
        print(json.dumps(dataclasses.asdict(measured)))
        return processes.end(0)
    except Exception as error:  # the other processes must hear of any
        return processes.end(1, f"dsvl2: error: {type(error).__name__}: {error}")


if __name__ == "__main__":
    sys.exit(_work(json.loads(sys.argv[1])))
