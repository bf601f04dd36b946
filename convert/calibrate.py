"""int4 weights that are rounded by what enters them: GPTQ (Frantar et al., arXiv 2210.17323).

Each input's row of a weight is rounded in turn, and the error is made up for by the rows that are not rounded yet, as
far as the inputs of the user's samples go together. The whole model is loaded, and all samples go through it once, in
one batch; a weight is rounded when its inputs come by, so that no more is kept than the result.

Tested in tests/convert/test_calibrate.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from dsvl2_jax.checkpoint.load import load_params
from dsvl2_jax.errors import DataError, DSVL2Error, UsageError
from dsvl2_jax.inputs.batch import collate
from dsvl2_jax.inputs.image_sources import open_images
from dsvl2_jax.inputs.processor import ModelInputs, Processor
from dsvl2_jax.inputs.records import parse_record, process, resolve
from dsvl2_jax.json_files import parse_json, read_lines
from dsvl2_jax.kernels.quantized import group_size, int4_scale, int4_values, pack_int4
from dsvl2_jax.messages import first_line
from dsvl2_jax.model import deepseek_vl2 as model
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.layers import Linear
from dsvl2_jax.model.moe import RoutedExperts
from dsvl2_jax.model.parameter_paths import LeafPath
from dsvl2_jax.runtime.progress import progress

MOST_SAMPLES = 64
MOST_TOKENS = 1024  # of a sample; what is beyond is cut off
DAMPING = 0.01  # of the mean square of an input, added to each one's

_EXPERTS = ("gate_proj", "up_proj", "down_proj")


def calibrated_weights(
    directory: Path, config: Config, processor: Processor, kinds: Mapping[LeafPath, str], file: Path
) -> dict[LeafPath, dict[str, np.ndarray]]:
    """Path → {"int4": values, "scale": scale}, of the weights that are int4 and that the samples reach.

    Args:
      directory: of the checkpoint, as `resolve` returns it.
      kinds: of `quantized_weights`.
      file: JSON Lines of samples, in the forms that training takes; the first `MOST_SAMPLES` that can be read are used.

    Raises:
      DataError: no sample can be read.
      UsageError: no weight is int4.
    """
    if "int4" not in kinds.values():
        raise UsageError(
            f"--calibrate {file}: serves the rounding to int4, and no weight is kept so here. Leave it out."
        )
    samples = _samples(file, processor)
    params = load_params(directory, config)
    paths = {id(array): path for path, array in flatten_dict(params).items() if kinds.get(path) == "int4"}
    found: dict[LeafPath, dict[str, np.ndarray]] = {}
    batch = collate(samples, config)
    config_of = processor.config
    valid_bt = np.arange(min(MOST_TOKENS, batch.ids.shape[1])) < batch.lengths[:, None]
    with progress("calibrate", len(paths), unit="items") as advance:

        def take(path: LeafPath, weight: Any, rows: np.ndarray) -> None:
            if path not in found:
                found[path] = _rounded(np.asarray(weight, np.float32), model.weight_inputs(config)[path], rows)
                advance(1)

        with nn.intercept_methods(_interceptor(paths, valid_bt, found, take)):
            if len(batch.tiles):
                mean, std = (np.asarray(x, np.float32) for x in (config_of.image_mean, config_of.image_std))
                features = model.adapt_tiles(params, config, batch.tiles, mean, std)
            else:
                features = jnp.zeros((0, config.tokens_per_tile, config.language.hidden_size))
            x_btd = model.merge(params, config, batch.ids, batch.image_index, features)
            model.forward(params, config, x_btd[:, :MOST_TOKENS], jnp.asarray(valid_bt))
    return found


def _samples(file: Path, processor: Processor) -> list[ModelInputs]:
    store, samples, problems = open_images("", str(file)), [], []
    for number, line in read_lines(file, DataError, "Expected JSON Lines."):
        if not line.strip():
            continue
        try:
            record = resolve(parse_record(parse_json(line)), processor, store)
            samples.append(process(record, processor, mask_prompt=False))
        except (DSVL2Error, OSError, ValueError) as error:
            problems.append(f"{file}:{number}: {first_line(error)}")
        if len(samples) == MOST_SAMPLES:
            break
    if not samples:
        why = problems[0] if problems else "it has no lines"
        raise DataError(f"--calibrate {file}: no sample of it can be read ({why}). docs/data.md shows the forms.")
    if problems:
        print(f"note: {len(problems)} samples cannot be read, such as {problems[0]}", file=sys.stderr)
    return samples


def _interceptor(
    paths: Mapping[int, LeafPath],
    valid_bt: np.ndarray,
    found: dict[LeafPath, dict[str, np.ndarray]],
    take: Callable[[LeafPath, Any, np.ndarray], None],
) -> Callable[..., Any]:
    """Rounds each weight of ``paths`` (identity of an array → path) by the rows that enter it."""

    def path_of(module: nn.Module, name: str) -> tuple[LeafPath | None, Any]:
        weight = module.get_variable("params", name)
        return paths.get(id(weight)), weight

    def intercept(call: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if context.method_name == "__call__" and isinstance(module, Linear):
            path, weight = path_of(module, "kernel")
            if path is not None:
                inputs = weight.shape[: module.contract]
                rows = np.asarray(args[0], np.float32)
                # Of the language model's batch [B, T, …], without the padding.
                rows = rows[valid_bt] if rows.shape[:2] == valid_bt.shape else rows
                take(path, weight, rows.reshape(-1, int(np.prod(inputs))))
        elif context.method_name == "__call__" and isinstance(module, RoutedExperts):
            weights = {name: path_of(module, name) for name in _EXPERTS}
            if any(path is not None for path, _ in weights.values()):
                for path, stored in _rounded_experts(weights, args[0], args[1]):
                    found[path] = stored
        return call(*args, **kwargs)

    return intercept


def _rounded_experts(
    weights: Mapping[str, tuple[LeafPath | None, Any]], x_btd: jax.Array, experts_btk: jax.Array
) -> Iterator[tuple[LeafPath, dict[str, np.ndarray]]]:
    """Every expert by the rows that visit it; one that none visits is rounded to nearest."""
    x_td = np.asarray(x_btd, np.float32).reshape(-1, x_btd.shape[-1])
    chosen_tk = np.asarray(experts_btk).reshape(len(x_td), -1)
    parts: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in _EXPERTS}
    for expert in range(weights["gate_proj"][1].shape[0]):
        matrices = {name: np.asarray(weight[expert], np.float32) for name, (_, weight) in weights.items()}
        rows = x_td[(chosen_tk == expert).any(-1)]
        hidden = np.asarray(nn.silu(rows @ matrices["gate_proj"]) * (rows @ matrices["up_proj"]))
        for name, entering in (("gate_proj", rows), ("up_proj", rows), ("down_proj", hidden)):
            if weights[name][0] is not None:
                parts[name].append(_rounded(matrices[name], (0,), entering))
    for name, of_experts in parts.items():
        if of_experts:
            yield weights[name][0], {key: np.stack([part[key] for part in of_experts]) for key in ("int4", "scale")}


def _rounded(weight: np.ndarray, inputs: Sequence[int], rows: np.ndarray) -> dict[str, np.ndarray]:
    """A weight whose inputs are its first axes, rounded for these rows [N, inputs]."""
    shape, axis = weight.shape, inputs[-1]
    size = group_size(shape[axis])
    values, scale = gptq(weight.reshape(rows.shape[-1], -1), rows, size)
    groups = shape[axis] // size
    scale = scale.reshape(*shape[:axis], groups, *shape[axis + 1 :])
    return {"int4": pack_int4(values.reshape(shape), groups, axis), "scale": scale}


def gptq(weight_io: np.ndarray, rows_ni: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rounds a matrix so that rows · matrix changes least.

    Args:
      weight_io: f32[inputs, outputs].
      rows_ni: f32[rows, inputs]; none of them: rounds to nearest.
      size: inputs that share a scale.

    Returns:
      int8[inputs, outputs] from -8 to 7, and f32[inputs / size, outputs].
    """
    count, outputs = weight_io.shape
    moments = rows_ni.T @ rows_ni / max(1, len(rows_ni))
    mean = float(np.trace(moments)) / count or 1.0
    moments = moments.astype(np.float64) + DAMPING * mean * np.eye(count)
    importance_i = np.diagonal(moments).astype(np.float32)[:, None]
    # The inverse is upper.T @ upper; row i of upper says how the error of input i is made up for by those after it.
    upper = np.linalg.cholesky(np.linalg.inv(moments)).T.astype(np.float32)
    left = weight_io.astype(np.float32, copy=True)
    values, scales = np.empty(weight_io.shape, np.int8), np.empty((count // size, outputs), np.float32)
    for start in range(0, count, size):
        stop = start + size
        block, errors = left[start:stop], np.empty((size, outputs), np.float32)
        scale = scales[start // size] = int4_scale(block, 0, importance_i[start:stop])[0]
        for i in range(size):
            values[start + i] = int4_values(block[i], scale)
            errors[i] = (block[i] - values[start + i] * scale) / upper[start + i, start + i]
            block[i + 1 :] -= np.outer(upper[start + i, start + i + 1 : stop], errors[i])
        left[stop:] -= upper[start:stop, stop:].T @ errors
    return values, scales
