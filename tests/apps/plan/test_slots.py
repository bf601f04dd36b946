"""How many slots fit: parameters, cache and stores against what there is of memory."""

from __future__ import annotations

import math

import jax
import pytest
from random_adapters import random_adapter

import dsvl2_jax
from dsvl2_jax.apps.plan.slots import print_slots, slots_that_fit
from dsvl2_jax.checkpoint.adapters import write_adapter
from dsvl2_jax.infer.loading import LoadOptions
from dsvl2_jax.model.cache import init_cache
from dsvl2_jax.model.config import Config
from dsvl2_jax.model.released import released_config

ALONE = {"data": 1, "tensor": 1, "expert": 1}


def test_the_bytes_are_those_of_parameters_and_cache():
    model = dsvl2_jax.load(None)
    report = slots_that_fit(model.config, ALONE, itemsize=4, cache_dtype="float32", memory=1e9, stores=1e8)
    assert report.parameters == pytest.approx(sum(x.size * 4 for x in jax.tree.leaves(model.params)), rel=0.01)
    cache = init_cache(model.config, 2, report.context, "float32")
    assert report.slot == pytest.approx(sum(x.size * 4 for x in jax.tree.leaves(cache)) / 2, rel=0.01)
    assert report.slots == math.floor((report.room - report.parameters - 1e8) / report.slot)


@pytest.mark.parametrize("size, kilobytes", [("tiny", 61), ("small", 31), ("base", 35)])
def test_a_token_of_a_released_model_costs_what_is_known(size, kilobytes):
    report = slots_that_fit(Config.from_dict(released_config(size), size), ALONE, itemsize=2, memory=141e9, stores=0)
    assert report.slot / report.context == pytest.approx(1000 * kilobytes, rel=0.03)


@pytest.mark.parametrize("size, share", [("tiny", 0.516), ("small", 0.507)])
def test_a_cache_in_int8_takes_about_half_the_bytes(size, share):
    """A byte a number, and four for the scale of each vector: 576 numbers of small have two, 2560 of tiny 20."""
    config = Config.from_dict(released_config(size), size)
    floats, int8 = (
        slots_that_fit(config, ALONE, itemsize=2, cache_dtype=dtype, memory=141e9, stores=0)
        for dtype in ("bfloat16", "int8")
    )
    assert int8.slot / floats.slot == pytest.approx(share, abs=0.001)
    cache = jax.eval_shape(lambda: init_cache(config, 1, int8.context, "int8"))
    assert int8.slot == sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache))


def test_a_mesh_has_room_for_more():
    config = Config.from_dict(released_config("small"), "small")
    alone = slots_that_fit(config, ALONE, itemsize=2, memory=80e9, stores=0)
    split = slots_that_fit(config, {"data": 2, "tensor": 1, "expert": 4}, itemsize=2, memory=80e9, stores=0)
    assert split.parameters < alone.parameters and split.slots > alone.slots > 0
    assert slots_that_fit(config, ALONE, itemsize=2, memory=16e9, stores=0).slots == 0


def test_the_command_says_whether_the_slots_fit(capsys):
    assert print_slots(None, LoadOptions(), 2, 0) == 0
    assert "slots that fit" in capsys.readouterr().out
    assert print_slots(None, LoadOptions(), 10**12, 0) == 1


def test_adapters_beside_the_base_take_room_of_their_own(tmp_path, capsys):
    config = dsvl2_jax.load(None).config
    for name, rank in (("a", 2), ("b", 6)):
        write_adapter(tmp_path / name, config, *random_adapter(config, "lm_head", rank=rank))
    loading = LoadOptions(adapter={name: str(tmp_path / name) for name in "ab"})
    print_slots(None, loading, 2, 0)
    head = config.language
    bytes_taken = 4 * 8 * (head.hidden_size + head.vocab_size)
    assert f"adapters {bytes_taken / 1e9:.3f} GB" in " ".join(capsys.readouterr().out.split())
