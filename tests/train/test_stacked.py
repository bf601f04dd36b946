"""Layers apart and stacked are the same parameters."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsvl2_jax.model.config import Config
from dsvl2_jax.model.deepseek_vl2 import abstract_leaves
from dsvl2_jax.model.layer_runs import layer_runs
from dsvl2_jax.model.released import SIZES, released_config
from dsvl2_jax.train.stacked import stack_layers, stacked_paths, unstack_layers


def config(size: str = "base", **language) -> Config:
    raw = released_config(size)
    raw["language_config"] |= language
    return Config.from_dict(raw)


@pytest.mark.parametrize("size", SIZES)
def test_released_sizes_have_one_stack_of_experts_and_one_of_vision_blocks(size):
    cfg = config(size)
    last = cfg.language.num_hidden_layers - 1
    names = {part: [run.name for run in runs] for part, runs in layer_runs(cfg).items()}
    assert names == {"vision": ["blocks_0_to_26"], "language": ["layers_0", f"layers_1_to_{last}"]}


def test_runs_of_equal_layers_follow_the_experts_and_cover_every_layer():
    cfg = config(num_hidden_layers=7, first_k_dense_replace=3)
    assert [run.name for run in layer_runs(cfg)["language"]] == ["layers_0_to_2", "layers_3_to_6"]
    every_second = config(num_hidden_layers=4, first_k_dense_replace=0, moe_layer_freq=2)
    assert [run.name for run in layer_runs(every_second)["language"]] == [f"layers_{i}" for i in range(4)]
    for runs in (layer_runs(cfg), layer_runs(cfg, stack=False)):
        assert [m for run in runs["language"] for m in run.members()] == [f"layers_{i}" for i in range(7)]


def test_members_of_a_stack_are_in_order_of_layers_whatever_the_order_of_the_leaves():
    cfg = config()
    paths = sorted(abstract_leaves(cfg), reverse=True)  # layers_9 before layers_10 would be wrong as text
    router = ("language", "layers_1_to_29", "mlp", "router", "kernel")
    members = stacked_paths(cfg, paths)[router]
    assert members == [("language", f"layers_{i}", "mlp", "router", "kernel") for i in range(1, 30)]


@pytest.mark.parametrize("stack", [True, False])
def test_unstacking_undoes_stacking(stack):
    cfg = config(num_hidden_layers=12)
    rng = np.random.default_rng(0)
    leaves = {
        path: jnp.asarray(rng.normal(size=len(shape) * (2,))) for path, (shape, _) in abstract_leaves(cfg).items()
    }
    stacked = stack_layers(leaves, cfg, stack=stack)
    assert (len(stacked) < len(leaves)) == stack
    back = unstack_layers(stacked, cfg, stack=stack)
    assert back.keys() == leaves.keys()
    assert all(np.array_equal(back[path], leaves[path]) for path in leaves)
