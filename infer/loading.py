"""Loading a model with the options that every command shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax

from dsvl2_jax.checkpoint.locate import description, find_adapter, resolve
from dsvl2_jax.errors import UsageError
from dsvl2_jax.infer import engine
from dsvl2_jax.infer.engine import Model
from dsvl2_jax.model.rope_scaling import parse_scaling
from dsvl2_jax.runtime import processes
from dsvl2_jax.sharding import make_mesh, parse_mesh

AS_SEEN = "--as-seen"  # what `LoadOptions.as_seen` is called, for notes about pictures


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """Options of every command that loads a model; see `dsvl2 generate --help`."""

    dtype: str = "float32"
    mesh: str | None = None
    as_seen: bool = False
    strict_special_tokens: bool = False
    verify: bool = False
    adapter: str | Mapping[str, str] | None = None
    cache_dtype: str | None = None
    max_tiles: int | None = None
    min_tiles: int | None = None
    frames: int | None = None
    frame_choice: str | None = None
    context: int | None = None
    rope_scaling: str | None = None  # JSON


def load(ckpt: str | None, options: LoadOptions) -> Model:
    """`engine.load` with the command line's options; raises what it raises.

    The model's programs are kept on disk for the next start. Among several processes all must call it, with the same
    checkpoint and a mesh of all their devices.
    """
    if options.mesh is None and processes.joined():
        raise UsageError(
            f"several processes need --mesh, to say how they share the model: sizes of data, tensor and expert whose "
            f"product is {jax.device_count()}, the devices of all of them."
        )
    mesh = None if options.mesh is None else make_mesh(**parse_mesh(options.mesh))
    if processes.joined():
        processes.same_everywhere("the checkpoint", description(resolve(ckpt)))
        adapters = options.adapter or {}
        for adapter in [adapters] if isinstance(adapters, str) else adapters.values():
            processes.same_everywhere("the adapter", description(find_adapter(adapter)))
    given = {name: getattr(options, name) for name in ("dtype", "cache_dtype", "verify", "adapter", "context")}
    text, scaling = options.rope_scaling, None
    if text is not None:
        scaling = parse_scaling(text, f"--rope-scaling {text}:", UsageError)
    model = engine.load(ckpt, mesh=mesh, rope_scaling=scaling, **given)
    model.store_programs()
    model.processor.as_seen = options.as_seen
    model.processor.warns = False  # the commands count pictures, and name their own option
    model.processor.strict_special_tokens = options.strict_special_tokens
    model.processor.set_visuals(options.max_tiles, options.min_tiles, options.frames, options.frame_choice)
    return model
