"""Plans kept on disk: a whole model takes minutes to compile, and the same question has the same answer.

Tested in tests/apps/plan/test_planner.py.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsvl2_jax.apps.plan.job import Job
from dsvl2_jax.apps.plan.planner import plan
from dsvl2_jax.checkpoint.staging import write_text
from dsvl2_jax.errors import DSVL2Error
from dsvl2_jax.json_files import read_json_object
from dsvl2_jax.model.config import Config
from dsvl2_jax.runtime.compile_cache import user_cache
from dsvl2_jax.runtime.hardware import Topology

# This package, the compilers, and what traces the programs.
_PACKAGES = ("dsvl2-jax", "jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt")
# Packages of the sources that make programs or count them.
_SOURCES = ("dsvl2_jax", "dsvl2_jax.infer", "dsvl2_jax.train")


def saved_plan(
    config: Config,
    job: Job,
    topology: Topology,
    sizes: dict[str, int] | None,
    say: Callable[[str], None],
    *,
    cache: bool = True,
) -> dict[str, Any]:
    """`dsvl2_jax.apps.plan.planner.plan`, read from disk where it was made with the same sources and compilers.

    Plans without a compiled program are not kept. ``from_cache`` tells which it was.
    """
    file = user_cache() / "plans" / f"{_key(config, job, topology, sizes)}.json"
    if cache and (saved := _read(file)) is not None:
        return saved | {"from_cache": True}
    report = plan(config, job, topology, sizes, say)
    if cache and report["compiled"]:
        _write(file, report)
    return report | {"from_cache": False}


def _key(config: Config, job: Job, topology: Topology, sizes: dict[str, int] | None) -> str:
    settings = None if job.settings is None else dataclasses.asdict(job.settings)
    if settings is not None:
        del settings["run"]["directory"], settings["data"]["train"], settings["data"]["validation"]  # shape no program
    question = {
        "sources": _sources(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "config": dataclasses.asdict(config),
        "job": [job.kind, job.batch, job.sequence, job.cache_dtype, settings, job.quantization],
        "topology": dataclasses.asdict(topology),
        "mesh": sizes,
    }
    return hashlib.sha256(json.dumps(question, sort_keys=True, default=str).encode()).hexdigest()


@functools.cache
def _sources() -> str:
    """A digest of our sources, so that a change of the model is never answered with an old plan."""
    digest = hashlib.sha256()
    for package in _SOURCES:
        folder = Path(importlib.import_module(package).__file__).parent
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(file, DSVL2Error)
    except DSVL2Error:
        return None


def _write(file: Path, report: dict[str, Any]) -> None:
    """Whole or not at all; a directory that cannot be written to costs the cache, not the plan."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(report))
    except OSError:
        return
