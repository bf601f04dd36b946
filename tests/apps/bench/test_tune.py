"""`dsvl2 bench tune`, its measurements injected: candidates are compared, then timed; the fastest wins."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

from dsvl2_jax.apps.bench import tune as tune_module
from dsvl2_jax.apps.bench.tune import bench_tune, calls, seconds_of_a_call, tune
from dsvl2_jax.apps.bench.tune_cases import (
    attention_case,
    candidates,
    default_blocks,
    prepare,
    product_case,
    released_cases,
)
from dsvl2_jax.errors import UsageError
from dsvl2_jax.kernels import tuning
from dsvl2_jax.kernels.block_sizes import (
    SHARED_MEMORY,
    HopperAttention,
    HopperProduct,
    TritonAttention,
    TritonProduct,
    kernel_of,
)
from dsvl2_jax.kernels.tuning import Gpu, current_table, read_table

GPU = Gpu("NVIDIA H100 80GB HBM3", "9.0")
PRODUCT = product_case("gmm", 3, 64, 64, 48)


def test_without_a_gpu_it_says_what_is_needed():
    with pytest.raises(UsageError, match=r"on an NVIDIA GPU, and found: cpu.*pip install"):
        bench_tune()


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_released_shapes_have_candidates_that_fit(size):
    for case in released_cases(size):
        tried = list(candidates(case, "9.0", SHARED_MEMORY))
        assert tried[0] == default_blocks(case) and len(tried) > 10
        kernels = {kernel_of(case.operation, blocks) for blocks in tried}
        assert kernels == ({"triton"} if case.operation in ("attention_dq", "attention_dkv") else {"triton", "hopper"})
        assert not any(isinstance(b, HopperProduct | HopperAttention) for b in candidates(case, "8.9", 99 << 10))


def test_the_fastest_right_candidate_wins():
    times = iter([3e-6, 1e-6, 2e-6])
    blocks = [TritonProduct(16, 64, 32, 4, 2), TritonProduct(16, 32, 32, 4, 2), TritonProduct(16, 16, 32, 4, 2)]
    found = tune(PRODUCT, blocks, measure=lambda program: next(times), interpret=True)
    assert found["blocks"]["columns"] == 32 and found["seconds"] == 1e-6 and found["default_seconds"] == 3e-6
    assert found["kernel"] == "triton" and found["tried"] == 3 and not found["failed"]


def test_a_wrong_candidate_is_not_timed(monkeypatch):
    def wrong(case, *, interpret):
        work = prepare(case, interpret=interpret)
        return type(work)(
            work.arrays,
            lambda blocks: lambda *a: work.run(blocks)(*a) * (2 if blocks.columns == 32 else 1),
            work.expected,
            work.compared,
        )

    monkeypatch.setattr(tune_module, "prepare", wrong)
    blocks = [TritonProduct(16, 32, 32, 4, 2), TritonProduct(16, 64, 32, 4, 2), TritonProduct(128, 256, 64, 8, 9)]
    found = tune(PRODUCT, blocks, measure=lambda program: 1e-6, interpret=True)
    assert found["blocks"]["columns"] == 64 and found["default_seconds"] is None
    reasons = [failed["problem"] for failed in found["failed"]]
    assert "differs from float32" in reasons[0] and "shared memory" in reasons[1]


@pytest.mark.parametrize("part", ["forward", "dq", "dkv"])
def test_attention_is_compared_with_float32(part):
    case = attention_case(part, 16, 16, 32, 3, causal=True)
    found = tune(case, [TritonAttention(32, 32, 4, 2)], measure=lambda *_: 1e-6, interpret=True)
    assert found["seconds"] > 0 and not found["failed"]


def test_calls_follow_each_other(monkeypatch):
    monkeypatch.setattr(tune_module, "CALLS", 3)
    seen = []

    def add(numbers, x):
        jax.debug.callback(lambda number: seen.append(int(number)), numbers[0])
        return jnp.where(len(seen) == 0, jnp.nan, x) + numbers[0]

    program = calls(add, (jnp.array([7]), jnp.ones(2)))
    assert seconds_of_a_call(program) > 0 and jnp.isnan(program()).all()
    jax.effects_barrier()
    assert sorted(seen) == sorted([7, 8, 9] * (tune_module.RUNS + 1))  # each call saw what the one before it gave


def test_what_is_measured_is_what_the_kernels_read(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tuning, "this_gpu", lambda: GPU)
    monkeypatch.setattr(tune_module, "released_cases", lambda size: [PRODUCT])
    monkeypatch.setattr(tune_module, "candidates", lambda *_: [TritonProduct(16, 64, 32, 4, 2)])
    monkeypatch.setattr(
        tune_module, "tune", lambda case, blocks: tune(case, blocks, measure=lambda *_: 1e-6, interpret=True)
    )
    path = tmp_path / "table.json"
    bench_tune(("small",), as_json=True, out=path)
    (printed,) = json.loads(capsys.readouterr().out)
    assert printed["operation"] == "gmm" and printed["shape"] == dict(PRODUCT.shape)
    assert read_table(path, GPU).find("gmm", PRODUCT.shape) == TritonProduct(16, 64, 32, 4, 2)
    current_table.cache_clear()
    monkeypatch.setattr(tuning, "table_path", lambda gpu: path)
    asked = []
    monkeypatch.setattr(tuning, "chosen", lambda operation, **shape: asked.append((operation, shape)))
    work = prepare(PRODUCT, interpret=True)
    monkeypatch.setattr("dsvl2_jax.kernels.grouped_matmul.chosen", tuning.chosen)
    sizes, x, w = work.arrays
    from dsvl2_jax.kernels.grouped_matmul import _cuda

    jax.eval_shape(_cuda, x, w, sizes)
    assert asked == [("gmm", dict(PRODUCT.shape))]  # the kernels ask by the names that were measured
    current_table.cache_clear()
