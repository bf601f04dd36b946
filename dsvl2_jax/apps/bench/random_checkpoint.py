"""A random checkpoint of a given configuration: what conversion and loading cost does not depend on the values.

Tested by what reads it: tests/apps/bench/test_load.py and tests/convert/test_to_orbax.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from dsvl2_jax.checkpoint import rules
from dsvl2_jax.checkpoint.leaves import leaf_bytes
from dsvl2_jax.checkpoint.staging import staged
from dsvl2_jax.convert.to_safetensors import ShardWriter
from dsvl2_jax.inputs.tokenizer import DEFAULT_PAD_TOKEN
from dsvl2_jax.model.config import Config
from dsvl2_jax.runtime.progress import progress

_BOS, _EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


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
                writer.write({name: _random_bfloat16(random, shape)})
                advance(leaf_bytes(shape, bfloat16))
            writer.finish()
    return total


def _random_bfloat16(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
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
