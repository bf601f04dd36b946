"""Conversion at full size: speed against `cp` of the same files, and peak resident memory.

The checkpoint is random, at the released shapes: what conversion costs does not depend on the values.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from dsvl2_jax.checkpoint import rules
from dsvl2_jax.checkpoint.leaves import leaf_bytes
from dsvl2_jax.checkpoint.staging import refuse_existing, staged, sync_tree
from dsvl2_jax.convert.to_safetensors import ShardWriter
from dsvl2_jax.errors import CheckpointError, UsageError
from dsvl2_jax.inputs.tokenizer import DEFAULT_PAD_TOKEN
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.released import released_config
from dsvl2_jax.runtime.progress import progress

_BOS, _EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


@dataclasses.dataclass(frozen=True)
class ConvertBench:
    """Medians over the repeats: seconds of cp and of the conversion, and the conversion's peak memory in bytes."""

    size: str
    bytes: int
    cp_seconds: float
    convert_seconds: float
    peak_bytes: int

    @property
    def ratio(self) -> float:
        """Speed of the conversion over that of cp."""
        return self.cp_seconds / self.convert_seconds


def bench_convert(
    *,
    size: Literal["tiny", "small", "base"] = "tiny",
    directory: str | Path | None = None,
    keep: str | Path | None = None,
    repeats: int = 2,
) -> ConvertBench:
    """Converts a random bfloat16 checkpoint of a released size, in a process of its own, and prints figures.

    cp and the conversion run in turn, each from files that are not in the page cache and until everything
    is on disk. The conversion's time includes starting Python.

    Args:
      size: which released model's shapes.
      directory: where to work; needs twice the checkpoint's size (tiny: 14 GB). Default: the system's
        temporary directory. Everything made there is removed again.
      keep: moves the last converted checkpoint here.
      repeats: how often both are measured.

    Raises:
      CheckpointError: not enough disk, ``keep`` exists, or the conversion failed.
      UsageError: ``repeats`` is not positive.
    """
    if repeats < 1:
        raise UsageError(f"--repeats {repeats}: expected at least 1.")
    if keep is not None:
        keep = Path(keep).absolute()
        refuse_existing(keep)
    with tempfile.TemporaryDirectory(prefix="dsvl2-bench-", dir=directory) as work:
        source, copy, converted = (Path(work, name) for name in ("released", "copy", "converted"))
        total = random_checkpoint(source, released_config(size))
        if shutil.disk_usage(work).free < 1.1 * total:
            raise CheckpointError(
                f"{work}: the disk has too little space for a second copy of the {total / 1e9:.1f} GB checkpoint. Name "
                "another place with --directory."
            )
        print(f"{size}: {total / 1e9:.2f} GB of random bfloat16 tensors in {source}")
        _time_copy(source, copy)  # not counted: on a virtual machine the first use of memory is several times slower
        shutil.rmtree(copy)
        copies, conversions, peaks = [], [], []
        for repeat in range(repeats):
            copies.append(_time_copy(source, copy))
            print(f"  cp       {copies[-1]:7.1f} s   {total / copies[-1] / 1e6:6.0f} MB/s", flush=True)
            shutil.rmtree(copy)
            seconds, peak = _time_conversion(source, converted)
            conversions.append(seconds)
            peaks.append(peak)
            print(
                f"  convert  {seconds:7.1f} s   {total / seconds / 1e6:6.0f} MB/s   peak {peak / 1e9:.2f} GB",
                flush=True,
            )
            if keep is None or repeat < repeats - 1:
                shutil.rmtree(converted)
        if keep is not None:
            shutil.move(converted, keep)
    result = ConvertBench(size, total, statistics.median(copies), statistics.median(conversions), max(peaks))
    print(
        f"convert {total / result.convert_seconds / 1e6:.0f} MB/s, {result.ratio:.2f} × the speed of cp, peak resident "
        f"memory {result.peak_bytes / 1e9:.2f} GB"
    )
    return result


def random_checkpoint(directory: Path, config_json: dict, seed: int = 0) -> int:
    """Makes a released-layout checkpoint with random bfloat16 weights of about ±0.02; returns bytes of tensors.

    It has a byte-level tokenizer, so that it can be converted, loaded and run.

    Raises:
      CheckpointError: ``directory`` exists, or the disk has too little space.
    """
    config = Config.from_dict(config_json)
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    tensors = {name: (shape, bfloat16) for name, shape in rules.expected_shapes(config).items()}
    total = sum(leaf_bytes(*entry) for entry in tensors.values())
    random = np.random.Generator(np.random.SFC64(seed))
    with staged(directory, total) as partial, progress("random weights", total) as advance:
        _write_text_files(partial, config_json)
        with ShardWriter(partial, tensors) as writer:
            for name, (shape, _) in tensors.items():
                writer.write({name: random_bfloat16(random, shape)})
                advance(leaf_bytes(shape, bfloat16))
            writer.finish()
    return total


def random_bfloat16(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """bfloat16 of random sign and magnitude 2^-7 … 2^-5 (standard deviation 0.018), made from random bits."""
    size = int(np.prod(shape, dtype=np.int64))
    bits = random.integers(0, 2**64, size=-(-size // 4), dtype=np.uint64).view(np.uint16)[:size]
    bits &= 0x80FF  # sign, last exponent bit, mantissa
    bits |= 0x3C00  # exponent 120 or 121
    return bits.view(ml_dtypes.bfloat16).reshape(shape)


def _write_text_files(directory: Path, config_json: dict) -> None:
    import tokenizers
    from tokenizers.models import BPE

    files = {
        "config.json": config_json,
        "processor_config.json": {
            "candidate_resolutions": config_json["candidate_resolutions"],
            "downsample_ratio": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "patch_size": config_json["vision_config"]["patch_size"],
        },
        "tokenizer_config.json": {"bos_token": _BOS, "eos_token": _EOS, "pad_token": DEFAULT_PAD_TOKEN},
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([_BOS, _EOS, DEFAULT_PAD_TOKEN, *alphabet])}
    tokenizer = tokenizers.Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))


def _time_copy(source: Path, target: Path) -> float:
    forget(source)
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    sync_tree(target)
    return time.perf_counter() - started


def _time_conversion(source: Path, target: Path) -> tuple[float, int]:
    """(seconds, peak resident bytes) of a conversion in a process of its own, which syncs by itself."""
    forget(source)
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "dsvl2_jax", "convert", str(source), str(target)])
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise CheckpointError(f"{source}: the conversion ended with status {child.returncode}; its message is above.")
    return seconds, usage.ru_maxrss * 1024


def forget(directory: Path) -> None:
    """Drops a directory's files from the page cache, so that they are read from the disk again."""
    os.sync()
    for file in filter(Path.is_file, directory.rglob("*")):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
