"""Whole models compiled for TPU pods; `make test-pods` runs these, which take minutes each."""

from __future__ import annotations

import importlib.util

import pytest

from dsvl2_jax.config import Config
from dsvl2_jax.convert.sizes import released_config
from dsvl2_jax.infer.plan import parse_job, plan
from dsvl2_jax.infer.topologies import topology

pytestmark = [
    pytest.mark.pods,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: make test-pods"),
]


@pytest.mark.parametrize(
    ("size", "kind", "place"),
    [
        *(("tiny", kind, "v5e-4") for kind in ("prefill", "decode", "encode")),
        *(("small", kind, "v5e-8") for kind in ("prefill", "decode", "encode")),
        *(("base", kind, "v5p-8") for kind in ("prefill", "decode", "encode")),
        ("tiny", "sft", "v6e-4"),
        ("small", "sft", "v6e-16"),
        ("base", "sft", "v5p-16"),
    ],
)
def test_whole_models_fit(size, kind, place):
    config = Config.from_dict(released_config(size))
    found = plan(config, parse_job(kind, None, None, None, model=size), topology(place))
    assert found["compiled"] and found["fits"] and found["unknown_loops"] == [], found
    assert found["flops_ratio"] >= 0.95
