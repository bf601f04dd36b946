"""`dsvl2 convert`, `export`, `merge` and `doctor`: checkpoints in both layouts.

Tested in tests/apps/cli/test_main.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from dsvl2_jax.apps.cli.options import Checkpoint, Dtype, QuantizeRules, QuantizeTo


def convert(
    src: Positional[str],
    dst: Positional[Path],
    *,
    dtype: Dtype | None = None,
    max_memory: str = "1GiB",
    quantize: QuantizeTo | None = None,
    rule: QuantizeRules = (),
    calibrate: Path | None = None,
) -> None:
    """Convert a checkpoint in the released layout to an Orbax directory that is complete by itself.

    Args:
        src: directory with config.json and safetensors, or a hub id such as deepseek-ai/deepseek-vl2-tiny.
        dst: directory to make; it must not exist.
        dtype: cast all tensors; without it each keeps its own.
        max_memory: the most memory for tensors on their way, e.g. 4GiB. A single larger tensor still passes.
        quantize: keep the weights of products in 8 or 4 bits.
        rule: where weights are quantized, keep those in whose path the regular expression is found as int8, int4,
            float8, or with =keep as they are, such as self_attn=int8 or lm_head=int8. May be given several times; the
            first that is found decides.
        calibrate: for int4, round by what enters the weights when the model reads these samples, JSON Lines as for
            training; the whole model is loaded.
    """
    from dsvl2_jax.convert.to_orbax import convert as run
    from dsvl2_jax.model.quantization import quantization_of

    run(src, dst, dtype=dtype, max_memory=max_memory, quantization=quantization_of(quantize, rule), calibrate=calibrate)


def export(ckpt: Positional[str], dst: Positional[Path], *, dtype: Dtype | None = None, verify: bool = False) -> None:
    """Write a converted or trained checkpoint back to the released layout (safetensors with index).

    Args:
        ckpt: converted directory, training run (its newest checkpoint) or one of its checkpoints.
        dst: directory to make; it must not exist.
        dtype: cast all tensors but the router's; without it each is as stored, which is float32 for trained ones.
        verify: read every file of the checkpoint first and compare it with its digest.
    """
    from dsvl2_jax.convert.to_safetensors import export as run

    run(ckpt, dst, dtype=dtype, verify=verify)


def merge(
    ckpt: Positional[str],
    adapter: Positional[str],
    dst: Positional[Path],
    *,
    layout: Literal["orbax", "released"] | None = None,
    verify: bool = False,
) -> None:
    """Merge a LoRA or DoRA adapter into its checkpoint: what comes out needs no adapter any more.

    Args:
        ckpt: what the adapter was trained on: converted directory, released-layout directory, training run or hub id.
        adapter: a directory that training or peft wrote, or a hub id.
        dst: directory to make; it must not exist.
        layout: orbax, as convert writes it, or released, as export does; without it, that of the checkpoint.
        verify: read every file of the checkpoint first and compare it with its digest.
    """
    from dsvl2_jax.convert.merge import merge as run

    run(ckpt, adapter, dst, layout=layout, verify=verify)


def doctor(ckpt: Checkpoint = None, *, verify: bool = False, json: bool = False) -> int:
    """Check a checkpoint in either layout, or an adapter; exit status 1 when it is unusable.

    Args:
        ckpt: checkpoint, training run or adapter's directory; without it, the bundled checkpoint.
        verify: read every file and compare it with its digest.
        json: print the report as JSON.
    """
    from dsvl2_jax.convert.doctor import doctor as run

    return run(ckpt, verify=verify, as_json=json)
